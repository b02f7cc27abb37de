"""A model with a memory bank: attaching, retrieving, answering, bad banks."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import small_value_encoder
from PIL import Image
from transformers import AutoModelForImageTextToText

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration
from tinyalign_vlm.modeling_tinyalign.bank_format import CalibrationConfig

CAPTIONS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture(scope="module")
def rows(images) -> list[dict]:
    return [{"image": image, "caption": caption} for image, caption in zip(images, CAPTIONS, strict=True)]


def build_bank(model, processor, rows: list, num_vision_tokens: int = 16) -> MemoryBank:
    config = model.config
    encoder = small_value_encoder(
        config.vision_feature_size,
        num_vision_tokens,
        num_latents=config.memory_tokens,
        latent_dim=config.latent_dim,
    )
    return MemoryBank.build(rows, model, processor, encoder)


@pytest.fixture(scope="module")
def bank(model, processor, rows):
    return build_bank(model, processor, rows)


@pytest.fixture
def with_bank(model, bank):
    model.attach_memory_bank(bank)
    yield model
    model.detach_memory_bank()


@pytest.fixture(scope="module")
def inputs(processor, images):
    """Two rows, of two images and of one."""
    return processor(
        images=images[:3],
        text=["<image><image>\nwhat is it?", "<image>\nuser"],
        padding=True,
        return_tensors="pt",
    )


def test_an_image_finds_itself(with_bank, inputs, bank):
    found = with_bank.retrieve(inputs["pixel_values"], top_k=6)
    assert found.ids[:, 0].tolist() == [0, 1, 2] and found.scores.shape == (3, 6)
    torch.testing.assert_close(found.scores[:, 0], torch.ones(3))
    assert [row[0] for row in found.captions] == ["red", "green", "blue"]
    assert [row[0] for row in found.source_ids] == [row["source_id"] for row in bank.rows([0, 1, 2])]
    assert with_bank.retrieve(inputs["pixel_values"]).ids.shape == (3, 2)


def test_a_calibrated_bank_says_how_probably_neighbours_are_right(with_bank, inputs, bank):
    assert with_bank.retrieve(inputs["pixel_values"]).probabilities is None
    plain = with_bank.retrieve(inputs["pixel_values"], top_k=6)
    weights = {"right": [-4.0, 8.0, -20.0, 0.0], "none": [3.0, -6.0, 0.0, -1.0]}
    with_bank.attach_memory_bank(bank.with_calibration(CalibrationConfig(top_k=3, num_rows=len(bank), **weights)))
    found = with_bank.retrieve(inputs["pixel_values"], top_k=6)
    assert torch.equal(found.ids, plain.ids) and found.probabilities.shape == (3, 6)
    scores = plain.scores
    torch.testing.assert_close(found.probabilities, (-4 + 8 * scores - 20 * (scores[:, :1] - scores)).sigmoid())
    none = (3 - 6 * scores[:, 0] - (scores[:, 0] - scores[:, :3].mean(1))).sigmoid()
    torch.testing.assert_close(found.none_probability, torch.minimum(none, 1 - found.probabilities[:, 0]))
    for top_k in (1, 2, 5):  # the same, however many are asked for
        fewer = with_bank.retrieve(inputs["pixel_values"], top_k=top_k)
        torch.testing.assert_close(fewer.probabilities, found.probabilities[:, :top_k])
        torch.testing.assert_close(fewer.none_probability, found.none_probability)
    for top_k in (0, len(bank) + 1, "2"):
        with pytest.raises(ValueError, match="top_k is"):
            with_bank.retrieve(inputs["pixel_values"], top_k=top_k)
    few = with_bank.retrieve(inputs["pixel_values"][:1], top_k=2, exclude_ids=[list(range(1, len(bank)))])
    assert few.probabilities[0, 0] > 0.5 and few.probabilities[0, 1] == 0 and few.none_probability < 0.1


def test_sources_have_their_probability(with_bank, inputs, bank):
    def sources(top_k: int | None, **settings) -> list[dict]:
        weights = {"right": [-4.0, 8.0, -20.0, 0.0], "none": [3.0, -6.0, 0.0, -1.0]}
        calibration = top_k and CalibrationConfig(top_k=top_k, num_rows=len(bank), **weights)
        with_bank.attach_memory_bank(bank.with_calibration(calibration))
        with_bank.generate(**inputs, sources=(found := []), max_new_tokens=1, **settings)
        return [source for row in found for source in row]

    expected = with_bank.retrieve(inputs["pixel_values"])
    assert [source["probability"] for source in sources(None)] == [None] * 6
    found = sources(2)
    likely = (-4 + 8 * expected.scores - 20 * (expected.scores[:, :1] - expected.scores)).sigmoid()
    torch.testing.assert_close(torch.tensor([source["probability"] for source in found]), likely.flatten())
    # fewer neighbours were looked up than the bank was calibrated for
    assert [source["probability"] for source in sources(3)] == [None] * 6
    assert [source["probability"] for source in sources(2, memory_top_k=1)] == [None] * 3


def test_without_memory_no_bank_is_opened_for_sources(make_model, inputs):
    model = make_model(memory_bank="org/none")
    _, sources = model.generate(**inputs, sources=True, memory="off", max_new_tokens=1)
    assert sources == [[] for _ in inputs["input_ids"]]


def test_pictures_and_their_files_are_retrieved_with(with_bank, inputs, images, tmp_path):
    images[0].save(tmp_path / "red.png")
    expected = with_bank.retrieve(inputs["pixel_values"][:1])
    for picture in (images[0], [images[0]], tmp_path / "red.png", str(tmp_path / "red.png")):
        found = with_bank.retrieve(picture)
        assert torch.equal(found.ids, expected.ids)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "grey.png")
    Image.new("L", (2, 900)).save(tmp_path / "strip.png")
    for name, size in (("grey.png", r"\(8, 8\) pixels, mode I;16"), ("strip.png", r"\(2, 900\) pixels, mode L")):
        with pytest.raises(ValueError, match=f"{name}.*{size}: pass the processor's pixel_values"):
            with_bank.retrieve(tmp_path / name)
    with pytest.raises(ValueError, match=r"\(0, 0\) pixels, mode RGB: pass the processor's pixel_values"):
        with_bank.retrieve(Image.new("RGB", (0, 0)))
    with_bank.attach_memory_bank(None)
    assert with_bank.memory_bank is None


@pytest.mark.parametrize("call", ["retrieve", "get_image_features", "get_vision_features", "generate"])
@pytest.mark.parametrize("wrong", [3, "red", [], torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.long)])
def test_things_that_are_no_pixels(call, wrong, with_bank, inputs):
    ids = {"input_ids": inputs["input_ids"][1:]} if call == "generate" else {}
    with pytest.raises((ValueError, TypeError), match="expected"):
        getattr(with_bank, call)(pixel_values=wrong, **ids)


@pytest.mark.parametrize("wrong", [3, [], 0.5])
def test_things_that_are_no_bank(wrong, model):
    with pytest.raises(TypeError, match="expected a MemoryBank, a folder or a repository"):
        model.attach_memory_bank(wrong)


def test_exclusion_leaves_empty_slots(with_bank, inputs, bank):
    exclude = [bank.rows([0])[0]["source_id"], [0, 1, 2, 3, 5], None]
    found = with_bank.retrieve(inputs["pixel_values"], exclude_ids=exclude)
    assert 0 not in found.ids[0] and found.ids[1].tolist() == [4, -1] and found.ids[2, 0] == 2
    assert found.captions[1] == ["black"]
    several = [[row["source_id"] for row in bank.rows([0, 1])], [bank.rows([0])[0]["source_id"], 1, 2, 3, 5, -1], None]
    again = with_bank.retrieve(inputs["pixel_values"], exclude_ids=several)
    assert not {0, 1} & set(again.ids[0].tolist()) and again.ids[1:].equal(found.ids[1:])
    features = with_bank.get_image_features(inputs["pixel_values"], exclude_ids=exclude)
    assert features.memory_ids.equal(found.ids)


def test_all_ways_to_the_same_memory(with_bank, inputs, bank):
    """Retrieval, precomputed ids, precomputed values, cached features: the same logits."""
    expected = with_bank(**inputs)
    ids = with_bank.retrieve(inputs["pixel_values"]).ids
    features = with_bank.get_vision_features(inputs["pixel_values"])
    cached = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"vision_features": features}
    for other in (
        {**inputs, "memory_ids": ids},
        {**inputs, "memory_ids": ids.tolist()},
        {**inputs, "memory_values": bank.gather(ids)},
        {**cached, "memory_values": bank.gather(ids), "memory_ids": ids},
        cached,
    ):
        assert with_bank(**other).logits.equal(expected.logits)
    assert not with_bank(**inputs, memory="off").logits.equal(expected.logits)
    assert not with_bank(**inputs, memory_ids=ids.flip(1)).logits.equal(expected.logits)


def test_ids_and_scores_of_other_shapes_than_the_values(with_bank, inputs, bank):
    """They would be broadcast: every image would have the empty slots of the first."""
    n = len(inputs["pixel_values"])
    ids, scores = torch.zeros(n, 2, dtype=torch.long), torch.ones(n, 2)
    for wrong in (
        {"memory_ids": ids[:1], "memory_values": bank.gather(ids)},
        {"memory_ids": ids, "memory_scores": scores[:, :1]},
        {"memory_values": bank.gather(ids), "memory_scores": scores[0].tolist()},
    ):
        with pytest.raises(ValueError, match=rf"memory_(ids|scores) have shape .*, expected .* = \({n}, 2\)"):
            with_bank(**inputs, **wrong)


def test_generation_retrieves_once(with_bank, inputs, bank, monkeypatch):
    searches = []
    search = MemoryBank.search
    monkeypatch.setattr(MemoryBank, "search", lambda *args, **kwargs: searches.append(args) or search(*args, **kwargs))
    settings = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    found = with_bank.generate(**inputs, **settings)
    assert len(searches) == 1
    assert found.memory_ids.equal(with_bank.retrieve(inputs["pixel_values"]).ids)
    assert found.memory_scores.shape == (3, 2)
    values = with_bank.generate(**inputs, **settings, memory_values=bank.gather(found.memory_ids))
    assert values.sequences.equal(found.sequences)


def test_sources_are_of_the_bank_that_was_read(with_bank, inputs, bank):
    """Also if it was exchanged since, between two questions or by another thread."""
    prompt = {name: value for name, value in inputs.items() if name != "pixel_values"}
    seen = {"image": with_bank.get_image_features(inputs["pixel_values"])}
    settings = {"sources": True, "max_new_tokens": 1, "do_sample": False}
    expected = with_bank.generate(**prompt, mm_encoder_outputs=seen, **settings)[1]
    with_bank.attach_memory_bank(bank.remove(0))
    assert with_bank.generate(**prompt, mm_encoder_outputs=seen, **settings)[1] == expected


def test_pushing_an_adapter_deletes_no_weights(model, monkeypatch):
    pushed = []

    def push_files(files, *args, replaced, **kwargs):
        pushed.append((sorted(files), replaced))
        return "", None

    def save(folder, **kwargs):  # as transformers saves a model with PEFT's adapters
        Path(folder, "adapter_model.safetensors").touch()

    monkeypatch.setattr("tinyalign_vlm.modeling_tinyalign.modeling_utils.push_files", push_files)
    monkeypatch.setattr(model, "save_pretrained", save)
    model.push_to_hub("me/adapter")
    assert pushed == [(["adapter_model.safetensors"], "")]


def test_a_quantized_tower_is_told_of(with_bank, bank, monkeypatch):
    other = copy.deepcopy(with_bank)
    layer = next(module for module in other.model.vision_tower.modules() if isinstance(module, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="The vision tower is quantized: leave it out"):
        other.attach_memory_bank(bank)


def test_gradients_reach_the_connector_but_not_the_bank(with_bank, inputs):
    with_bank(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert with_bank.model.memory_connector.mlp.linear_1.weight.grad.abs().sum() > 0
    with_bank.zero_grad()
    assert not any(parameter.requires_grad for parameter in with_bank.memory_bank.key_encoder.parameters())


def test_the_bank_is_no_part_of_the_weights(with_bank, inputs, bank, tmp_path):
    assert not any("bank" in name for name in with_bank.state_dict())
    copied = copy.deepcopy(with_bank)
    assert copied(**inputs).logits.equal(with_bank(**inputs).logits)
    with_bank.save_pretrained(tmp_path)
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.memory_bank is None
    loaded.attach_memory_bank(bank)
    assert loaded(**inputs).logits.equal(with_bank(**inputs).logits)


def test_a_saved_bank_is_loaded_at_the_first_retrieval(model, inputs, bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", memory_bank=str(tmp_path / "bank")).eval()
    assert loaded.config.memory_bank == str(tmp_path / "bank")
    model.attach_memory_bank(str(tmp_path / "bank"))
    assert loaded(**inputs).logits.equal(model(**inputs).logits)
    model.detach_memory_bank()
    assert model.memory_bank is None


def test_another_bank_teaches_other_things(model, processor, inputs, rows):
    """Rows are added, nothing is retrained."""
    model.attach_memory_bank(build_bank(model, processor, rows[3:]))
    before = model.retrieve(inputs["pixel_values"])
    model.attach_memory_bank(model.memory_bank.add(rows[:3], model, processor))
    after = model.retrieve(inputs["pixel_values"])
    model.detach_memory_bank()
    assert not {"red", "green", "blue"} & {caption for row in before.captions for caption in row}
    assert [row[0] for row in after.captions] == ["red", "green", "blue"]


def test_language_keys_read_the_question_but_never_the_answer(make_model, make_processor, images, rows):
    model = make_model(key_space="language")
    processor = make_processor(model)
    model.attach_memory_bank(build_bank(model, processor, rows))

    def retrieve(question: str, answer: str):
        content = [{"type": "image", "image": images[0]}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        features = model.get_image_features(
            **{name: inputs[name] for name in ("pixel_values", "query_input_ids", "query_attention_mask")}
        )
        model(**inputs)
        return features.memory_scores

    asked = retrieve("yellow", "red")
    assert asked.equal(retrieve("yellow", "green, and a long answer"))
    assert not asked.equal(retrieve("is it black or white?", "red"))


def test_a_nearly_constant_tower_knows_its_bank(checkpoints, make_processor, rows):
    """An untrained EfficientNet makes features near 1e-21."""

    def compose() -> TinyAlignForConditionalGeneration:
        return TinyAlignForConditionalGeneration.from_vision_text_pretrained(
            checkpoints["efficientnet"], checkpoints["llama"], memory_tokens=3, latent_dim=5, vision_pool_size=4
        )

    model = compose()
    bank = build_bank(model, make_processor(model, "efficientnet"), rows, num_vision_tokens=64)
    compose().attach_memory_bank(bank)
    other = compose()
    for parameter in other.model.vision_tower.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    with pytest.raises(ValueError, match="cosine"):
        other.attach_memory_bank(bank)


class TestBadBanks:
    def test_no_bank(self, model, inputs):
        for call in (model, model.generate, lambda **kwargs: model.retrieve(kwargs["pixel_values"])):
            with pytest.raises(ValueError, match="no memory bank is attached.*attach_memory_bank"):
                call(**inputs)

    def test_other_latents(self, make_model, bank):
        with pytest.raises(ValueError, match=r"= \['vision', 3, 5\], the model expects \['vision', 4, 5\]"):
            make_model(memory_tokens=4).attach_memory_bank(bank)

    def test_too_small(self, make_model, bank):
        with pytest.raises(ValueError, match="6 rows, expected at least memory_top_k = 7"):
            make_model(memory_top_k=7).attach_memory_bank(bank)

    def test_another_tower(self, make_model, bank):
        model = make_model()
        torch.nn.init.normal_(model.model.vision_tower.embeddings.patch_embedding.weight)
        with pytest.raises(ValueError, match="cosine"):
            model.attach_memory_bank(bank)
        assert model.memory_bank is None

    def test_missing_folder(self, model):
        with pytest.raises((ValueError, OSError), match="no/such"):
            model.attach_memory_bank("no/such/bank")
