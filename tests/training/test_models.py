"""A model that is loaded to answer questions, with its bank."""

from types import SimpleNamespace

import pytest
from transformers import GPT2Config, LlamaConfig

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.models import context_length, load_to_answer


def test_a_model_that_reads_captions_in_its_prompt(make_model, make_processor, tmp_path):
    model = make_model(memory_top_k=0, prompt_captions=2)
    model.save_pretrained(tmp_path)
    make_processor(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prompt_captions is 2.*pass --memory off"):
        load_to_answer(str(tmp_path), device="cpu")
    load_to_answer(str(tmp_path), memory="off", device="cpu")
    with pytest.raises(ValueError, match="pass --memory_bank"):
        load_to_answer(str(tmp_path), device="cpu", writes_captions=True)


def test_the_bank_that_a_config_names_is_read_with_the_models_token(make_model, monkeypatch):
    model, asked = make_model(), []

    def from_pretrained(name, revision=None, token=None):
        asked.append((name, revision, token))
        raise OSError("no network")

    monkeypatch.setattr(MemoryBank, "from_pretrained", from_pretrained)
    model.config.memory_bank, model.config.memory_bank_revision = "org/private", "abc"
    model.base_model._loaded_from = "org/model", {"token": "secret"}
    with pytest.raises(OSError, match="no network"):
        model.memory_bank  # noqa: B018
    assert asked == [("org/private", "abc", "secret")]


@pytest.mark.parametrize("text", [GPT2Config(n_positions=96), LlamaConfig(max_position_embeddings=96)])
def test_the_context_of_every_family(text):
    assert context_length(SimpleNamespace(config=SimpleNamespace(text_config=text))) == 96
