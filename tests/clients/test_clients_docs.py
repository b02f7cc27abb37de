"""README.md's six lines and docs/clients.md's Python run as printed, with a tiny model in the place of the demo's."""

import re
from pathlib import Path

import pytest
from PIL import Image

from .conftest import answer

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


def test_six_lines(demo, saved, images, capsys):
    code = snippet("README.md", "pipeline(")
    assert len([line for line in code.splitlines() if line]) == 6
    space = {}
    exec(code, space)
    shown = capsys.readouterr().out
    assert shown.startswith(answer(saved, images[0], text="What is this?", max_new_tokens=16) + " ['a (255, 0, 0)")
    Image.new("RGB", (40, 40), "purple").save("photo.png")
    (one_line,) = re.findall(r"`(pipe.model.attach_memory_bank\(pipe.*)`", (ROOT / "README.md").read_text())
    exec(one_line, space)
    assert space["pipe"].model.memory_bank.captions[-1] == "a new word"


def test_many_questions(demo, saved, images, capsys):
    space = {}
    code = snippet("docs/clients.md", "get_image_features(")
    before, loop = code.split("for question")
    exec(before, space)
    tower, space["model"].base_model.vision_tower = space["model"].base_model.vision_tower, None  # not asked again
    exec(f"for question{loop}", space)
    expected = [
        answer(saved, images[0], text=question, max_new_tokens=16)
        for question in ("What is this?", "Which words go with it?")
    ]
    assert capsys.readouterr().out.splitlines() == expected
    space["model"].base_model.vision_tower = tower
    exec(snippet("docs/clients.md", "Conversation("), space)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{expected[0]} a (255, 0, 0) square") and second.endswith(" a zorblax")


def test_peft(demo):
    space = {}
    exec(snippet("docs/clients.md", "get_peft_model("), space)
    assert type(space["merged"]).__name__ == "TinyAlignForConditionalGeneration"
    assert Path("merged/model.safetensors").is_file()
