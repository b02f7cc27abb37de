"""A conversation answers as `model.generate` does, and touches nothing that visitors share."""

import copy
import threading

import pytest
from PIL import Image

from tinyalign_vlm.modeling_tinyalign.bank_format import CalibrationConfig
from tinyalign_vlm.modeling_tinyalign.row_encoder import image_source_id
from tinyalign_vlm.training.inference import conversation as conversation_module
from tinyalign_vlm.training.inference.conversation import Conversation
from tinyalign_vlm.training.inference.lessons import Lessons
from tinyalign_vlm.training.inference.pictures import Pictures

from .conftest import QUESTION, generated


def conversation(parts, lessons=None) -> Conversation:
    return Conversation(parts.model, parts.processor, lessons, max_new_tokens=6)


def answer(chat, *args, **settings) -> str:
    return "".join(chat.ask(*args, **settings))


@pytest.fixture(scope="module")
def taught(parts, images, captions) -> dict:
    """The bank alone, and with lessons in place of four more rows: the lessons by the bank that answers the same."""
    lessons = Lessons(parts.model, parts.processor)
    for image, caption in zip(images[8:], captions[8:], strict=True):
        lessons.teach(image, caption)
    bank = parts.bank.add(images[8:], parts.model, parts.processor, captions=captions[8:])
    return {parts.bank: Lessons(parts.model, parts.processor), bank: lessons}


@pytest.mark.parametrize(
    ("settings", "of_generate"),
    [
        ({}, {}),
        ({"memory": "off"}, {"memory": "off"}),
        ({"top_k": 1}, {"memory_top_k": 1}),
        ({"top_k": 0}, {"memory_top_k": 0}),
        ({"retrieval_threshold": 0.9}, {"retrieval_threshold": 0.9}),
        ({"exclude": [0, 9]}, None),  # the numbers of pictures
    ],
)
def test_answers_are_those_of_generate(parts, images, taught, settings, of_generate):
    if "exclude" in settings:
        names = [image_source_id(images[number]) for number in settings["exclude"]]
        settings, of_generate = {"exclude": names}, {"exclude_ids": [names]}
    for bank, lessons in taught.items():
        for image in (images[0], images[9]):
            found = answer(conversation(parts, lessons), QUESTION, image, **settings)
            assert found == generated(parts, image, bank, QUESTION, **of_generate)


def test_several_turns_look_at_the_picture_once(parts, images, tower_calls):
    chat = conversation(parts)
    first = answer(chat, QUESTION, images[0])
    second = answer(chat, "and its colour?")
    assert len(tower_calls) == 1 and chat.turns == [(QUESTION, first), ("and its colour?", second)]
    assert second == generated(parts, images[0], parts.bank, QUESTION, first, "and its colour?")
    del tower_calls[:]
    other = Lessons(parts.model, parts.processor, pictures=chat.lessons.pictures)
    assert answer(conversation(parts, other), QUESTION, images[0].copy()) == first
    assert answer(chat, "again?", images[0]) and len(chat.turns) == 3  # the same picture
    assert tower_calls == []
    other = answer(chat, QUESTION, images[1])
    assert len(chat.turns) == 1 and len(tower_calls) == 1
    assert other == generated(parts, images[1], parts.bank, QUESTION)


def test_sources(parts, images, captions):
    lessons = Lessons(parts.model, parts.processor)
    lessons.teach(images[9], "a zorblax")
    chat = conversation(parts, lessons)
    answer(chat, QUESTION, images[9], retrieval_threshold=0.999)
    first, second = chat.sources
    assert (first.caption, first.id, first.lesson, first.used, second.used) == ("a zorblax", 8, True, True, False)
    assert first.similarity == pytest.approx(1, abs=1e-4) and first.thumbnail.size == (5, 6)
    assert second.caption == captions[second.id] and second.thumbnail and first.probability is None
    answer(chat, QUESTION, exclude=[first.source_id])
    assert second.id in [source.id for source in chat.sources] and not any(source.lesson for source in chat.sources)
    answer(chat, QUESTION, memory="off")
    assert chat.sources == [] and chat.none_right is None


def test_calibrated_probabilities(parts, images):
    calibration = CalibrationConfig(top_k=4, right=[0.0, 2.0, 0.0, 0.0], none=[2.0, -4.0, 0.0, 0.0], num_rows=8)
    bank = parts.bank.with_calibration(calibration)
    parts.model.attach_memory_bank(bank)
    chat = conversation(parts)
    answer(chat, QUESTION, images[9])
    before = chat.none_right
    expected = parts.model.retrieve(images[9])
    assert before == pytest.approx(float(expected.none_probability[0]), abs=1e-5)
    probabilities = [source.probability for source in chat.sources]
    assert probabilities == pytest.approx(expected.probabilities[0].tolist(), abs=1e-5)
    chat.teach(images[9], "a zorblax")
    answer(chat, QUESTION)
    parts.model.attach_memory_bank(parts.bank)
    assert chat.none_right < before and chat.sources[0].probability > probabilities[0]


