"""Chats about images as training batches."""

import mmap
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from ..modeling_tinyalign.bank_images import load_image
from ..modeling_tinyalign.memory_bank import MemoryBank


def to_messages(prompt: str, answer: str) -> list[dict]:
    """One question about an image and its answer, as a chat. Raises `ValueError` when one of them is no text."""
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"the {name} is {text!r}, expected text that is not blank: fill it in or remove the row (a number "
                'is written as text, "3")'
            )
    return [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def check_messages(messages: list[dict]):
    """Raises `ValueError`, saying what was found, unless this is a chat in which the assistant says something."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"the chat is {str(messages)[:200]}, expected a list of {{'role': ..., 'content': ...}}")
    spoken = False
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(
                f"a turn of {message.get('role')!r} has the content {str(content)[:200]}, expected text or a list of "
                '{"type": "image"} and {"type": "text", "text": ...}'
            )
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(
                    f"a turn of {message.get('role')!r} has the text {text!r}, expected a string: fill it in or "
                    f"remove the row. The chat: {str(messages)[:200]}"
                )
        if message.get("role") == "assistant":
            spoken = True
            if not "".join(texts).strip():
                raise ValueError(
                    "an assistant turn is empty, expected text that is not blank: fill it in or remove the row. "
                    f"The chat: {str(messages)[:200]}"
                )
    if not spoken:
        raise ValueError(f"no token to learn: expected an assistant turn. The chat: {str(messages)[:200]}")


def encode_chat(
    processor: ProcessorMixin, messages: list[dict], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """
    Token ids of a chat about one image, with the image's placeholders, and 1 where the assistant speaks.

    The same as `processor.apply_chat_template`, without needing the image. Raises `ValueError` when the chat has more
    or fewer than one image.
    """
    encoded = processor.tokenizer.apply_chat_template(
        [processor._fold_message(message) for message in messages],
        chat_template=processor.chat_template,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, assistant = encoded["input_ids"], encoded["assistant_masks"]
    if ids.count(processor.image_token_id) != 1:
        raise ValueError(
            f"A chat has {ids.count(processor.image_token_id)} images, expected 1: put one "
            f'{{"type": "image"}} in a user turn. The chat: {str(messages)[:200]}'
        )
    at, tokens = ids.index(processor.image_token_id), processor.num_image_tokens
    ids = ids[:at] + [processor.image_token_id] * tokens + ids[at + 1 :]
    return ids, assistant[:at] + [0] * tokens + assistant[at + 1 :]


class TrainingCollator:
    """
    Rows of a data set to a batch. A row has `messages`, a chat about one image, and

    - `image`, or with `vision_features` its row in them, `feature_index`;
    - with a `bank`, `memory_ids`, the neighbours that [`find_neighbours`] found. Nothing is searched here.

    The batch has `input_ids`, `attention_mask`, `labels` (the assistant's turns and their end, -100 elsewhere), all
    padded on the right, and `pixel_values (n, 3, H, W)` or `vision_features (n, T, C)`, `memory_ids (n, k)`,
    `memory_values (n, k, L, D)`.

    Raises `ValueError` for a row without anything to learn, or without what is named above.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        vision_features: np.ndarray | None = None,
        bank: MemoryBank | None = None,
    ):
        self.processor = processor
        self.vision_features = vision_features
        self.bank = bank

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, labels = [], []
        for row in rows:
            messages = _column(row, "messages")
            try:
                check_messages(messages)
                row_ids, assistant = encode_chat(self.processor, messages)
            except ValueError as error:
                index = row.get("feature_index")
                name = "A row" if index is None else f"The row with feature_index {index}"
                raise ValueError(f"{name} cannot be trained on: {error}") from error
            if not any(assistant):
                raise ValueError(
                    "A chat has no token to learn: expected a chat template that marks what the assistant says with "
                    f"{{% generation %}}. The chat: {str(messages)[:200]}"
                )
            ids.append(torch.tensor(row_ids))
            labels.append(torch.tensor(row_ids).masked_fill(torch.tensor(assistant) == 0, -100))
        batch = {
            "input_ids": pad_sequence(ids, True, self.processor.tokenizer.pad_token_id or 0),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
            "labels": pad_sequence(labels, True, -100),
        }
        return {**batch, **self.image_inputs(rows)}

    def image_inputs(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the batch says about its images and their neighbours."""
        inputs = {}
        if self.vision_features is not None:
            index = np.array([_column(row, "feature_index") for row in rows])
            inputs["vision_features"] = torch.from_numpy(self.vision_features[index])
        else:
            images = [_image_of(row) for row in rows]
            inputs.update(self.processor.image_processor(images=images, return_tensors="pt"))
        if self.bank is not None:
            inputs["memory_ids"] = torch.tensor([_column(row, "memory_ids") for row in rows])
            inputs["memory_values"] = self.bank.gather(inputs["memory_ids"], torch.float16)
        return inputs

    def __getstate__(self) -> dict:
        """A memory-mapped file goes to a worker process by name, where it would be copied whole."""
        state = dict(self.__dict__)
        features = self.vision_features
        if isinstance(features, np.memmap) and isinstance(features.base, mmap.mmap):
            state["vision_features"] = str(features.filename)
        return state

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        if isinstance(self.vision_features, str):
            self.vision_features = np.load(self.vision_features, mmap_mode="r", allow_pickle=False)


def _image_of(row: dict[str, Any]) -> Image.Image:
    image = _column(row, "image")
    try:
        return load_image(image)
    except ValueError as error:
        path = image.get("path") if isinstance(image, dict) else None
        raise ValueError(
            f"The image{'' if path is None else f' {path}'} of a row cannot be used: {error}. Repair it or remove the "
            f"row. The row's chat: {str(row['messages'])[:200]}"
        ) from error


def _column(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(
            f"A row has no {name!r}, its columns are {sorted(row)}: see TrainingCollator for what it needs."
        )
    return row[name]
