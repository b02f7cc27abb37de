"""transformers' pipeline: what steers retrieval and generation passes through it, and sources come back."""

import pytest
import torch
import transformers
from clients.conftest import only_say_letters, prompt
from packaging.version import Version
from transformers import GenerationConfig, pipeline

from tinyalign_vlm import MemoryBank

QUESTIONS = ("what is it?", "user: a longer question, of another length?")


@pytest.fixture(scope="module")
def pipes(saved) -> list:
    """A pipeline without a bank, and one with a bank of six rows, of the same checkpoint."""
    found = [pipeline("image-text-to-text", model=saved.folder) for _ in range(2)]
    found[1].model.attach_memory_bank(saved.bank_folder)
    return found


def chats(images) -> list[list[dict]]:
    """One chat with an image, one with two."""
    made = []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "image", "image": image} for image in images[number : 2 * number + 1]]
        made.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
    return made


def texts(pipe, chats, **settings) -> list[str]:
    found = pipe(text=chats, max_new_tokens=4, return_full_text=False, **settings)
    return [answer["generated_text"] for [answer] in found]


def test_a_batch_of_chats_with_and_without_images(pipes, images):
    with_images = chats(images)
    asked = [[{"role": "user", "content": "a red square"}], *with_images, [{"role": "user", "content": "what?"}]]
    asked = [asked[1], asked[0], asked[3], asked[2]]
    alone = [texts(pipes[1], [chat])[0] for chat in asked]
    for batch_size in (2, 3, 4):
        assert texts(pipes[1], asked, batch_size=batch_size) == alone


