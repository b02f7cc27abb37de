"""The engine: `MemoryBank.build` with what the travelling half has no part in."""

import weakref

import datasets
import numpy as np
import pytest
import torch
from banks import noise

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.bank.build import build_bank, fit_whitening, mean_and_sample
from tinyalign_vlm.training.bank.value_encoder_training import ValueEncoderTrainingConfig, train_new_value_encoder
from tinyalign_vlm.training.data.images import DatasetImages

SHORT = ValueEncoderTrainingConfig(steps=3, batch_size=2)


@pytest.fixture(scope="module")
def pairs(images, captions) -> list[dict]:
    return [{"image": image, "caption": caption} for image, caption in zip(images, captions, strict=True)]


def test_a_value_encoder_is_trained_by_itself(pairs, model, processor, capsys):
    state = torch.get_rng_state()
    bank = MemoryBank.build(pairs, model, processor, value_encoder_training=SHORT)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers were changed"
    assert (bank.config.num_latents, bank.config.latent_dim) == (model.config.memory_tokens, model.config.latent_dim)
    printed = capsys.readouterr().out
    assert "Training a value encoder on 12 images, 3 steps." in printed
    assert "The value encoder took" in printed
    again = MemoryBank.build(pairs, model, processor, value_encoder_training=SHORT)
    assert bank.config.sha256 == again.config.sha256
    assert bank.gather(np.arange(12)).equal(again.gather(np.arange(12)))


def test_known_features_train_it_as_well(pairs, model, processor, features):
    bank = MemoryBank.build(pairs, model, processor, value_encoder_training=SHORT)
    same = MemoryBank.build(pairs, model, processor, vision_features=features, value_encoder_training=SHORT)
    torch.testing.assert_close(bank.gather(np.arange(12)), same.gather(np.arange(12)), atol=2e-3, rtol=0)


def test_what_can_be_read_once_trains_nothing(pairs, model, processor, value_encoder):
    with pytest.raises(ValueError, match="The dataset is an iterator, which can be read only once"):
        build_bank(iter(pairs), model, processor)
    assert len(build_bank(iter(pairs), model, processor, value_encoder)) == 12
    with pytest.raises(ValueError, match=r"no usable row to train a value encoder on \(row 0: no caption"):
        build_bank([{**pairs[0], "caption": " "}], model, processor)


def test_parts_make_no_difference(pairs, model, processor, value_encoder, monkeypatch):
    expected = build_bank(pairs, model, processor, value_encoder, batch_size=2, whiten_dim=4)
    monkeypatch.setattr("tinyalign_vlm.training.bank.encode.PART_ROWS", 4)
    found = build_bank(pairs, model, processor, value_encoder, batch_size=2, whiten_dim=4)
    assert found.config.sha256 == expected.config.sha256


def test_whitening_is_of_a_sample_of_all_batches(monkeypatch, pairs, model, processor, value_encoder):
    monkeypatch.setattr("tinyalign_vlm.training.bank.build.MAX_WHITENING_ROWS", 6)
    bank = build_bank(pairs, model, processor, value_encoder)
    mean, sample = mean_and_sample(bank.batches(), 12)
    np.testing.assert_allclose(mean, bank.keys(np.arange(12)).astype(np.float64).mean(0), atol=1e-7)
    assert sample.shape[0] == 6 and fit_whitening(sample, mean, 5).shape == (sample.shape[1], 5)
    with pytest.raises(ValueError, match="whiten_dim is 6, but 6 rows .* at most 5 components"):
        fit_whitening(sample, mean, 6)


def test_adding_reads_captions_as_building_does(pairs, model, processor, value_encoder):
    """Lists as text, as Flickr30k has them; objects; and of several texts the first."""
    captions = ['["a dog", "a cat"]', {"raw": "a cow"}, ["", "an owl"]]
    rows = [{**pair, "caption": caption} for pair, caption in zip(pairs, captions, strict=False)]
    built = MemoryBank.build(rows, model, processor, value_encoder)
    added = built.add(rows, model, processor, keep_duplicates=True)
    assert built.table["caption"].to_pylist() == ["a dog", "a cow", "an owl"]
    assert added.table["caption"].to_pylist() == built.table["caption"].to_pylist() * 2


def test_classes_are_captions_by_their_names_and_a_list_of_one_image_is_that_image(
    pairs, model, processor, value_encoder
):
    features = {"image": datasets.List(datasets.Image()), "caption": datasets.ClassLabel(names=["cat", "dog"])}
    images = [pair["image"] for pair in pairs[:4]]
    rows = {"image": [[images[0]], [images[1]], images[2:4], []], "caption": [1, 0, 1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    bank = MemoryBank.build(dataset, model, processor, value_encoder, skip_bad_rows=True)
    assert bank.table["caption"].to_pylist() == ["dog", "cat"]
    reasons = [row.reason.partition(":")[0] for row in bank.left_out]
    assert reasons == ["several images", "missing image"]
    features = datasets.Features(features | {"image": datasets.Image()})
    pairs = datasets.Dataset.from_dict({"image": images[:3], "caption": [1, 0, None]}, features=features)
    added = bank.add(pairs, model, processor, keep_duplicates=True, skip_bad_rows=True)
    assert added.table["caption"].to_pylist()[2:] == ["dog", "cat"]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow"])
def test_kept_columns_are_text_whatever_the_format(kind, pairs, model, processor, value_encoder):
    rows = datasets.Dataset.from_list([{**row, "n": number} for number, row in enumerate(pairs)]).with_format(kind)
    bank = build_bank(rows, model, processor, value_encoder, keep_columns=["n"])
    assert [row["n"] for row in bank.rows([0, 1])] == ["0", "1"]


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_adding_keeps_columns_as_building_does(kind, pairs, model, processor, value_encoder):
    columns = {name: [pair[name] for pair in pairs[:3]] for name in ("image", "caption")} | {"license": [1, 0, 1]}
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    features |= {"license": datasets.ClassLabel(names=["cc0", "cc-by"])}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    bank = MemoryBank.build(rows, model, processor, value_encoder, keep_columns=["license"])
    for added in (rows.with_format(kind), rows.to_iterable_dataset()):
        larger = bank.add(added, model, processor, keep_duplicates=True)
        assert larger.table["license"].to_pylist() == ["cc-by", "cc0", "cc-by"] * 2


def test_pictures_of_a_stream_are_not_held(model, processor, value_encoder):
    alive, most = set(), [0]

    def stream():
        for number in range(80):
            image = noise(number)
            alive.add(number)
            weakref.finalize(image, alive.discard, number)
            most[0] = max(most[0], len(alive))
            yield {"image": image, "caption": "a"}
            del image

    build_bank(stream(), model, processor, value_encoder, batch_size=4)
    assert most[0] < 20


def test_few_pictures_are_in_memory_while_a_value_encoder_is_trained(model, processor):
    alive, most = set(), [0]

    class Counted(DatasetImages):
        def read(self, number, row):
            found = super().read(number, row)
            alive.add(number)
            weakref.finalize(found.image, alive.discard, number)
            most[0] = max(most[0], len(alive))
            return found

    source = Counted([{"image": noise(number), "caption": "a"} for number in range(60)], "image", "caption", ())
    train_new_value_encoder(model, processor, source, ValueEncoderTrainingConfig(steps=0), batch_size=4)
    assert most[0] <= 12
