"""The README's Python runs as printed, with tiny models in place of the Hub's."""

import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration
from tinyalign_vlm.training import bank_preparation

README = Path(__file__).parents[1] / "README.md"


def test_your_own_data(checkpoints, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    settings = bank_preparation.ValueEncoderTrainingConfig(steps=2, batch_size=4)
    monkeypatch.setattr(bank_preparation, "ValueEncoderTrainingConfig", lambda: settings)
    rows = {"image": images, "caption": [f"a plain square {i}" for i in range(len(images))]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "build(" in block)
    code = code.replace("google/siglip-base-patch16-224", checkpoints["siglip"])
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", checkpoints["llama"])
    exec(code, {"dataset": dataset})

    model = TinyAlignForConditionalGeneration.from_pretrained("model")
    model.attach_memory_bank(MemoryBank.from_pretrained("bank"))
    assert model.config.memory_lexicon_size > 0
    assert len(model.memory_bank) == len(images)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text()))))
def test_links_lead_somewhere(link):
    assert (README.parent / link).exists()
