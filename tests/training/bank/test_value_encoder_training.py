"""The value encoder learns to say what a picture shows."""

import numpy as np
import pytest
import torch

from tinyalign_vlm import ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.training.bank import value_encoder_training
from tinyalign_vlm.training.bank.value_encoder_training import (
    ValueEncoderTrainingConfig,
    picture_cells,
    train_value_encoder,
)

CAPTIONS = ["red square", "blue", "white circle", "red circle", "nothing"]


def new_encoder(**sizes):
    torch.manual_seed(0)
    sizes = {"num_latents": 4, "num_self_attends_per_block": 1, "vision_feature_size": 8, **sizes}
    return ValueEncoder(ValueEncoderConfig(**{"num_vision_tokens": 4, **sizes}))


def pictures(n: int = 5, tokens: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, tokens, 8)).astype(np.float16)


def test_training_teaches_the_picture_and_is_repeatable():
    images, settings = pictures(), ValueEncoderTrainingConfig(steps=150, batch_size=16)
    encoders = [new_encoder(), new_encoder()]
    before = encoders[0].encode(torch.zeros(1, 4, 8), ["blue"])
    histories = [train_value_encoder(encoder, images, CAPTIONS, settings) for encoder in encoders]
    assert histories[0] == histories[1]
    assert histories[0][-1]["step"] == 150 and histories[0][-1]["loss"] < 0.3 * histories[0][0]["loss"]
    after = encoders[0].encode(torch.zeros(1, 4, 8), ["blue"])
    assert not torch.allclose(before, after)
    assert not any(parameter.requires_grad for parameter in encoders[0].parameters())
    assert not encoders[0].training


def test_cells_are_as_many_as_latents_can_say():
    features = torch.arange(16.0).reshape(1, 16, 1)
    assert picture_cells(features, 4)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert picture_cells(features, 32).equal(features)  # no more than the tower has
    assert picture_cells(features, 3)[0, :, 0].tolist() == [7.5]
    assert picture_cells(features[:, :15], 9)[0, :, 0].tolist() == [7.0]  # no square


def test_training_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """From its last 50 steps, to the weights of a training that was not."""
    images, settings = pictures(), ValueEncoderTrainingConfig(steps=120, batch_size=4)
    whole, stopped, again = new_encoder(), new_encoder(), new_encoder()
    history = train_value_encoder(whole, images, CAPTIONS, settings)
    calls = iter(range(1, 1000))

    def interrupted(*arguments):
        if next(calls) == 1 + 77:  # one for the mean of all pictures
            raise KeyboardInterrupt
        return picture_cells(*arguments)

    checkpoint = tmp_path / "training.pt"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as interrupt:
        patch.setattr(value_encoder_training, "picture_cells", interrupted)
        train_value_encoder(stopped, images, CAPTIONS, settings, checkpoint)
    assert str(interrupt.value) == (
        "stopped at step 77 of 120 of the value encoder; the same command goes on from step 50"
    )
    assert train_value_encoder(again, images, CAPTIONS, settings, checkpoint) == history
    assert capsys.readouterr().out == "The value encoder goes on from step 50.\n"
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())
