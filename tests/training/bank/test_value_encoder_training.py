"""The value encoder learns to spell."""

import numpy as np
import pytest
import torch

from tinyalign_vlm import ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.training.bank import value_encoder_training
from tinyalign_vlm.training.bank.value_encoder_training import (
    CaptionSampler,
    ValueEncoderTrainingConfig,
    spelling_loss,
    train_value_encoder,
)

CAPTIONS = ["red square", "blue", "white circle"]


def new_encoder(**sizes):
    torch.manual_seed(0)
    return ValueEncoder(
        ValueEncoderConfig(
            num_latents=4, num_self_attends_per_block=1, vision_feature_size=8, num_vision_tokens=2, **sizes
        )
    )


def test_training_teaches_spelling_and_is_repeatable():
    images = np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float16)
    settings = ValueEncoderTrainingConfig(steps=150, batch_size=16, invented_share=0.0)
    encoders = [new_encoder(), new_encoder()]
    before = encoders[0].encode(torch.zeros(1, 2, 8), ["blue"])
    histories = [train_value_encoder(encoder, images, CAPTIONS, settings) for encoder in encoders]
    assert histories[0] == histories[1]
    assert histories[0][-1]["loss"] < 0.5 * histories[0][0]["loss"]
    assert histories[0][-1]["step"] == 150
    after = encoders[0].encode(torch.zeros(1, 2, 8), ["blue"])
    assert not torch.allclose(before, after)
    assert not any(parameter.requires_grad for parameter in encoders[0].parameters())
    assert not encoders[0].training

    # a linear layer tells the words apart, and says where there is none
    keys, bias = encoders[0].word_scores(["", "red", "square", "blue", "white", "circle"])
    latents = encoders[0].encode(torch.from_numpy(images[:2]).float(), ["red square", "blue"])
    assert (latents @ keys.T + bias).argmax(-1).tolist() == [[1, 1, 2, 2], [3, 3, 0, 0]]


def test_latents_without_a_word_count_a_tenth():
    encoder = new_encoder()
    latents = torch.zeros(1, 4, 96)
    loss, correct = spelling_loss(encoder, latents, encoder.tokenize(["blue"]))
    torch.testing.assert_close(loss.exp(), torch.tensor(257.0), rtol=0.3, atol=0)
    assert correct == 0


def test_pixels_are_an_option():
    encoder = new_encoder(image_input="pixels", image_size=64, patch_size=32)
    images = np.zeros((3, 3, 64, 64), np.float32)
    history = train_value_encoder(encoder, images, CAPTIONS, ValueEncoderTrainingConfig(steps=2, batch_size=2))
    assert len(history) == 1
    assert encoder.encode(torch.zeros(2, 3, 64, 64), CAPTIONS[:2]).shape == (2, 4, 96)


def test_sampler():
    sampler = CaptionSampler(CAPTIONS, 1.0, seed=0)
    samples = sampler.sample(200, 3)
    assert set(CAPTIONS) <= set(samples)
    assert max(len(sample.split()) for sample in samples) == 3
    assert samples == CaptionSampler(CAPTIONS, 1.0, seed=0).sample(200, 3)


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (3, [], "Found 0 captions and none with a word"),
        (3, ["", " "], "Found 2 captions and none with a word"),
        (3, ["blue", None], r"Caption 1 \(the first is 0\) is None, expected text"),
        (3, [7], "Caption 0 .* is 7, expected text"),
        (0, CAPTIONS, "Found 0 images"),
    ],
)
def test_bad_input(images, captions, message):
    with pytest.raises(ValueError, match=message):
        train_value_encoder(new_encoder(), np.zeros((images, 2, 8), np.float16), captions)


def test_training_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """From its last 50 steps, to the weights of a training that was not."""
    images = np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float16)
    settings = ValueEncoderTrainingConfig(steps=120, batch_size=4)
    whole, stopped, again = new_encoder(), new_encoder(), new_encoder()
    history = train_value_encoder(whole, images, CAPTIONS, settings)
    take_step = value_encoder_training.take_step
    steps = iter(range(1, 1000))

    def interrupted(*arguments):
        if next(steps) == 77:
            raise KeyboardInterrupt
        return take_step(*arguments)

    checkpoint = tmp_path / "training.pt"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as interrupt:
        patch.setattr(value_encoder_training, "take_step", interrupted)
        train_value_encoder(stopped, images, CAPTIONS, settings, checkpoint)
    assert str(interrupt.value) == (
        "stopped at step 77 of 120 of the value encoder; the same command goes on from step 50"
    )
    assert train_value_encoder(again, images, CAPTIONS, settings, checkpoint) == history
    assert capsys.readouterr().out == "The value encoder goes on from step 50.\n"
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())
