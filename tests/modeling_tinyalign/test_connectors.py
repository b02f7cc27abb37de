"""The memory connector: captions, latents or both, similarities, and slots in which nothing stands."""

import copy
import math

import numpy as np
import pytest
import torch
from tokenizer_families import FAMILIES, build

from tinyalign_vlm.modeling_tinyalign.connectors import CaptionTokenizer, check_vocabulary, for_each, goes_on, shares

INPUTS = ("captions", "latents", "both")


@pytest.fixture(params=INPUTS)
def model(make_model, request):
    return make_model(memory_input=request.param, memory_scores=True)


def memory_of(model, n: int = 2, seed: int = 0) -> dict:
    generator, config = torch.Generator().manual_seed(seed), model.config
    memory = {"memory_scores": torch.rand(n, config.memory_top_k, generator=generator)}
    if config.reads_captions:
        memory["memory_input_ids"] = torch.randint(3, 100, (n, config.memory_tokens), generator=generator)
    if config.reads_latents:
        shape = (n, config.memory_top_k, config.memory_tokens, config.latent_dim)
        memory["memory_values"] = torch.randn(shape, generator=generator)
    return memory


def tokens_of(model, **memory) -> torch.Tensor:
    n = len(next(iter(memory.values())))
    features = model.get_image_features(torch.zeros(n, 3, 32, 32), **memory)
    return torch.stack(features.pooler_output)[:, model.config.image_seq_length :]


def test_memory_tokens_are_as_many_as_the_config_says(model):
    tokens = tokens_of(model, **memory_of(model))
    assert tokens.shape == (2, 3, 32) and tokens.dtype == torch.float32


def test_captions_are_the_language_models_own_embeddings(make_model):
    model = make_model(memory_input="captions")
    ids = torch.tensor([[5, 7, -1], [-1, -1, -1]])
    tokens = tokens_of(model, memory_input_ids=ids)
    embeddings = model.get_input_embeddings()(torch.tensor([5, 7]))
    torch.testing.assert_close(tokens[0, :2], embeddings, rtol=0, atol=0)
    empty = model.model.memory_connector.empty_token
    for token in (tokens[0, 2], *tokens[1]):
        torch.testing.assert_close(token, empty, rtol=0, atol=0)
    assert [name for name, _ in model.model.memory_connector.named_parameters()] == ["empty_token"]


def test_both_are_added_up(make_model):
    model = make_model(memory_input="both")
    connector = model.model.memory_connector
    memory = memory_of(model)
    words = model.get_input_embeddings()(memory["memory_input_ids"])
    latents = connector.mlp(memory["memory_values"].transpose(1, 2).flatten(2))
    del memory["memory_scores"]
    with torch.no_grad():
        connector.gate.zero_()  # as it is in a new model
        torch.testing.assert_close(tokens_of(model, **memory), words)
        connector.gate.fill_(0.5)
    torch.testing.assert_close(tokens_of(model, **memory), words + math.tanh(0.5) * latents)


def test_similarities_are_told(model):
    memory = memory_of(model)
    other = {**memory, "memory_scores": memory["memory_scores"] + 0.5}
    assert not torch.allclose(tokens_of(model, **memory), tokens_of(model, **other))
    del memory["memory_scores"]
    with pytest.raises(ValueError, match="Pass memory_scores"):
        tokens_of(model, **memory)


def test_memory_off_is_the_same_whatever_is_remembered(model):
    found = [
        model.get_image_features(torch.zeros(2, 3, 32, 32), memory="off", **memory_of(model, seed=seed)).pooler_output
        for seed in (0, 1)
    ]
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(found[1]), rtol=0, atol=0)


def test_a_new_connector_adds_nothing_but_words(checkpoints):
    """The language model reads the captions before anything was trained."""
    from tinyalign_vlm import TinyAlignForConditionalGeneration

    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        checkpoints["siglip"], checkpoints["llama"], memory_tokens=4, memory_top_k=2
    )
    ids = torch.tensor([[5, 7, 9, -1]])
    tokens = tokens_of(model, memory_input_ids=ids, memory_scores=torch.tensor([[0.9, 0.1]]))
    torch.testing.assert_close(tokens[0, :3], model.get_input_embeddings()(ids[0, :3]))
    assert not tokens[0, 3].any()


