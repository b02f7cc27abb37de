"""Lessons are found beside a bank, saved as one, and forgotten without a trace."""

import tempfile
from pathlib import Path

import pytest
from isolation import set_hf_home

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign.bank_arrays import cache_root
from tinyalign_vlm.training.inference.conversation import Conversation
from tinyalign_vlm.training.inference.lessons import Lessons

from .conftest import QUESTION

WORD = "vexquimble"  # in no other file of the tests


def files_with(word: str, *folders: Path) -> list[Path]:
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if word.encode() in path.read_bytes()]


def test_forgotten_without_a_trace(parts, images, tmp_path, monkeypatch):
    lessons = Lessons(parts.model, parts.processor)
    chat = Conversation(parts.model, parts.processor, lessons, max_new_tokens=6)
    plain = "".join(chat.ask(QUESTION, images[9]))
    chat.teach(images[9], f"a {WORD}")
    other = chat.teach(images[10], "another")
    taught = "".join(chat.ask(QUESTION, images[9]))
    assert taught != plain and chat.sources[0].caption == f"a {WORD}"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    lessons.save(tmp_path / "saved")
    assert [row["caption"] for row in lessons.rows] == [f"a {WORD}", "another"]
    assert chat.forget(lessons.rows[0]["source_id"]) == 1
    assert [row["source_id"] for row in lessons.rows] == [other["source_id"]]
    assert chat.forget() == 1 and len(lessons) == 0 and lessons.rows == []
    assert files_with(WORD, cache_root(), tmp_path / "temporary") == []
    assert WORD not in str(parts.model.caption_tokenizer.captions) and chat.turns == chat.sources == []
    assert len(chat.lessons.pictures._kept) == 0
    assert "".join(chat.ask(QUESTION)) == plain and not any(source.lesson for source in chat.sources)


@pytest.mark.parametrize("quantized", [False, True])
def test_saved_as_a_new_bank(parts, images, captions, tmp_path, monkeypatch, quantized):
    bank = parts.bank.with_rows(parts.bank.batches(), quantized=quantized)
    parts.model.attach_memory_bank(bank)
    lessons = Lessons(parts.model, parts.processor)
    for image, caption in zip(images[8:], captions[8:], strict=True):
        row = lessons.teach(image, caption)
        parts.model.attach_memory_bank(parts.bank)  # beside which nothing was taught
    assert row["caption"] == captions[-1] and row["thumbnail"].size == images[-1].size
    lessons.save(tmp_path / "saved")
    set_hf_home(monkeypatch, tmp_path / "another_home")
    saved = MemoryBank.from_pretrained(tmp_path / "saved")
    expected = bank.add(images[8:], parts.model, parts.processor, captions=captions[8:])
    assert saved.config.sha256.rows == expected.config.sha256.rows and saved.config.quantized == quantized
    assert saved.captions == captions and saved.thumbnail(11).size == images[11].size
    for number, lesson in enumerate(lessons._lessons, start=8):  # what was found is what is saved
        assert (saved.keys([number])[0] == lesson.key.numpy()).all()
        assert (saved.gather([number])[0] == lesson.value).all()


def test_pushed(parts, images, monkeypatch):
    """Uploading itself is `MemoryBank.push_to_hub`, which tests/hub has."""
    pushed = []
    monkeypatch.setattr(MemoryBank, "push_to_hub", lambda bank, *args, **kw: pushed.append((bank.captions, args, kw)))
    lessons = Lessons(parts.model, parts.processor)
    lessons.teach(images[9], f"a {WORD}")
    lessons.push("org/bank", private=True)
    assert pushed == [([*parts.bank.captions, f"a {WORD}"], ("org/bank",), {"private": True})]
    assert files_with(WORD, cache_root()) == []


def test_a_picture_taught_again(parts, images, captions, tmp_path):
    lessons = Lessons(parts.model, parts.processor)
    chat = Conversation(parts.model, parts.processor, lessons, max_new_tokens=1)
    for caption in (f"a {WORD}", "a zorblax"):
        chat.teach(images[0], caption)  # which the bank has under another name
        list(chat.ask(QUESTION, images[0]))
    assert [row["caption"] for row in lessons.rows] == ["a zorblax"]
    assert WORD not in str(parts.model.caption_tokenizer.captions)
    assert [chat.sources[0].caption, captions[0] in str(chat.sources)] == ["a zorblax", False]
    lessons.save(tmp_path / "saved")
    assert MemoryBank.from_pretrained(tmp_path / "saved").captions == [*captions[1:8], "a zorblax"]
    with pytest.raises(ValueError, match="saved is there already: choose another folder"):
        lessons.save(tmp_path / "saved")
    chat.forget()
    list(chat.ask(QUESTION, images[0]))
    assert chat.sources[0].caption == captions[0]


def test_the_shared_bank_is_not_copied(parts, images, monkeypatch):
    def batches(self, *args):
        raise AssertionError("all rows of the bank are read")

    lessons = Lessons(parts.model, parts.processor)
    before = set(cache_root().rglob("*"))
    monkeypatch.setattr(MemoryBank, "batches", batches)
    chat = Conversation(parts.model, parts.processor, lessons, max_new_tokens=1)
    chat.teach(images[9], f"a {WORD}")
    list(chat.ask(QUESTION, images[9]))
    assert chat.sources[0].lesson and set(cache_root().rglob("*")) == before


def test_teaching_looks_at_a_picture_once(parts, images, tower_calls):
    lessons = Lessons(parts.model, parts.processor)
    chat = Conversation(parts.model, parts.processor, lessons, max_new_tokens=1)
    list(chat.ask(QUESTION, images[9]))
    chat.teach(images[9], f"a {WORD}")
    list(chat.ask(QUESTION))
    assert len(tower_calls) == 1


def test_what_cannot_be_taught(parts, images, make_model):
    lessons = Lessons(parts.model, parts.processor)
    for image, caption, message in [
        (images[0], " ", "no caption: the caption is ' ', expected text"),
        (b"nothing", "a cat", "broken image: the image cannot be read"),
        (None, "a cat", "missing image"),
    ]:
        with pytest.raises(ValueError, match=message):
            lessons.teach(image, caption)
    assert len(lessons) == 0
    with pytest.raises(ValueError, match="This model has no memory"):
        Lessons(make_model(memory_top_k=0), parts.processor).teach(images[0], "a cat")
