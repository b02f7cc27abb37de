"""Chats about images as training batches."""

import copy
import mmap
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from ...modeling_tinyalign.memory_bank import MemoryBank
from .chats import BadRow, check_messages, count_images, encode_chat, images_of, name_row, with_captions
from .memory_dropout import MemoryDropout
from .rows import open_image


class TrainingCollator:
    """Rows of a data set to a batch. A row has `messages`, a chat about any number of images, and

    - `image` or `images`, or their rows in `vision_features`, `feature_index` (a number or a list of them);
    - with a `bank`, `memory_ids` `(k,)` or `(images, k)`, the neighbours that [`find_neighbours`] found, and, if they
      are wanted, their similarities `memory_scores`. Nothing is searched here. And `source_ids`, the names of the
      images: without `memory_ids` the model looks their neighbours up, without the images themselves.

    The batch has `input_ids`, `attention_mask`, `labels` (what the assistant says and its end, -100 elsewhere), all
    padded on the right, and of its n images, those of the first row first, `pixel_values (n, 3, H, W)` or
    `vision_features (n, T, C)`; `memory_ids (n, k)` with `memory_scores (n, k)` and, of a bank with values,
    `memory_values (n, k, L, D)`; and `exclude_ids`, those of all images in its row, if there are `source_ids`.

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
        self.bank = None if bank is None else bank.rows_only()
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
            "input_ids": pad_sequence(ids, True, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
            "labels": pad_sequence(labels, True, -100),
        }
        if self.name_rows:
            batch["rows"] = [name_row(row, images_of(row)) for row in rows]
        return {**batch, **self.image_inputs(rows, counts)}

    def image_inputs(self, rows: list[dict[str, Any]], counts: list[int]) -> dict[str, torch.Tensor]:
        """Return the inputs of a batch's images, `counts` in each row, and of their neighbours."""

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
                queries = [self.processor.query_text_of(row["messages"]) for row in rows]
                inputs.update(self.processor.query_inputs(queries))
        elif self.bank is not None and not self.prompt_captions:
            ids, scores = zip(
                *(found for row, count in zip(rows, counts, strict=True) for found in self.neighbours(row, count)),
                strict=True,
            )
            inputs["memory_ids"] = torch.from_numpy(np.stack(ids))
            if self.bank.config.value_size:
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
        text = "".join([str(row["messages"]), *(row.get("source_ids") or [])])  # a chat may be that of many images
        return [self.dropout(*found, text, number) for number, found in enumerate(zip(ids, scores, strict=True))]

    def for_evaluation(self) -> "TrainingCollator":
        """Return a copy without dropout and names."""
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


def _of_images(row: dict[str, Any], name: str, count: int) -> list:
    """Return a column's values, one for each of the `count` images of a row's chat."""
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
    try:
        return [open_image(image) for image in images_of(row)]
    except BadRow as error:
        raise ValueError(
            f"An image of a row cannot be used: {error}. Repair it or remove the row. The row's chat: "
            f"{str(row['messages'])[:200]}"
        ) from error


def _column(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(
            f"A row has no {name!r}, its columns are {sorted(row)}: see TrainingCollator for what it needs."
        )
    return row[name]
