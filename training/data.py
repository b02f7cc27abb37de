"""Chats about images as training batches."""

import copy
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from ..modeling_tinyalign.bank_images import load_image
from ..modeling_tinyalign.bank_rows import BankRows
from ..modeling_tinyalign.memory_bank import MemoryBank
from ..processing.chat_templates import add_captions
from .loss_check import name_row
from .memory_dropout import MemoryDropout


class BadRow(ValueError):
    """A row that cannot be trained on. `kind` is one of a few words (`"empty answer"`), the message says more."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def to_messages(prompt: str, answer: str) -> list[dict]:
    """One question about an image and its answer, as a chat. Raises `BadRow` when one of them is no text."""
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise BadRow(
                f"empty {name}" if text is None or isinstance(text, str) else "no chat",
                f"the {name} is {text!r}, expected text that is not blank: fill it in or remove the row (a number "
                'is written as text, "3")',
            )
    return [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def check_messages(messages: list[dict]):
    """Raises `BadRow`, saying what was found, unless this is a chat in which the assistant says something."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow(
            "no chat", f"the chat is {str(messages)[:200]}, expected a list of {{'role': ..., 'content': ...}}"
        )
    spoken = False
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) for part in parts):
            raise BadRow(
                "no chat",
                f"a turn of {message.get('role')!r} has the content {str(content)[:200]}, expected text or a list of "
                '{"type": "image"} and {"type": "text", "text": ...}',
            )
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        for text in texts:
            if text is None or not isinstance(text, str):
                raise BadRow(
                    "empty answer" if message.get("role") == "assistant" and text is None else "no chat",
                    f"a turn of {message.get('role')!r} has the text {text!r}, expected a string: fill it in or "
                    f"remove the row. The chat: {str(messages)[:200]}",
                )
        if message.get("role") == "assistant":
            spoken = True
            if not "".join(texts).strip():
                raise BadRow(
                    "empty answer",
                    "an assistant turn is empty, expected text that is not blank: fill it in or remove the row. "
                    f"The chat: {str(messages)[:200]}",
                )
    if not spoken:
        raise BadRow("turn order", f"no token to learn: expected an assistant turn. The chat: {str(messages)[:200]}")


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
    """
    Token ids of a chat about any number of images, with their placeholders, and 1 where the assistant says something
    to learn: in turns without `"train": False`.

    The same as `processor.apply_chat_template`, without needing the images. Raises `BadRow` when there is nothing to
    learn, or when the chat has more than `max_length` tokens and `truncation` is off, or would cut a placeholder or
    all that is to be learnt.
    """
    encoded = processor.tokenizer.apply_chat_template(
        [processor._fold_message(message) for message in messages],
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


def images_of(row: dict[str, Any]) -> list:
    """The images of a row as they are stored, none for a row of text: its `images`, or its `image`."""
    images = row.get("images")
    if images is None:
        image = row.get("image")
        images = image if isinstance(image, list) else [image]
    return [image for image in images if image is not None and image != ""]


class TrainingCollator:
    """
    Rows of a data set to a batch. A row has `messages`, a chat about any number of images, and

    - `image` or `images`, or their rows in `vision_features`, `feature_index` (a number or a list of them);
    - with a `bank`, `memory_ids` `(k,)` or `(images, k)`, the neighbours that [`find_neighbours`] found, and, if they
      are wanted, their similarities `memory_scores`. Nothing is searched here. And `source_ids`, the names of the
      images: without `memory_ids` the model looks their neighbours up, without the images themselves.

    The batch has `input_ids`, `attention_mask`, `labels` (what the assistant says and its end, -100 elsewhere), all
    padded on the right, and of its n images, those of the first row first, `pixel_values (n, 3, H, W)` or
    `vision_features (n, T, C)`, and `memory_ids (n, k)` with `memory_values (n, k, L, D)` and `memory_scores (n, k)`,
    and `exclude_ids`, those of all images in its row, if there are `source_ids`.

    Args:
        bank: Its rows are read, from memory-mapped files; its encoders do not go to worker processes.
        max_length, truncation: See [`encode_chat`].
        dropout: Takes the neighbours that are needed from those of a row, and some of them away.
        name_rows: Add `rows`, the names of the rows for messages: their number `row`, and their `id`.
        prompt_captions: Of more than 0 neighbours the captions are written into the question, and nothing else of them
            is given (text-only RAG).

    Raises `ValueError` for a row without anything to learn, or without what is named above.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        vision_features: np.ndarray | None = None,
        bank: MemoryBank | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        dropout: MemoryDropout | None = None,
        prompt_captions: int = 0,
        name_rows: bool = False,
    ):
        self.processor = processor
        self.vision_features = vision_features
        self.bank = None if bank is None else bank.without_encoders()
        self.max_length, self.truncation = max_length, truncation
        self.dropout, self.prompt_captions = dropout, prompt_captions
        self.name_rows = name_rows

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, labels, counts = [], [], []
        for row in rows:
            messages = self.messages(row)
            try:
                check_messages(messages)
                row_ids, assistant = encode_chat(
                    self.processor, messages, max_length=self.max_length, truncation=self.truncation
                )
            except BadRow as error:
                index = row.get("feature_index")
                name = "A row" if index is None else f"The row with feature_index {index}"
                raise ValueError(f"{name} cannot be trained on: {error}") from error
            if not any(assistant):
                raise ValueError(
                    "A chat has no token to learn: expected a chat template that marks what the assistant says with "
                    f"{{% generation %}}. The chat: {str(messages)[:200]}"
                )
            counts.append(row_ids.count(self.processor.image_token_id) // self.processor.num_image_tokens)
            ids.append(torch.tensor(row_ids))
            labels.append(torch.tensor(row_ids).masked_fill(torch.tensor(assistant) == 0, -100))
        batch = {
            "input_ids": pad_sequence(ids, True, self.processor.tokenizer.pad_token_id or 0),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
            "labels": pad_sequence(labels, True, -100),
        }
        if self.name_rows:
            batch["rows"] = [name_row(row, images_of(row)) for row in rows]
        return {**batch, **self.image_inputs(rows, counts)}

    def image_inputs(self, rows: list[dict[str, Any]], counts: list[int]) -> dict[str, torch.Tensor]:
        """What the batch says about its images, `counts` in each row, and their neighbours."""

        def of_images(name: str) -> list:
            return [value for row, count in zip(rows, counts, strict=True) for value in _of_images(row, name, count)]

        cached = self.vision_features is not None and "feature_index" in rows[0]
        images = of_images("feature_index" if cached else "images")
        if not images:
            return {}
        if not cached:
            inputs = dict(self.processor.image_processor(images=images, return_tensors="pt"))
        else:
            inputs = {"vision_features": torch.from_numpy(self.vision_features[images])}
        if self.bank is not None and "source_ids" in rows[0]:
            of_images("source_ids")  # as many as images
            inputs["exclude_ids"] = [
                row["source_ids"] for row, count in zip(rows, counts, strict=True) for _ in range(count)
            ]
        if "exclude_ids" in inputs and "memory_ids" not in rows[0]:
            if self.processor.key_space == "language":
                queries = [self.processor._query_text(row["messages"]) for row in rows]
                queries = [text for text, count in zip(queries, counts, strict=True) for _ in range(count)]
                inputs.update(query_inputs(self.processor, queries))
        elif self.bank is not None and not self.prompt_captions:
            ids, scores = zip(
                *(found for row, count in zip(rows, counts, strict=True) for found in self.neighbours(row, count)),
                strict=True,
            )
            inputs["memory_ids"] = torch.from_numpy(np.stack(ids))
            inputs["memory_values"] = self.bank.gather(inputs["memory_ids"], torch.float16)
            if "memory_scores" in rows[0]:
                inputs["memory_scores"] = torch.from_numpy(np.stack(scores).astype(np.float32))
        return inputs

    def messages(self, row: dict[str, Any]) -> list[dict]:
        """The chat of a row, with as many of its neighbours' captions as are wanted and fit."""
        messages = _column(row, "messages")
        if not self.prompt_captions:
            return messages
        neighbours = [ids for ids, _ in self.neighbours(row, count_images(messages))]
        return with_captions(self.processor, self.bank, messages, neighbours, self.max_length)

    def neighbours(self, row: dict[str, Any], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and similarities of the neighbours of each of a row's images, as the model gets them."""
        ids = [np.array(image) for image in _of_images(row, "memory_ids", count)]
        scores = [np.zeros(len(image)) for image in ids]
        if "memory_scores" in row:
            scores = [np.array(image) for image in _of_images(row, "memory_scores", count)]
        if any(len(image) != len(similar) for image, similar in zip(ids, scores, strict=True)):
            raise ValueError(
                f"A row has memory_ids {row['memory_ids']}, but memory_scores {row['memory_scores']}: "
                "take both from one look-up, they must be as many."
            )
        if self.dropout is None:
            return list(zip(ids, scores, strict=True))
        chat = str(row["messages"])
        return [self.dropout(*found, chat, number) for number, found in enumerate(zip(ids, scores, strict=True))]

    def for_evaluation(self) -> "TrainingCollator":
        """The same without dropout and names."""
        collator = copy.copy(self)
        collator.name_rows = False
        collator.dropout = None if self.dropout is None else MemoryDropout(0.0, self.dropout.top_k)
        return collator

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


def with_captions(
    processor: ProcessorMixin,
    bank: BankRows,
    messages: list[dict],
    neighbours: Sequence[Sequence[int]],
    max_length: int | None = None,
) -> list[dict]:
    """
    The chat with the captions of its images' neighbours in the first question: all that `max_length` tokens have room
    for, the most similar first.

    Args:
        neighbours: Rows of the bank, `(images, k)`; -1 in empty slots.
    """
    captions = [[row["caption"] for row in bank.rows(list(image)) if row is not None] for image in neighbours]
    for kept in range(max(map(len, captions), default=0), 0, -1):
        candidate = add_captions(messages, [caption for image in captions for caption in image[:kept]])
        if max_length is None or len(encode_chat(processor, candidate)[0]) <= max_length:
            return candidate
    return messages


def query_inputs(processor: ProcessorMixin, queries: list[str]) -> dict[str, torch.Tensor]:
    """Questions as `query_input_ids` and `query_attention_mask` `(n, Q)`, for keys in the language space."""
    inputs = processor.tokenizer(
        queries,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {f"query_{name}": inputs[name] for name in ("input_ids", "attention_mask")}


def _of_images(row: dict[str, Any], name: str, count: int) -> list:
    """What a column says about each of the `count` images of a row's chat."""
    values = _load_images(row) if name == "images" else row.get(name)
    if values is None:
        values = [] if count == 0 else _column(row, name)
    if isinstance(values, int) or (name.startswith("memory_") and values and isinstance(values[0], (int, float))):
        values = [values]  # of one image
    if len(values) != count:
        raise ValueError(
            f"A row has {len(values)} {name}, but its chat is about {count} images: put one "
            f'{{"type": "image"}} in a user turn for each. The chat: {str(row["messages"])[:200]}'
        )
    return values


def _load_images(row: dict[str, Any]) -> list[Image.Image]:
    loaded = []
    for image in images_of(row):
        try:
            loaded.append(load_image(image))
        except ValueError as error:
            path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
            raise ValueError(
                f"The image{'' if path is None else f' {path}'} of a row cannot be used: {error}. Repair it or "
                f"remove the row. The row's chat: {str(row['messages'])[:200]}"
            ) from error
    return loaded


def _column(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(
            f"A row has no {name!r}, its columns are {sorted(row)}: see TrainingCollator for what it needs."
        )
    return row[name]
