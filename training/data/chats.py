"""Chats about images: what they must be, and their tokens."""

import reprlib
from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

from ...modeling_tinyalign.bank_rows import BankRows
from ...modeling_tinyalign.row_encoder import BadRow
from ...processing import read_chat
from ...processing.images import is_base64


class _Shown(reprlib.Repr):
    """The start of a value, for messages; of bytes their number."""

    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"<{len(value)} bytes>"


_shown = _Shown()
_shown.maxstring = _shown.maxother = 60
shown = _shown.repr


def to_messages(prompt: str, answer: str) -> list[dict]:
    """Return one question about an image and its answer, as a chat. Raises `BadRow` for a blank question."""
    if not prompt.strip():
        raise BadRow("empty prompt", f"the prompt is {shown(prompt)}, expected text that is not blank: set another")
    return [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def check_messages(messages: list[dict]):
    """Raise `BadRow`, saying what was found, unless this is a chat in which the assistant says something."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("no chat", f"the chat is {shown(messages)}, expected a list of {{'role': ..., 'content': ...}}")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) for part in parts):
            raise BadRow(
                "no chat",
                f"a turn of {role!r} has the content {shown(content)}, expected text or a list of "
                '{"type": "image"} and {"type": "text", "text": ...}',
            )
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        if role == "assistant" and not any(text is not None and str(text).strip() for text in texts):
            raise BadRow(
                "empty answer",
                "an assistant turn is empty, expected text that is not blank: fill it in or remove the row. "
                f"The chat: {shown(messages)}",
            )
        for text in texts:
            if not isinstance(text, str):
                raise BadRow(
                    "no chat",
                    f'a turn of {role!r} has the text {shown(text)}, expected a string (a number as text, "3"): '
                    f"fill it in or remove the row. The chat: {shown(messages)}",
                )
    if all(message.get("role") != "assistant" for message in messages):
        raise BadRow("turn order", f"no token to learn: expected an assistant turn. The chat: {shown(messages)}")


def count_images(messages: list[dict]) -> int:
    """Entries of a chat that are an image."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return sum(part["type"] == "image" for parts in contents for part in parts)


def encode_chat(
    processor: ProcessorMixin,
    messages: list[dict],
    add_generation_prompt: bool = False,
    max_length: int | None = None,
    truncation: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids of a chat about any number of images, with their placeholders, and 1 where the assistant says
    something to learn: in turns without `"train": False`.

    The same as `processor.apply_chat_template`, without needing the images. Raises `BadRow` when there is nothing to
    learn, or when the chat has more than `max_length` tokens and `truncation` is off, or would cut a placeholder or
    all that is to be learnt. `ValueError` when the processor has no chat template.
    """
    if processor.chat_template is None:  # a tokenizer's own does not mark what the assistant says
        raise ValueError(
            "The processor has no chat template, expected one that marks answers with {% generation %}: pass "
            "chat_template, or make it with TinyAlignProcessor.from_vision_text_pretrained, which chooses one."
        )
    encoded = processor.tokenizer.apply_chat_template(
        processor.as_text(read_chat(messages)),
        chat_template=processor.chat_template,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = iter([message.get("train") is not False for message in messages if message["role"] == "assistant"])
    ids, assistant, speaking, learn = [], [], False, False
    for token, spoken in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if spoken and not speaking:
            learn = next(trained)
        speaking = bool(spoken)
        # the template writes one placeholder an image, the model reads one for each of its tokens
        copies = processor.num_image_tokens if token == processor.image_token_id else 1
        ids += [token] * copies
        assistant += [int(speaking and learn)] * copies
    if max_length is None or len(ids) <= max_length:
        return ids, assistant
    found = f"the row has {len(ids)} tokens, those of its images included, expected at most {max_length}"
    if not truncation:
        raise BadRow("over-long", f"{found}: raise max_length, or cut such rows with truncation.")
    if processor.image_token_id in ids[max_length:]:
        raise BadRow("over-long", f"{found}, and to cut it would cut an image: raise max_length or remove the row.")
    if not any(assistant[:max_length]):
        raise BadRow("over-long", f"{found}, and cut to that nothing is left to learn: raise max_length.")
    return ids[:max_length], assistant[:max_length]


def add_captions(messages: list[dict], captions: Sequence[str]) -> list[dict]:
    """Write the captions of neighbours before the text of the first question: text-only retrieval.

    Example: `add_captions(messages, model.retrieve(pixel_values, top_k=5).captions[0])`.
    """
    if not captions:
        return messages
    asked = next(index for index, message in enumerate(messages) if message["role"] == "user")
    content, hint = messages[asked]["content"], f"Similar: {'; '.join(captions)}\n"
    if isinstance(content, str):
        content = hint + content
    else:
        first = next((index for index, part in enumerate(content) if part["type"] == "text"), len(content))
        content = [*content[:first], {"type": "text", "text": hint}, *content[first:]]
    return [*messages[:asked], {**messages[asked], "content": content}, *messages[asked + 1 :]]


def with_captions(
    processor: ProcessorMixin,
    bank: BankRows,
    messages: list[dict],
    neighbours: Sequence[Sequence[int]],
    max_length: int | None = None,
) -> list[dict]:
    """The chat with the captions of its images' neighbours in the first question: all that `max_length` tokens have
    room for, the most similar first.

    Args:
        neighbours: Rows of the bank, `(images, k)`; -1 in empty slots.
    """
    captions = [[row["caption"] for row in bank.rows(list(image)) if row is not None] for image in neighbours]
    for kept in range(max(map(len, captions), default=0), 0, -1):
        candidate = add_captions(messages, [caption for image in captions for caption in image[:kept]])
        if max_length is None or len(encode_chat(processor, candidate)[0]) <= max_length:
            return candidate
    return messages


def images_of(row: dict[str, Any]) -> list:
    """The images of a row as they are stored, none for a row of text: its `images`, or its `image`."""
    images = row.get("images")
    if images is None:
        image = row.get("image")
        images = image if isinstance(image, list) else [image]
    nothing = (type(None), float)  # pandas writes NaN for none
    images = [image for image in images if not isinstance(image, nothing) and image != ""]
    return [
        image for image in images if not isinstance(image, dict) or any(part is not None for part in image.values())
    ]


def name_row(row: dict[str, Any], images: list) -> str:
    """`row 7 (id 1F578, images/a.png)`: its number in the data set, and what it says of where it is from."""
    paths = [image.get("path") if isinstance(image, dict) else image for image in images]
    origin = [f"id {row['id']}"] if row.get("id") is not None else []
    origin += [path for path in paths if isinstance(path, str) and not is_base64(path)]
    name = "a row" if row.get("row") is None else f"row {row['row']}"  # a stream's may not be counted
    return name + (f" ({', '.join(origin)})" if origin else "")