@pytest.mark.parametrize("name", ["memory_input_ids", "memory_values", "memory_scores", "memory_ids"])
def test_wrong_shapes_are_named(make_model, name):
    model = make_model(memory_input="both", memory_scores=True)
    memory = {**memory_of(model), "memory_ids": torch.zeros(2, 2, dtype=torch.long)}
    memory[name] = memory[name][:, :1]
    with pytest.raises(ValueError, match=f"{name} have shape"):
        tokens_of(model, **memory)


def test_saved_and_loaded_in_half_precision_words_are_the_same(model, tmp_path):
    memory = memory_of(model)
    expected = tokens_of(model, **memory)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(tokens_of(again, **memory), expected, rtol=0, atol=0)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(tokens_of(half, **memory).float(), expected, rtol=0.03, atol=0.03)


# ---------------------------------------------------------------------- captions as tokens


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return build(request.param)


def text_of(captioner: CaptionTokenizer, captions: list[str]) -> str:
    ids = captioner([captions])[0]
    used = ids[ids >= 0]
    assert (ids[len(used) :] == -1).all()
    return captioner.tokenizer.decode(used).strip()


TEXTS = [
    "a red square",
    "0800-123-456, No. 7!",
    "Straßenbahnhaltestelle",
    "一只红色的狗在草地上",
    "สุนัขสีแดงวิ่ง",
    "un été à l'œuvre",
    "🙂 smiles",
]
CONTROL = ["<|im_end|>", "x <|im_start|>system", "<image> <s>a</s><eos>", "<|endoftext|><|end|>", "<|<|im_end|>"]


@pytest.mark.parametrize("text", [*TEXTS, *CONTROL])
def test_a_caption_is_read_letter_by_letter(tokenizer, text):
    captioner = CaptionTokenizer(tokenizer, 200)
    assert text_of(captioner, [text]) == text
    special = {number for number, token in tokenizer.added_tokens_decoder.items()} - {tokenizer.unk_token_id}
    assert special.isdisjoint(captioner([[text]])[0].tolist())


def test_captions_follow_one_another_as_running_text(tokenizer):
    captioner = CaptionTokenizer(tokenizer, 400)
    assert text_of(captioner, TEXTS) == "; ".join(TEXTS)
    assert (captioner([[], TEXTS])[0] == -1).all()
    for before, after in [("a red square", "a blue circle"), ("red", "red")]:
        whole = tokenizer(f"{before}; {after}", add_special_tokens=False)["input_ids"]
        ids = captioner([[before, after]])[0]
        again = tokenizer.decode(ids[ids >= 0])
        assert again.strip() == tokenizer.decode(whole).strip()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("count", [1, 2, 4, 10])
def test_never_more_than_there_is_room_for_and_cut_at_words(tokenizer, size, count):
    captions = ["a red square on a white background", "system", "what is in the image?", "USER"] * 3
    captioner = CaptionTokenizer(tokenizer, size)
    ids = captioner([captions[:count]])
    assert ids.shape == (1, size)
    left = iter(captions[:count])
    for part in filter(None, text_of(captioner, captions[:count]).split("; ")):
        assert any(caption.startswith(part) for caption in left)  # in their order


def test_each_neighbour_gets_a_share_and_leaves_what_it_does_not_need(tokenizer):
    words = " ".join(["red"] * 60)
    captioner = CaptionTokenizer(tokenizer, 80)
    parts = text_of(captioner, [words, "system", words]).split("; ")
    assert parts[1] == "system"
    assert {word for part in parts for word in part.split()} == {"red", "system"}  # no word was cut
    lengths = [len(captioner.tokenize(part).ids) for part in parts]
    one_word = len(captioner.tokenize("red").ids)
    assert abs(lengths[0] - lengths[2]) <= one_word
    assert 80 - one_word - 3 <= sum(lengths) + 2 * len(captioner.separator) <= 80


def test_a_first_word_without_room_is_cut_at_a_character(tokenizer):
    for text in ("x" * 300, "一" * 100, "ก็" * 100):
        for size in (7, 8, 9):
            found = text_of(CaptionTokenizer(tokenizer, size), [text])
            assert "�" not in found and text.startswith(found)


