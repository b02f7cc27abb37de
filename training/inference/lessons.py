"""Lessons: pictures with a line each that one visitor has taught, beside a memory bank that visitors share."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from huggingface_hub import CommitInfo
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.bank_arrays import cache_root, quantize
from ...modeling_tinyalign.bank_format import matrix
from ...modeling_tinyalign.bank_rows import renumbered
from ...modeling_tinyalign.key_encoder import evaluating
from ...modeling_tinyalign.outputs import probabilities
from ...modeling_tinyalign.row_encoder import PairReader, RowEncoder, finished, read_thumbnail
from ..bank.folders import check_new_folder
from .answers import LOCK
from .pictures import Picture, Pictures


@dataclass
class Lesson:
    """A row that was taught: what a bank would hold of it, and nowhere but in memory.

    Attributes:
        row: its source_id, caption, thumbnail (PIL, or None) and other columns.
        picture: its name in `Pictures`.
        replaces: True if the bank has rows of the same picture, which are not found beside it.
    """

    row: dict[str, Any]
    batch: pa.RecordBatch
    key: torch.Tensor
    value: torch.Tensor | None
    picture: str
    replaces: bool


@dataclass
class Neighbour:
    """A row that was found, of the shared bank or taught.

    Attributes:
        id: in the bank; lessons are numbered behind its rows, as in a bank that they are saved to.
        similarity: of its key and the picture's.
        caption, source_id, thumbnail: as of a bank's row; a PIL image, or None in a bank without thumbnails.
        lesson: True if it was taught.
        used: False below the threshold: nothing of it was read.
        probability: that it is right, None unless the bank was calibrated.
    """

    id: int
    similarity: float
    caption: str
    source_id: str
    thumbnail: Image.Image | None
    lesson: bool
    used: bool = True
    probability: float | None = None

    @property
    def notes(self) -> list[str]:
        """Remarks for a user, beside the caption."""
        notes = [f"similarity {self.similarity:.2f}"]
        if self.probability is not None:
            notes.append(f"right with {self.probability:.0%}")
        if self.lesson:
            notes.append("taught by you")
        if not self.used:
            notes.append("not used")
        return notes


class Lessons:
    """Lessons of one visitor: in memory alone, found beside the rows of a bank, and forgotten without a trace.

    Args:
        pictures: shared by all visitors of a model.

    Attributes:
        bank: the model's, whose encoders make the keys; shared, never copied. None before one is needed. Lessons stay
            beside the bank that they were taught beside.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, pictures: Pictures | None = None):
        self.model, self.processor = model, processor
        self.bank: MemoryBank | None = None
        self.pictures = Pictures(model) if pictures is None else pictures
        self._lessons: list[Lesson] = []

    def __len__(self) -> int:
        return len(self._lessons)

    @property
    def rows(self) -> list[dict]:
        """The source_id, caption and thumbnail of each, in the order they were taught."""
        return [lesson.row for lesson in self._lessons]

    @property
    def _replaced(self) -> list[str]:
        """The source_ids of the bank's rows that lessons stand in place of."""
        return [lesson.row["source_id"] for lesson in self._lessons if lesson.replaces]

    def require_bank(self) -> MemoryBank:
        """Return the bank; `ValueError` if there is none to read or to teach."""
        if self.model.config.memory_top_k == 0:
            raise ValueError("This model has no memory: use one whose memory_top_k is not 0.")
        if not self._lessons and self.bank is not self.model.memory_bank:  # not before: it may have to be downloaded
            self.bank = self.model.memory_bank
        if self.bank is None:
            raise ValueError("There is no memory bank: pass --memory_bank, attach one, or answer with memory off.")
        return self.bank

    def teach(self, image: Any, caption: str) -> dict:
        """Remember a picture (PIL, bytes, path) by a line, in place of what was known of the same; return its row.
        ValueError says why the picture or the line cannot be used, or that there is no bank.
        """
        bank = self.require_bank()
        columns, encoders = bank.config.columns, (bank.value_encoder, bank.key_encoder)
        reader = PairReader(self.processor.decode_image, keep_columns=columns)
        settings = {"keep_columns": columns, "thumbnail_size": bank.config.thumbnail_size}
        with LOCK, evaluating(self.model, bank.value_encoder):
            row = reader(0, {**dict.fromkeys(columns), "image": image, "caption": caption})
            picture = self.look_at(row.image)
            settings["vision_features"] = picture.features
            encoder = RowEncoder(self.model, self.processor, *encoders, reader, **settings)
            (batch,) = finished([encoder.encode([row])], bank.key_encoder)
            lesson = self._lesson(batch, picture.name)
            self._drop(row.source_id)
            self._lessons.append(lesson)
        return lesson.row

    def look_at(self, image: Image.Image) -> Picture:
        """Return a picture as the model's vision tower sees it; the caller holds `LOCK`."""
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
        return self.pictures.look_at(pixels.to(self.model.device))

    def _lesson(self, batch: pa.RecordBatch, picture: str) -> Lesson:
        """Return a lesson, with key and value rounded as the bank's are."""
        config, value = self.bank.config, None
        key = matrix(batch, "key")[0]
        if config.quantized:
            key = key.astype(np.float16).astype(np.float32)
        if config.value_size:
            value = matrix(batch, "value").reshape(1, *config.value_shape)
            value = torch.tensor(quantize(value)[2] if config.quantized else value)[0].float()
        names = [name for name in batch.schema.names if name not in ("id", "key", "value")]
        (row,) = batch.select(names).to_pylist()
        row["thumbnail"] = read_thumbnail(row["thumbnail"]["bytes"]) if "thumbnail" in names else None
        return Lesson(row, batch, torch.tensor(key), value, picture, len(self.bank.ids_of(row["source_id"])) > 0)

    def forget(self, source_id: str | None = None) -> int:
        """Forget what was taught of a picture, or all of it; return how many lessons that were."""
        with LOCK:
            return self._drop(source_id)

    def _drop(self, source_id: str | None) -> int:
        gone = [lesson for lesson in self._lessons if source_id in (None, lesson.row["source_id"])]
        self._lessons = [lesson for lesson in self._lessons if lesson not in gone]
        for lesson in gone:
            self.pictures.forget(lesson.picture)
            if self.model.config.reads_captions:
                self.model.caption_tokenizer.captions.pop(lesson.row["caption"], None)
        return len(gone)

    # ------------------------------------------------------------------ reading them

    def neighbours(
        self, picture: Picture, top_k: int, query: dict[str, torch.Tensor], exclude: Sequence[str] = ()
    ) -> tuple[list[Neighbour], float | None]:
        """Return the nearest rows of the bank and lessons, best first, and the probability that none is right, which
        is None unless the bank was calibrated.

        Args:
            query: `query_input_ids` and `query_attention_mask`, for language-space keys.
            exclude: source_ids to leave out.
        """
        bank = self.require_bank()
        size, calibration = len(bank), None if bank.any_tower else bank.config.calibration
        # the probabilities were fitted to so many similarities, whatever is asked for
        depth = top_k if calibration is None else max(top_k, calibration.top_k)
        key, scores, ids = picture.neighbours(bank, min(depth, size), query, [*exclude, *self._replaced])
        found = [item for item in zip(scores[0].tolist(), ids[0].tolist(), strict=True) if item[1] >= 0]
        for number, lesson in enumerate(self._lessons, start=size):
            if lesson.row["source_id"] not in exclude:
                found.append((float(lesson.key @ key[0].cpu()), number))
        found = sorted(found, key=lambda item: (-item[0], item[1]))[:depth]
        neighbours = [self._neighbour(score, number) for score, number in found[:top_k]]
        if calibration is None or not found:
            return neighbours, None
        right, none = probabilities(calibration, torch.tensor([[score for score, _ in found]]))
        for neighbour, probability in zip(neighbours, right[0].tolist(), strict=False):  # fewer than found
            neighbour.probability = probability
        return neighbours, float(none[0])

    def _neighbour(self, score: float, number: int) -> Neighbour:
        is_lesson = number >= len(self.bank)
        if is_lesson:
            row = self._lessons[number - len(self.bank)].row
        else:
            row = {**self.bank.rows([number])[0], "thumbnail": self.bank.thumbnail(number)}
        return Neighbour(number, score, row["caption"], row["source_id"], row["thumbnail"], is_lesson)

    def value(self, number: int) -> torch.Tensor:
        """Return the value `(num_latents, latent_dim)`, float32, of a row of the bank or a lesson."""
        if number < len(self.bank):
            return self.bank.gather([number])[0]
        return self._lessons[number - len(self.bank)].value

    # ------------------------------------------------------------------ keeping them

    def save(self, folder: str | os.PathLike) -> None:
        """Write a new bank: the shared one's rows, but of pictures that were taught anew, and the lessons. ValueError
        if there is something in the folder, or no bank.
        """
        check_new_folder(Path(folder))
        with self._as_bank() as bank:
            bank.save_pretrained(folder)

    def push(self, repo_id: str, **kwargs) -> CommitInfo:
        """Upload the same; arguments as of `MemoryBank.push_to_hub`."""
        with self._as_bank() as bank:
            return bank.push_to_hub(repo_id, **kwargs)

    @contextlib.contextmanager
    def _as_bank(self) -> Iterator[MemoryBank]:
        """Give a bank with the lessons behind its rows, of which no local files stay."""
        bank = self.require_bank()
        replaced = pa.array(self._replaced, pa.string())
        kept = (part.filter(pc.invert(pc.is_in(part["source_id"], replaced))) for part in bank.batches())
        lessons = (lesson.batch for lesson in self._lessons)
        tables = (pa.Table.from_batches([batch]) for batch in itertools.chain(kept, lessons))
        before = set(cache_root().glob("bank-*"))  # with the same rows it may be there already, and in use
        bank = bank.keep_facts(bank.with_rows(renumbered(tables)), "parts", "limits")
        try:
            yield bank
        finally:
            if bank.folder not in before:
                shutil.rmtree(bank.folder, ignore_errors=True)
