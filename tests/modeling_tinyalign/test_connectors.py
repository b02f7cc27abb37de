"""The lexicon: what latents spell, read in the language model's embeddings."""

from typing import NamedTuple

import pytest
import torch

from tinyalign_vlm import ValueEncoder, ValueEncoderConfig
from tinyalign_vlm.modeling_tinyalign.connectors import lexicon_words, read_words, slot_tokens, vocabulary_words

WORDS = ["", "red", "square", "white", "raccoonish"]


class FakeBank(NamedTuple):
    value_encoder: ValueEncoder
    captions: list[str]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = ValueEncoderConfig(
        num_latents=4, vision_feature_size=16, num_vision_tokens=4, num_self_attends_per_block=1
    )
    return ValueEncoder(config).eval()


@pytest.fixture(scope="module")
def tokenizer(make_processor, make_model):
    return make_processor(make_model()).tokenizer


def test_word_scores_are_the_spelling_heads_log_probabilities(encoder):
    latents = torch.randn(7, 96)
    keys, bias = encoder.word_scores(WORDS)
    log_probabilities = encoder.spell(latents).log_softmax(-1)
    patches = torch.full((len(WORDS), 16), 256)
    for row, word in enumerate(WORDS):
        patches[row, : len(word)] = torch.tensor(list(word.encode()))
    expected = log_probabilities[:, torch.arange(16), patches].sum(-1)
    scores = latents @ keys.T + bias
    torch.testing.assert_close(scores.softmax(-1), expected.softmax(-1))


def test_vocabulary_words_are_single_tokens(tokenizer):
    words = vocabulary_words(tokenizer)
    assert "red" in words or "square" in words or words  # the tiny vocabulary has a few
    for word in words:
        assert len(tokenizer(f"x {word}")["input_ids"]) == 2
    assert lexicon_words(tokenizer, ["zzz red"])[0] == ""
    assert {"zzz", "red"} <= set(lexicon_words(tokenizer, ["zzz red"]))


def test_slot_tokens(tokenizer):
    tokens = slot_tokens(tokenizer, WORDS, 2)
    assert tokens.shape == (2, len(WORDS), 4)
    blank = tokenizer("\n")["input_ids"][-1]
    assert tokens[:, 0, 0].tolist() == [blank, blank] and (tokens[:, :, 1:] == -1)[0].all()
    ids = tokenizer("x raccoonish")["input_ids"][1:]
    assert tokens[0, 4, 0] == ids[0]
    assert tokens[1, 4].tolist() == ids[1:5]


def test_read_words_gives_the_embeddings_of_the_likeliest_word(tokenizer):
    embeddings = torch.randn(300, 32)
    tokens = slot_tokens(tokenizer, WORDS, 2)
    keys = torch.eye(len(WORDS)) * 100
    values = torch.eye(len(WORDS))[torch.tensor([[1, 1, 4, 4]])]
    read = read_words(values, keys, torch.zeros(len(WORDS)), tokens, embeddings.__getitem__)
    first, rest = tokens[0, 4, 0], tokens[1, 4]
    torch.testing.assert_close(read[0, 0], embeddings[tokens[0, 1, 0]])
    torch.testing.assert_close(read[0, 2], embeddings[first])
    torch.testing.assert_close(read[0, 3], embeddings[rest[rest >= 0]].mean(0))


def test_lexicon_is_saved_and_changes_nothing_on_reload(make_model, tokenizer, encoder, tmp_path):
    bank = FakeBank(encoder, ["a red square", "white"])
    for fusion in ("sequence", "channel"):
        model = make_model(num_latents=4, latent_dim=96, memory_fusion=fusion)
        model.build_lexicon(tokenizer, bank)
        connector = model.model.memory_connector
        assert model.config.memory_lexicon_size == len(connector.lexicon_bias) > 4
        values = torch.randn(2, 2, 4, 96)
        embeddings = model.get_input_embeddings()
        tokens = connector(values, None, embeddings)
        assert tokens.shape == (2, 4 * (2 if fusion == "sequence" else 1), 32)
        model.save_pretrained(tmp_path / fusion)
        again = type(model).from_pretrained(tmp_path / fusion).model
        torch.testing.assert_close(again.memory_connector(values, None, embeddings), tokens, rtol=0, atol=0)

        absent = connector(values, torch.zeros(2, 2, dtype=torch.bool), embeddings)
        torch.testing.assert_close(absent, connector(-values, torch.zeros(2, 2, dtype=torch.bool), embeddings))


@pytest.mark.parametrize("fully", [False, True])
def test_lexicon_in_half_precision(make_model, tokenizer, encoder, tmp_path, fully):
    """Token ids are exact whatever the checkpoint's dtype; 299 would be 300 as bfloat16."""
    model = make_model(num_latents=4, latent_dim=96)
    if fully:
        model.to(torch.bfloat16)
    model.build_lexicon(tokenizer, FakeBank(encoder, ["a red square", "white"]))
    connector = model.model.memory_connector
    connector.lexicon_tokens[:, 1:, 0] = 299
    tokens = connector.lexicon_tokens.clone()
    values, embeddings = torch.randn(2, 2, 4, 96).bfloat16(), model.get_input_embeddings()
    expected = connector(values, None, embeddings)
    assert (
        expected.isfinite().all()
        and model.get_image_features(torch.zeros(2, 3, 32, 32), memory_values=values).pooler_output[0].isfinite().all()
    )
    model.save_pretrained(tmp_path)
    for settings in ({"dtype": torch.bfloat16}, {}):
        again = type(model).from_pretrained(tmp_path, **settings)
        loaded = again.model.memory_connector
        assert loaded.lexicon_tokens.long().equal(tokens)
        read = loaded(values, None, again.get_input_embeddings())
        torch.testing.assert_close(read.float(), expected.float(), atol=0.02, rtol=0.02)
        again.to(torch.bfloat16)
        assert loaded.lexicon_tokens.equal(tokens)


def test_first_lexicon_warns_that_the_output_layer_is_zeroed(make_model, tokenizer, encoder, caplog):
    model, bank = make_model(num_latents=4, latent_dim=96), FakeBank(encoder, ["red"])
    layer = model.model.memory_connector.mlp.linear_2
    model.build_lexicon(tokenizer, bank)
    assert "was set to zero" in caplog.text and not layer.weight.any() and not layer.bias.any()
    caplog.clear()
    torch.nn.init.ones_(layer.weight)
    model.build_lexicon(tokenizer, bank)
    assert not caplog.text and layer.weight.all()


def test_a_lexicon_needs_a_memory_and_its_latents(make_model, tokenizer, encoder):
    bank = FakeBank(encoder, ["red"])
    with pytest.raises(ValueError, match="memory_top_k is 0"):
        make_model(num_latents=4, latent_dim=96, memory_top_k=0).build_lexicon(tokenizer, bank)
    with pytest.raises(ValueError, match=r"latents_per_word\) = \(4, 96, 2\), the model expects \(3, 96, 2\)"):
        make_model(num_latents=3, latent_dim=96).build_lexicon(tokenizer, bank)


def test_latents_per_word_must_agree(make_model, tokenizer):
    config = ValueEncoderConfig(num_latents=4, latents_per_word=1, num_self_attends_per_block=1)
    bank = FakeBank(ValueEncoder(config), ["red"])
    with pytest.raises(ValueError, match=r"latents_per_word\) = \(4, 96, 1\), the model expects \(4, 96, 2\)"):
        make_model(num_latents=4, latent_dim=96).build_lexicon(tokenizer, bank)
