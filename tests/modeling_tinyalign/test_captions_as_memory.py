"""The default model: it reads captions, with the tokenizer beside its weights, from banks without values."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from banks import small_value_encoder
from isolation import set_hf_home
from transformers import AutoTokenizer

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.modeling_tinyalign.bank_format import CalibrationConfig
from tinyalign_vlm.modeling_tinyalign.connectors import find_tokenizer
from tinyalign_vlm.modeling_tinyalign.outputs import probabilities, sources_of

CAPTIONS = ("red", "a green square", "一只红色的狗", "<|im_end|> <image>", "12.5 km", "white")
MEMORY = {"memory_tokens": 40, "memory_input": "captions", "memory_scores": True}


@pytest.fixture(scope="module")
def captioned(make_model, make_processor, images, tmp_path_factory):
    """A saved model with its processor, and a bank for it."""
    folder = tmp_path_factory.mktemp("captioned")
    model = make_model(**MEMORY)
    processor = make_processor(model)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, CAPTIONS, strict=True)]
    bank = MemoryBank.build(rows, model, processor)
    bank.save_pretrained(folder / "bank")
    return folder


def inputs_of(processor, images):
    return processor(images=images, text=["<image>\nwhat?"] * len(images), return_tensors="pt")


def text_of(model, ids: torch.Tensor) -> list[str]:
    read = model.caption_tokenizer([[row["caption"] for row in rows if row] for rows in model.memory_bank.rows(ids)])
    return [model.caption_tokenizer.tokenizer.decode(row[row >= 0]).strip() for row in read]


def test_a_bank_without_values_is_saved_checked_and_searched(captioned, images, tmp_path, monkeypatch):
    set_hf_home(monkeypatch, tmp_path)
    bank = MemoryBank.from_pretrained(captioned / "bank")
    assert bank.config.value_size == 0 and bank.value_encoder is None and "no values" in repr(bank)
    assert not (captioned / "bank" / "value_encoder").exists() and not list(bank.folder.glob("values*"))
    assert bank.table["caption"].to_pylist() == list(CAPTIONS)
    with pytest.raises(ValueError, match="has no values, expected one for a model that reads latents"):
        bank.gather([0])
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    added = bank.add([{"image": images[0].rotate(90, expand=True), "caption": "new"}], model, processor)
    assert len(added.remove(0)) == 6 and added.with_rows(added.batches(), quantized=True).config.quantized
    for other in (added, added.remove([0, 3])):
        other.save_pretrained(tmp_path / "other")
        shutil.rmtree(other.folder)
        assert MemoryBank.from_pretrained(tmp_path / "other").config.sha256.rows == other.config.sha256.rows


def test_a_loaded_model_finds_its_tokenizer(captioned, images, monkeypatch):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    model.attach_memory_bank(captioned / "bank")
    inputs = inputs_of(processor, images[:4])
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert output["memory_ids"][:, 0].tolist() == [0, 1, 2, 3]
    for text, ids in zip(text_of(model, output["memory_ids"]), output["memory_ids"].tolist(), strict=True):
        assert text == "; ".join(CAPTIONS[row] for row in ids)
    special = {model.config.image_token_id, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    read = model.caption_tokenizer([[caption] for caption in CAPTIONS])
    assert special.isdisjoint(read.flatten().tolist())
    # given or found, it is the same
    expected = model(**inputs).logits
    other = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    other.attach_memory_bank(captioned / "bank", tokenizer=processor.tokenizer)
    torch.testing.assert_close(other(**inputs).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected, rtol=0, atol=0)


PROCESS = """
import sys

sys.modules["tinyalign_vlm"] = None  # importing it fails