def test_the_nearest_is_read_however_little_room_there_is(tokenizer):
    captions = ["Rhabarber", "Quarzuhrwerk", "Siebenschläfer", "Donaudampfschifffahrt"]
    for size in range(1, 40):
        captioner = CaptionTokenizer(tokenizer, size)
        found = text_of(captioner, captions).split("; ")
        assert captions[0].startswith(found[0]) and (found[0] or len(captioner.tokenize("R").ids) > size)
        assert all(caption.startswith(part) for caption, part in zip(captions, found, strict=False))
        assert len(found) == 1 or found[-1] in captions  # the last one is whole, or left out
    captioner = CaptionTokenizer(tokenizer, 30)
    assert text_of(captioner, ["", " ", "x"]) == "x" and text_of(captioner, []) == text_of(captioner, ["\n"]) == ""


def test_many_neighbours_of_long_words_are_fewer_whole_ones(tokenizer):
    captioner = CaptionTokenizer(tokenizer, 32)
    captions = [f"Donaudampfschifffahrt{number}" for number in range(16)]
    assert text_of(captioner, captions).split("; ")[-1] in captions or len(captioner.tokenize(captions[0]).ids) > 32


@pytest.mark.parametrize("text", ["กินข้าวที่บ้านครับ", "ភាសាខ្មែរ", "မြန်မာဘာသာ", "👩\u200d👩\u200d👧\u200d👦 family"])
def test_no_sign_is_cut_from_its_letter(tokenizer, text):
    for size in range(1, 60):
        found = text_of(CaptionTokenizer(tokenizer, size), [text])
        left = text[len(found) :]
        assert text.startswith(found)
        assert not left or not found or not goes_on(found[-1] + left[0])


def test_a_control_token_behind_a_semicolon_that_its_vocabulary_joins(tokenizer):
    """A vocabulary with a token of ";" and what follows: no part of it is read twice, or as a semicolon."""
    joined = copy.deepcopy(tokenizer)
    joined.add_tokens([";<", ";im"])
    captioner = CaptionTokenizer(joined, 60)
    for text in ("<|im_end|> x", "a <|im_end|>"):
        assert ";" not in text_of(captioner, [text])


def test_no_more_is_kept_of_a_caption_than_is_read(tokenizer):
    captioner = CaptionTokenizer(tokenizer, 8)
    whole = captioner([["red " * 2000, "white"]])
    (long, short) = captioner.captions.values()
    assert max(map(len, long)) <= 9 and (whole == captioner([["red " * 2000, "white"]])).all() and short.ids


def test_tokens_of_another_vocabulary_are_refused():
    check_vocabulary(torch.tensor([[-1, 99]]), 100)
    with pytest.raises(ValueError, match="A caption has token 100, the language model knows 100: the tokenizer is"):
        check_vocabulary(torch.tensor([[-1, 100]]), 100)


def test_spaceless_scripts_are_cut_between_characters_behind_words(tokenizer):
    text = "dog " + "狗" * 100
    captioner = CaptionTokenizer(tokenizer, 40)
    found = text_of(captioner, [text])
    assert text.startswith(found) and len(found) > 8 and "�" not in found


def test_the_users_tokenizer_is_left_alone_and_read_as_it_was_given(tokenizer):
    captioner = CaptionTokenizer(tokenizer, 30)
    expected = captioner([TEXTS[:2]])
    state = tokenizer.padding_side
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 2
    assert captioner([TEXTS[:2]]).equal(expected) and copy.deepcopy(captioner)([TEXTS[:2]]).equal(expected)
    tokenizer.padding_side = state


@pytest.mark.parametrize(
    "lengths, room, expected",
    [([5, 5], 20, [5, 5]), ([9, 1], 6, [5, 1]), ([9, 9, 9], 10, [3, 3, 4]), ([], 5, []), ([4, 4], 0, [0, 0])],
)
def test_shares(lengths, room, expected):
    assert shares(lengths, room) == expected


@pytest.mark.parametrize("one", [np.int64(3), np.array(3), torch.tensor(3), 3])
def test_one_id_for_all_images(one):
    assert for_each(one, 2) == [3, 3]
