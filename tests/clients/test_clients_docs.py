"""README.md's ten lines and docs/clients.md's Python run as printed, with a tiny model in the place of the demo's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def snippet(page: str, word: str) -> str:
    """The block of Python on a page that has this word."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S) if word in block)
    return code


@pytest.fixture
def demo(saved, images, tmp_path, monkeypatch):
    """A folder with `demo/`, as the demo leaves it."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/checkpoint").symlink_to(saved.folder)
    (tmp_path / "demo/bank_with_heldout").symlink_to(saved.bank_folder)
    images[0].save(tmp_path / "demo/query.png")
    monkeypatch.chdir(tmp_path)


def test_ten_lines(demo, capsys):
    exec(snippet("README.md", "pipeline("), {})
    answer, captions = capsys.readouterr().out.strip().splitlines()
    assert answer and captions.count("square") == 3


def test_peft(demo):
    space = {}
    exec(snippet("docs/clients.md", "get_peft_model("), space)
    assert type(space["merged"]).__name__ == "TinyAlignForConditionalGeneration"
    assert Path("merged/model.safetensors").is_file()
