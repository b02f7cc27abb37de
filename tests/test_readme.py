"""The README's Python runs as printed, with tiny models in place of the Hub's; what all pages name is there."""

import dataclasses
import re
from pathlib import Path

import datasets
import pytest
import torch
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.arguments.files import STAGE_CONFIGS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# a field of a stage, or an option of a command
OPTIONS = {field.name for config in STAGE_CONFIGS.values() for field in dataclasses.fields(config)}
for file in (ROOT / "training" / "cli").glob("*.py"):
    OPTIONS.update(re.findall(r'"--([a-z_]+)"', file.read_text()))


def test_your_own_data(checkpoints, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_hf_home(monkeypatch, tmp_path / "hf_home")
    rows = {"image": images, "caption": [f"a plain square {i}" for i in range(len(images))]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "build(" in block)
    code = code.replace("google/siglip-base-patch16-224", checkpoints["siglip"])
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", checkpoints["llama"])
    assert len([line for line in code.splitlines() if line]) == 6
    names = {"dataset": dataset}
    exec(code, names)

    model, bank = names["model"], MemoryBank.from_pretrained("bank")
    model.attach_memory_bank(bank)
    assert bank.value_encoder is None and len(bank) == len({image.tobytes() for image in images})
    assert model.get_image_features(torch.zeros(1, 3, 32, 32)).memory_ids.shape == (1, 4)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_imports_and_options_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    for line in re.findall(r"^ *from tinyalign_vlm.* import .*$", text, re.M):
        if "bank.lance" not in line:  # takes seconds; test_lance.py has it
            exec(line.strip(), {})
    commands = re.findall(r"(?:tinyalign|tinyalign_cli) (?:(?:bank|data) )?\w+ (?:\\\n|[^\n`&])*", text)
    options = set(re.findall(r" --([a-z_]+)", " ".join(commands)))
    assert sorted(options - OPTIONS) == []