def test_two_visitors_at_once(parts, images):
    """One teaches and forgets while the other asks: what the other hears never changes."""
    pictures = Pictures(parts.model)
    visitors = [Lessons(parts.model, parts.processor, pictures=pictures) for _ in range(2)]
    state = copy.copy(parts.model.base_model.__dict__)
    plain = generated(parts, images[9], parts.bank, QUESTION)
    heard = []

    def teach_and_forget():
        for _ in range(3):
            visitors[0].teach(images[9], "a zorblax")
            answer(conversation(parts, visitors[0]), QUESTION, images[9])
            visitors[0].forget()

    def ask():
        chat = conversation(parts, visitors[1])
        for _ in range(6):
            chat.clear()
            heard.append((answer(chat, QUESTION, images[9]), any(source.lesson for source in chat.sources)))

    threads = [threading.Thread(target=work) for work in (teach_and_forget, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == [(plain, False)] * 6
    assert state == parts.model.base_model.__dict__ and parts.model.memory_bank is parts.bank


def test_errors_are_in_words_and_it_goes_on(parts, images, tmp_path):
    chat = conversation(parts)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for image, message in [
        (tmp_path / "broken.png", "the image cannot be read"),
        (tmp_path / "none.png", "is no file, expected a file"),
        ("https://example.org/x.png", "found the URL"),
        (Image.new("RGB", (4000, 2)), "expected a long side of at most 100 times"),
    ]:
        with pytest.raises(ValueError, match=message):
            answer(chat, QUESTION, image)
    with pytest.raises(ValueError, match="memory_top_k is 5, expected 0 to the model's 2"):
        answer(chat, QUESTION, images[0], top_k=5)
    with pytest.raises(ValueError, match="The prompt has .* tokens, expected fewer than the model's context of 512"):
        answer(chat, "x y " * 600, images[0])
    assert chat.turns == [] and answer(chat, QUESTION) and answer(chat, "and?")


def test_a_long_conversation_loses_its_first_turns(parts, images):
    chat = conversation(parts)
    for number in range(8):
        answer(chat, f"what is this, and number {number}? " * 6, images[0])
    assert len(chat.turns) == 8 and answer(chat, QUESTION)


def test_an_endless_conversation(parts, monkeypatch):
    monkeypatch.setattr(conversation_module, "KEPT_TURNS", 2)
    asked, template = [], parts.processor.apply_chat_template

    def counted(messages, **settings):
        asked.append(len(messages))
        return template(messages, **settings)

    monkeypatch.setattr(parts.processor, "apply_chat_template", counted)
    chat = conversation(parts)
    for number in range(6):
        answer(chat, f"{number}?")
    assert [question for question, _ in chat.turns] == ["4?", "5?"] and asked == [1, 3, 5, 5, 5, 5]


def test_half_a_character(parts, images):
    chat = conversation(parts)
    with pytest.raises(ValueError, match="The question has half a character .*: type it again"):
        answer(chat, "caf\udce9?", images[0])
    assert chat.turns == []


def test_the_bank_is_opened_when_it_is_needed(parts, images, monkeypatch):
    """That of the config may have to be downloaded; one that is attached later is seen."""
    opened = []
    parts.model.detach_memory_bank()
    with monkeypatch.context() as patch:
        patch.setattr(parts.model.config, "memory_bank", "org/bank")
        patch.setattr(parts.model, "attach_memory_bank", lambda *arguments, token: opened.append(arguments))
        chat = conversation(parts)
        assert answer(chat, QUESTION, images[0], memory="off") and answer(chat, QUESTION, top_k=0) and opened == []
        with pytest.raises(ValueError, match="There is no memory bank"):
            answer(chat, QUESTION)
        assert opened == [("org/bank", None)]
    parts.model.attach_memory_bank(parts.bank)
    assert answer(chat, QUESTION) and chat.sources and chat.lessons.bank is parts.bank


def test_a_changed_bank_is_seen_at_once(parts, images):
    chat = conversation(parts)
    answer(chat, QUESTION, images[9])
    bank = parts.bank.add([images[9]], parts.model, parts.processor, captions=["new"])
    parts.model.attach_memory_bank(bank)
    answer(chat, QUESTION)
    parts.model.attach_memory_bank(parts.bank)
    assert chat.sources[0].caption == "new"
    answer(chat, QUESTION)
    assert "new" not in [source.caption for source in chat.sources]


def test_without_a_picture_and_without_a_bank(parts, images, make_model, make_processor):
    assert answer(conversation(parts), "who are you?")
    model = make_model()
    chat = Conversation(model, parts.processor, max_new_tokens=2)
    assert answer(chat, QUESTION, images[0], memory="off")
    with pytest.raises(ValueError, match="There is no memory bank: pass --memory_bank, attach one"):
        answer(chat, QUESTION)
    with pytest.raises(ValueError, match="There is no memory bank: pass --memory_bank"):
        chat.teach(images[0], "a cat")
    baseline = make_model(memory_top_k=0)
    chat = Conversation(baseline, make_processor(baseline), max_new_tokens=2)
    assert answer(chat, QUESTION, images[0]) and len(chat.turns) == 1 and chat.sources == []