def test_a_batch_retrieves_with_each_chats_own_question(make_model, make_processor, images):
    model = make_model(key_space="language", memory_input="captions")
    processor = make_processor(model)
    only_say_letters(model, processor)
    rows = [{"image": image, "caption": f"a {image.getpixel((0, 0))} square"} for image in images]
    model.attach_memory_bank(MemoryBank.build(rows, model, processor))
    model.read_captions_with(processor.tokenizer)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    first, second = chats(images)
    wordless = [{"role": "user", "content": first[0]["content"][:1]}]
    asked = [first, [{"role": "user", "content": "a red square, at length?"}], second, wordless]
    found, batched = [], []
    alone = [texts(pipe, [chat], generate_kwargs={"sources": found})[0] for chat in asked]
    for batch_size in (2, 3, 4):
        settings = {"batch_size": batch_size, "generate_kwargs": {"sources": batched}}
        assert texts(pipe, asked, **settings) == alone
    scores = [[row["score"] for row in rows] for rows in found]
    assert [len(row) for row in scores] == [2, 0, 4, 2]
    for number, rows in enumerate(batched):
        assert [row["score"] for row in rows] == pytest.approx(scores[number % 4], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_memory_off(pipes, images, batch_size):
    without, with_bank = pipes
    asked, settings = chats(images), {"batch_size": batch_size}
    with pytest.raises(ValueError, match="no memory bank is attached"):
        texts(without, asked, **settings)
    off = texts(without, asked, memory="off", **settings)
    assert off == texts(with_bank, asked, memory="off", **settings) == texts(with_bank, asked, top_k=0, **settings)
    assert off == texts(with_bank, asked, generate_kwargs={"memory": "off"}, **settings)
    assert off != texts(with_bank, asked, **settings)
    prompts = {"images": images[:2], "text": ["<image> what?", "<image> and who?"]}
    plain = with_bank(**prompts, memory="off", max_new_tokens=4)
    assert plain == without(**prompts, memory="off", max_new_tokens=4) != with_bank(**prompts, max_new_tokens=4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_sources(pipes, images, batch_size):
    pipe, asked = pipes[1], chats(images)
    bank = pipe.model.memory_bank

    def sources(**settings) -> list[list[tuple]]:
        found = []
        texts(pipe, asked, batch_size=batch_size, generate_kwargs={"sources": found}, **settings)
        return [[(row["image"], row["caption"]) for row in row_of_chat] for row_of_chat in found]

    first, second = sources()
    assert (first[0], second[0], second[2]) == (
        (0, "a (255, 0, 0) square"),
        (0, "a (0, 128, 0) square"),
        (1, "a (0, 0, 255) square"),
    )
    assert [len(first), len(second)] == [2, 4]
    assert sources(top_k=1) == sources(memory_top_k=1) == [first[:1], [second[0], second[2]]]
    assert sources(retrieval_threshold=0.99999) == [first[:1], [second[0], second[2]]]
    assert sources(memory="off") == [[], []]
    for excluded in (0, bank.rows([0])[0]["source_id"]):
        without_red = sources(exclude_ids=excluded)
        assert (
            "a (255, 0, 0) square" not in {caption for row in without_red for _, caption in row}
            and len(without_red[0]) == 2
        )


def test_an_answer_with_its_sources(saved, pipes, images):
    found = []
    pipes[1](text=chats(images)[0], max_new_tokens=4, generate_kwargs={"sources": found})
    inputs = prompt(saved, images[0], text=QUESTIONS[0])
    answer, sources = saved.model.generate(**inputs, max_new_tokens=4, sources=True)
    assert sources == found and torch.equal(answer, saved.model.generate(**inputs, max_new_tokens=4))
    details, sources = saved.model.generate(
        **inputs, max_new_tokens=4, sources=True, return_dict_in_generate=True, exclude_ids=found[0][0]["source_id"]
    )
    assert details.memory_ids[0].tolist() == [row["id"] for row in sources[0]]
    assert sources[0][0]["caption"] == found[0][1]["caption"]


def test_an_item_for_each_image(pipes, images):
    found = []
    pipe, [_, chat] = pipes[1], chats(images)
    pipe(text=chat, max_new_tokens=1, exclude_ids=[1, None], generate_kwargs={"sources": found})
    assert found[0][0]["caption"] != "a (0, 128, 0) square" and found[0][2]["caption"] == "a (0, 0, 255) square"
    assert found[0][2]["score"] == pytest.approx(1, abs=1e-4) and found[0][2]["source_id"]


def test_settings_of_generation(pipes, images):
    pipe, [chat, _] = pipes[1], chats(images)
    assert texts(pipe, [chat], min_new_tokens=4, do_sample=False) == texts(
        pipe, [chat], generate_kwargs={"min_new_tokens": 4, "do_sample": False}
    )
    kept = 2 if Version(transformers.__version__) >= Version("5.23") else 1  # an older pipeline keeps the first
    assert len(pipe(text=chat, num_beams=2, num_return_sequences=2, max_new_tokens=3)) == kept
    with pytest.raises(ValueError, match="top_k could be the number of neighbours or that of sampling: say"):
        pipe(text=chat, top_k=2, do_sample=True)
    pipe(text=chat, generate_kwargs={"do_sample": True, "top_k": 1})
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    short = pipe(text=chat, return_full_text=False, generation_config=config)
    assert short == pipe(text=chat, return_full_text=False, max_new_tokens=3, do_sample=False)
    assert short == pipe(
        text=chat, return_full_text=False, max_new_tokens=3, generation_config=GenerationConfig(max_new_tokens=9)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "none"}, "memory is 'none', expected 'on' or 'off'"),
        ({"memory_top_k": 3}, "memory_top_k is 3, expected 0 to the model's 2"),
        ({"top_k": "two"}, "memory_top_k is 'two', expected 0 to"),
        ({"retrieval_threshold": 80}, "retrieval_threshold is 80, expected a similarity from -1 to 1"),
        ({"exclude_ids": ["a", "b", "c"]}, "exclude has 3 items for 1 queries"),
    ],
)
def test_bad_settings(pipes, images, settings, message):
    with pytest.raises(ValueError, match=message):
        pipes[1](text=chats(images)[0], **settings)
