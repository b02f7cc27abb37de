"""Neighbours that are not similar enough, the similarity as an input, and a bank that does not belong to the tower."""

import pytest
import torch
from banks import small_value_encoder

from tinyalign_vlm import (
    MemoryBank,
    TinyAlignConfig,
    TinyAlignForConditionalGeneration,
)
from tinyalign_vlm.training.models import widen_connector

CAPTIONS = ("red", "green", "blue", "white", "black", "yellow")
INPUTS = ("captions", "latents", "both")


def build_bank(model, processor, images) -> MemoryBank:
    encoder = small_value_encoder(model.config.vision_feature_size)
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, CAPTIONS, strict=True)]
    return MemoryBank.build(rows, model, processor, encoder)


@pytest.fixture(scope="module")
def bank(make_model, make_processor, images):
    model = make_model()
    return build_bank(model, make_processor(model), images)


@pytest.fixture
def start(make_model, make_processor, images):
    """`start(**config)` -> a model with a bank of its own, and inputs about three images."""

    def make(**config):
        model = make_model(**config)
        processor = make_processor(model)
        model.attach_memory_bank(build_bank(model, processor, images))
        inputs = processor(images=images[:3], text=["<image>\nwhat?"] * 3, return_tensors="pt")
        return model, dict(inputs)

    return make


def test_neighbours_below_the_threshold_are_not_used(start):
    model, inputs = start()
    everything = model.retrieve(inputs["pixel_values"])
    expected = model(**inputs).logits
    model.config.retrieval_threshold = -1.0
    torch.testing.assert_close(model(**inputs).logits, expected)
    # an image's own row is the only one that is this similar
    model.config.retrieval_threshold = 0.999
    found = model.retrieve(inputs["pixel_values"])
    assert found.ids[:, 0].equal(everything.ids[:, 0]) and (found.ids[:, 1] == -1).all()
    assert found.scores.equal(everything.scores) and found.captions == [["red"], ["green"], ["blue"]]
    thinned = model(**inputs).logits
    assert not torch.allclose(thinned, expected)
    torch.testing.assert_close(model(**inputs, memory_ids=found.ids).logits, thinned)
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert output["memory_ids"].equal(found.ids) and output["memory_scores"].equal(found.scores)
    model.config.retrieval_threshold = 1.1
    assert (model.retrieve(inputs["pixel_values"]).ids == -1).all()
    torch.testing.assert_close(model(**inputs).logits, model(**inputs, memory="off").logits)


def test_precomputed_neighbours_have_the_threshold_too(start):
    model, inputs = start(retrieval_threshold=0.999)
    bank = model.memory_bank
    found = model.retrieve(inputs["pixel_values"], top_k=2)
    scores, ids = bank.search(bank.encode_queries(model.get_vision_features(inputs["pixel_values"])), 2)
    expected = model(**inputs).logits
    for given in (
        {"memory_ids": ids, "memory_scores": scores},
        {"memory_ids": ids.tolist(), "memory_scores": scores.tolist()},
        {"memory_ids": ids, "memory_scores": scores, "memory_values": bank.gather(ids)},
        {"memory_scores": scores, "memory_values": bank.gather(ids)},
    ):
        torch.testing.assert_close(model(**inputs, **given).logits, expected)
    assert not torch.allclose(model(**inputs, memory_ids=ids).logits, expected)  # without scores: as they are
    assert found.ids.equal(torch.where(scores >= 0.999, ids, -1))


@pytest.mark.parametrize("memory_input", INPUTS)
def test_the_connector_is_told_the_similarity(memory_input, start, tmp_path):
    model, inputs = start(memory_scores=True, memory_input=memory_input)
    bank = model.memory_bank
    scores, ids = bank.search(bank.encode_queries(model.get_vision_features(inputs["pixel_values"])), 2)
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, memory_ids=ids, memory_scores=scores).logits, expected)
    other = model(**inputs, memory_ids=ids, memory_scores=scores - 0.5).logits
    assert not torch.allclose(other, expected)
    with pytest.raises(ValueError, match="Pass memory_scores"):
        model(**inputs, memory_ids=ids)
    off = model(**inputs, memory="off").logits
    empty = {"memory_ids": torch.full_like(ids, -1), "memory_scores": scores}
    torch.testing.assert_close(model(**inputs, **empty).logits, off)  # of an empty slot there is none
    model.save_pretrained(tmp_path)
    again = TinyAlignForConditionalGeneration.from_pretrained(tmp_path)
    again.attach_memory_bank(bank, tokenizer=model.caption_tokenizer.tokenizer)
    torch.testing.assert_close(again(**inputs).logits, expected)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.model.memory_connector.parameters())


@pytest.mark.parametrize("memory_input", INPUTS)
def test_a_wider_connector_has_the_added_parameters(memory_input, start):
    model, inputs = start(memory_input=memory_input)

    def connector_parameters() -> int:
        return sum(tensor.numel() for name, tensor in model.named_parameters() if "connector." in name)

    before = connector_parameters()
    widen_connector(model)
    config = model.config
    assert abs(connector_parameters() - before) <= config.vision_feature_size + 1 + config.text_config.hidden_size
    assert config.connector_size > config.text_config.hidden_size and config.memory_top_k == 0
    assert model.get_image_features(inputs["pixel_values"]).pooler_output[0].shape == (16, 32)


def test_a_wider_connector_is_saved(start, tmp_path):
    model, inputs = start()
    widen_connector(model)
    model.save_pretrained(tmp_path)
    again = TinyAlignForConditionalGeneration.from_pretrained(tmp_path)
    tokens = [one.get_image_features(inputs["pixel_values"]).pooler_output[0] for one in (model, again)]
    torch.testing.assert_close(*tokens)


def test_text_only_retrieval_needs_no_memory_tokens(start):
    model, inputs = start(memory_top_k=0, prompt_captions=2)
    assert model.config.num_image_tokens == 16 and model.config.num_neighbours == 2
    assert [len(row) for row in model.retrieve(inputs["pixel_values"]).captions] == [2, 2, 2]
    with pytest.raises(ValueError, match="memory_top_k is 2 and prompt_captions 2"):
        TinyAlignConfig(vision_feature_size=16, memory_top_k=2, prompt_captions=2)


@pytest.mark.parametrize("tower", ["clip", "efficientnet"])
def test_a_bank_of_another_tower_can_be_forced(tower, make_model, make_processor, bank, images, tmp_path):
    """CLIP's features are as wide as SigLIP's here, EfficientNet's are not."""
    model = make_model(tower)
    with pytest.raises(ValueError, match="built with|built "):
        model.attach_memory_bank(bank)
    model.attach_memory_bank(bank, check_probes=False)
    inputs = make_processor(model, tower)(images=images[:2], text=["<image>\nwhat?"] * 2, return_tensors="pt")
    found = model.retrieve(inputs["pixel_values"])
    assert found.ids.shape == (2, 2) and (found.ids >= 0).all()
    assert model(**inputs).logits.isfinite().all()
    rows = [{"image": images[0], "caption": "red"}]
    with pytest.raises(ValueError, match="built "):  # but nothing of another tower is added to it
        model.memory_bank.add(rows, model, make_processor(model, tower))
    bank.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="built "):
        model.attach_memory_bank(tmp_path)
    model.attach_memory_bank(tmp_path, check_probes=False)