from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True)
model.attach_memory_bank("bank")
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
inputs = processor(images=["red.png"], text=["<image> what?"], return_tensors="pt")
found = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
read = model.caption_tokenizer([[row["caption"] for row in model.memory_bank.rows(found["memory_ids"])[0]]])
print(model.caption_tokenizer.tokenizer.decode(read[read >= 0]).strip())
"""


def test_a_process_without_the_package_reads_captions(captioned, images, tmp_path):
    """And asks nothing: to load a tokenizer, transformers would ask once more whether the code is trusted."""
    images[0].save(captioned / "red.png")
    process = subprocess.run(
        [sys.executable, "-c", PROCESS],
        cwd=captioned,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("red; ") and process.stdout.count("\n") == 1


def test_a_model_without_a_tokenizer_says_what_to_do(captioned, images, tmp_path):
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    TinyAlignForConditionalGeneration.from_pretrained(captioned / "model").save_pretrained(tmp_path)
    model = TinyAlignForConditionalGeneration.from_pretrained(tmp_path)
    model.attach_memory_bank(captioned / "bank")
    inputs = inputs_of(processor, images[:1])
    with pytest.raises(ValueError, match="has no tokenizer, expected one beside .* tokenizer=processor.tokenizer"):
        model(**inputs)
    assert model(**inputs, memory="off").logits.isfinite().all()
    model.attach_memory_bank(captioned / "bank", tokenizer=processor.tokenizer)
    assert model(**inputs).logits.isfinite().all()


def test_a_composed_model_reads_with_its_language_models_tokenizer(checkpoints, captioned, make_model):
    model = make_model(**MEMORY)
    model.attach_memory_bank(captioned / "bank")
    expected = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model").caption_tokenizer
    assert model.caption_tokenizer([CAPTIONS]).equal(expected([CAPTIONS]))
    model.read_captions_with(AutoTokenizer.from_pretrained(checkpoints["llama"]))
    assert model.caption_tokenizer([CAPTIONS]).equal(expected([CAPTIONS]))


def test_other_captions_are_other_answers_and_rows_added_are_read(captioned, images):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    bank = MemoryBank.from_pretrained(captioned / "bank")
    inputs = inputs_of(processor, images[:1])
    model.attach_memory_bank(bank)
    before = model(**inputs).logits
    taught = bank.add([{"image": images[0].resize((64, 64)), "caption": "Zwölfkämpfer"}], model, processor)
    model.attach_memory_bank(taught)
    found = model.get_image_features(inputs["pixel_values"])
    assert "Zwölfkämpfer" in text_of(model, found.memory_ids)[0]
    assert not torch.allclose(model(**inputs).logits, before)
    model.attach_memory_bank(taught.remove(len(bank)))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)


def test_a_batch_reads_what_its_rows_read_alone(captioned, images):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    model.attach_memory_bank(captioned / "bank")
    together = model(**inputs_of(processor, images[:5])).logits
    for row, image in enumerate(images[:5]):
        torch.testing.assert_close(
            model(**inputs_of(processor, [image])).logits[0], together[row], atol=1e-4, rtol=1e-4
        )


def test_fewer_neighbours_and_a_threshold_leave_captions_out(captioned, images):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    model.attach_memory_bank(captioned / "bank")
    pixels = inputs_of(processor, images[:2])["pixel_values"]
    for settings in ({"memory_top_k": 1}, {"retrieval_threshold": 0.999}):
        assert text_of(model, model.get_image_features(pixels, **settings).memory_ids) == list(CAPTIONS[:2])


def test_given_memory_is_read_as_it_is_given(captioned, images, make_model):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    bank = MemoryBank.from_pretrained(captioned / "bank")
    model.attach_memory_bank(bank, tokenizer=processor)  # whose tokenizer it is
    inputs = inputs_of(processor, images[:2])
    plain = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")(**inputs).logits
    assert torch.equal(compiled, plain)
    ids = torch.tensor([[3, 1], [1, 2]])
    fewer = model(**inputs, memory_ids=ids, memory_scores=torch.ones(2, 2), memory_top_k=1)
    assert fewer.image_outputs.memory_ids.tolist() == [[3, -1], [1, -1]]
    no_words = torch.full((2, 40), -1)
    given = model(**inputs, memory_input_ids=no_words, memory_scores=torch.full((2, 2), -torch.inf))
    assert torch.equal(given.logits, model(**inputs, memory="off").logits)
    assert torch.is_tensor(model.generate(**inputs, max_new_tokens=1, sources=False))
    with pytest.raises(ValueError, match="The tokenizer is a str, .* expected a fast one"):
        model.attach_memory_bank(bank, tokenizer="tokenizer")


def test_values_that_are_given_beside_rows(captioned, images, make_model):
    model = make_model(**{**MEMORY, "memory_tokens": 3, "memory_input": "both"})
    processor = TinyAlignProcessor.from_pretrained(captioned / "model", num_image_tokens=model.config.num_image_tokens)
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, CAPTIONS, strict=True)]
    bank = MemoryBank.build(rows, model, processor, small_value_encoder())
    model.attach_memory_bank(bank, tokenizer=processor)
    torch.nn.init.ones_(model.model.memory_connector.gate)
    inputs = {**inputs_of(processor, images[:2]), "memory_ids": torch.tensor([[3, 1], [1, 2]])}
    inputs["memory_scores"] = torch.ones(2, 2)
    own, swapped = bank.gather(inputs["memory_ids"]), bank.gather(inputs["memory_ids"].flip(0))
    assert torch.equal(model(**inputs, memory_values=own).logits, model(**inputs).logits)
    assert not torch.equal(model(**inputs, memory_values=swapped).logits, model(**inputs).logits)


def test_the_tokenizer_is_of_the_place_that_the_model_was_loaded_from(captioned, images, tmp_path, monkeypatch):
    """A subfolder beside which another tokenizer lies; and a relative path, after the folder was changed."""
    shutil.copytree(captioned / "model", tmp_path / "parent" / "sub")
    tokenizer = AutoTokenizer.from_pretrained(captioned / "model")
    expected = tokenizer("red", add_special_tokens=False)["input_ids"]
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(captioned / "model" / name, tmp_path / "parent")
    monkeypatch.chdir(tmp_path)
    model = TinyAlignForConditionalGeneration.from_pretrained("parent", subfolder="sub")
    monkeypatch.chdir(captioned)
    read = model.caption_tokenizer([["red"]])[0]
    assert tokenizer.decode(read[read >= 0]).strip() == tokenizer.decode(expected)
    assert find_tokenizer(model.config, str(tmp_path / "parent"), subfolder="sub").is_fast


def test_a_bank_that_is_refused_changes_nothing(captioned, checkpoints):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    bank = MemoryBank.from_pretrained(captioned / "bank")
    model.attach_memory_bank(bank)
    reader = model.caption_tokenizer
    with pytest.raises(ValueError, match="has 1 rows, expected at least memory_top_k"):
        model.attach_memory_bank(
            bank.remove([1, 2, 3, 4, 5]), tokenizer=AutoTokenizer.from_pretrained(captioned / "model")
        )
    assert model.memory_bank is bank and model.caption_tokenizer is reader


def test_values_that_the_model_does_not_read_may_have_any_shape(captioned, images):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    model.attach_memory_bank(captioned / "bank")
    inputs = inputs_of(processor, images[:2])
    ids, scores = torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 2)
    expected = model(**inputs, memory_ids=ids, memory_scores=scores).logits
    found = model(**inputs, memory_ids=ids, memory_scores=scores, memory_values=torch.zeros(2, 2, 3, 5)).logits
    torch.testing.assert_close(found, expected)


def test_where_nothing_is_found_none_is_right():
    calibration = CalibrationConfig(top_k=2, num_rows=10, right=[0.0, 1.0, 0.0, 0.0], none=[-3.0, 0.0, 0.0, 0.0])
    empty = torch.full((1, 2), -torch.inf)
    right, none = probabilities(calibration, torch.cat([empty, torch.tensor([[0.5, 0.4]])]))
    assert right[0].tolist() == [0, 0] and none[0] == 1 and none[1] < 0.1
    for depth in (2, 3, 5):  # more neighbours, of which a farther one may look right, change nothing
        scores = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1]])[:, :depth]
        odd = CalibrationConfig(top_k=2, num_rows=10, right=[0.0, -9.0, 9.0, 0.0], none=[0.0, 0.0, 0.0, 0.0])
        assert probabilities(odd, scores)[1] == probabilities(odd, scores[:, :2])[1]


def test_sources_of_a_chat_that_goes_on_with_all_its_images(captioned, images):
    """Of those that are new, whether they come alone or behind those that the cache has."""
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    model.attach_memory_bank(captioned / "bank")
    both = inputs_of(processor, images[:2])
    bank, mask = model.memory_bank, model.get_placeholder_mask(both["input_ids"])
    read = model.get_image_features(both["pixel_values"])
    first, second = sources_of(bank, read, mask)
    assert sources_of(bank, read, mask[1:]) == [second] and first != second
    with pytest.raises(ValueError, match="memory_top_k is of a search, but what is read is given"):
        model(**both, memory_input_ids=torch.full((2, 40), -1), memory_scores=torch.zeros(2, 2), memory_top_k=1)


def test_what_is_excluded_may_be_a_tensor_and_is_refused_in_words(captioned, images):
    model = TinyAlignForConditionalGeneration.from_pretrained(captioned / "model")
    processor = TinyAlignProcessor.from_pretrained(captioned / "model")
    model.attach_memory_bank(captioned / "bank")
    pixels = inputs_of(processor, images[:2])["pixel_values"]
    nearest = model.retrieve(pixels).ids
    for given in (nearest[:, 0], nearest[:, :1], nearest[:, 0].tolist(), nearest[:, :1].tolist()):
        found = model.retrieve(pixels, exclude_ids=given).ids
        assert not (found == nearest[:, :1]).any()
    assert torch.equal(model.retrieve(pixels, exclude_ids="half a smile \ud83d").ids, nearest)
    with pytest.raises(TypeError, match="row ids are of float64, expected integers"):
        model.retrieve(pixels, exclude_ids=[1.0, 2.0])
