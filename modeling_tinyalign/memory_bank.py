"""The memory bank: images with captions as (key, value) rows, searched by image."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, DatasetCard
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from .bank_arrays import SCRATCH_PREFIX, cache_root, lay_out
from .bank_folder import lay_out_folder, open_folder, read_value_encoder, write_shards
from .bank_format import (
    CARD_FACTS_NAME,
    CONFIG_NAME,
    KEY_ENCODER_NAME,
    LEFT_OUT_NAME,
    VALUE_ENCODER_NAME,
    BankConfig,
    CalibrationConfig,
    config_schema,
    file_sha256,
    pa,
)
from .bank_index import open_index
from .bank_rows import BankRows, renumbered
from .connectors import check_tensor
from .files import CARD_NAME, SHARDS, installed_package, make_bank_card, push_files, replace_folder, scratch_folder
from .key_encoder import KeyEncoder, evaluating
from .row_encoder import LeftOutRow, PairReader, RowEncoder, check_as_many, check_many, finished, stored_images
from .value_encoder import ValueEncoder

logger = logging.get_logger(__name__)


class MemoryBank(BankRows):
    """Rows of image, caption, key and value, with the encoders that made them.

    It is immutable: `add`, `remove` and `shuffled` return a new bank.

    Attributes:
        probe_keys: `(4, raw_dim)`, raw keys of four fixed synthetic images.
        repo_id, revision: the Hub repository and commit it came from or was pushed to, or None.
        left_out: rows that `build` or `add` has left out, and why; `save_pretrained` writes them to left_out.jsonl.
        card_facts: content of card_facts.json, which `build` fills in, or of the folder it was loaded from.
    """

    any_tower = False
    card_facts: str | None = None

    def __init__(
        self,
        config: BankConfig,
        key_encoder: KeyEncoder,
        probe_keys: torch.Tensor,
        value_encoder: ValueEncoder | Path | None,
        repo_id: str | None = None,
        revision: str | None = None,
    ):
        super().__init__(config)
        self.key_encoder, self.probe_keys = key_encoder.requires_grad_(False), probe_keys
        self._value_encoder = value_encoder
        self.repo_id, self.revision = repo_id, revision
        self.left_out: list[LeftOutRow] = []

    def __repr__(self) -> str:
        config = self.config
        values = f"values of {config.num_latents} x {config.latent_dim}" if config.value_size else "no values"
        return (
            f"MemoryBank({len(self)} rows, keys of {config.key_dim}, {values}, {config.key_encoder.key_space} space, "
            f"tower {config.tower.name})"
        )

    @property
    def value_encoder(self) -> ValueEncoder | None:
        """The frozen value encoder, read from the bank's folder when it is first asked for; None without values."""
        if self.config.value_encoder is None:
            return None
        if isinstance(self._value_encoder, Path):
            self._value_encoder = read_value_encoder(self._value_encoder, self.config, self.repo_id is not None)
        return self._value_encoder

    @classmethod
    def build(
        cls,
        dataset: Iterable[dict],
        model: PreTrainedModel,
        processor: ProcessorMixin,
        value_encoder: ValueEncoder | None = None,
        **settings,
    ) -> MemoryBank:
        """Encode a data set into a bank: see `tinyalign_vlm.training.bank.build.build_bank`, which does it;
        ImportError where the package is not installed. A checkpoint's own code opens banks, but builds none.
        """
        build = installed_package("bank.build", "Building a memory bank")
        return build.build_bank(dataset, model, processor, value_encoder, **settings)

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[pa.RecordBatch],
        config: BankConfig,
        key_encoder: KeyEncoder,
        probe_keys: torch.Tensor,
        value_encoder: ValueEncoder | None,
        left_out: Sequence[LeftOutRow] = (),
    ) -> MemoryBank:
        """Make a bank of rows with keys and values; arguments as of `lay_out` and of the class."""
        config = lay_out(batches, config, "The new memory bank")
        config.num_left_out += len(left_out)  # which may have grown with the batches
        bank = cls(config, key_encoder, probe_keys, value_encoder)
        bank.left_out = list(left_out)
        return bank

    def with_rows(
        self, batches: Iterable[pa.RecordBatch], left_out: Sequence[LeftOutRow] = (), quantized: bool | None = None
    ) -> MemoryBank:
        """Return a bank of other rows, made by this bank's encoders; quantized as this one by default."""
        config = replace(self.config, quantized=self.config.quantized if quantized is None else quantized)
        encoder = copy.deepcopy(self.key_encoder)
        bank = MemoryBank.from_batches(batches, config, encoder, self.probe_keys, self.value_encoder, left_out)
        bank.index = self.index
        if bank.config.is_calibration_stale:
            logger.warning(
                f"The bank of {len(bank)} rows was calibrated with {config.calibration.num_rows}: that no neighbour "
                "is right is now more probable than retrieve() says. Run `tinyalign bank calibrate` again."
            )
        return bank

    def row_encoder(self, model: PreTrainedModel, processor: ProcessorMixin, **settings) -> RowEncoder:
        """Return a `RowEncoder` with these settings and this bank's encoders; another vision tower is refused."""
        self.check_probes(model)
        settings |= {"keep_columns": self.config.columns, "thumbnail_size": self.config.thumbnail_size}
        return RowEncoder(model, processor, self.value_encoder, self.key_encoder, **settings)

    def add(
        self,
        images_or_rows: Iterable[Any],
        model: PreTrainedModel,
        processor: ProcessorMixin,
        captions: Sequence[str] | str | None = None,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        keep_duplicates: bool = False,
        **settings,
    ) -> MemoryBank:
        """Return a bank with more rows behind this one's, whose ids stay.

        Keys and values are made with this bank's own encoders, as they were fitted: nothing is retrained. ValueError,
        naming its number, if a row is bad; or if the model has another vision tower.

        Args:
            images_or_rows: dicts with an image (PIL, bytes, path) and a caption; or an image or many, with `captions`.
            keep_duplicates: keep images that an earlier row has, pixel for pixel; else they are only in `left_out`.
            settings: `batch_size`, `skip_bad_rows` and `vision_features` of `RowEncoder`.
        """
        rows, blank = images_or_rows, dict.fromkeys(self.config.columns)
        if isinstance(captions, str):
            rows, captions = [rows], [captions]
        check_many(rows, "images_or_rows")
        check_as_many("captions", captions, rows)
        check_as_many("vision_features", settings.get("vision_features"), rows)
        if captions is not None:
            pairs = zip(rows, captions, strict=True)
            rows = ({**blank, image_column: image, caption_column: text} for image, text in pairs)
        settings["seen"] = None if keep_duplicates else self.image_names()
        reader = PairReader(processor.decode_image, image_column, caption_column, self.config.columns)
        encoder = self.row_encoder(model, processor, read_row=reader, next_id=len(self), **settings)
        with evaluating(model, encoder.value_encoder):
            rows = enumerate(stored_images(rows, image_column))
            added = finished(encoder.batches(rows), self.key_encoder)
            bank = self.with_rows(itertools.chain(self.batches(), added), encoder.left_out)
        return self.keep_facts(bank, "parts", "limits")

    def remove(self, rows: int | str | Sequence[int | str]) -> MemoryBank:
        """Return a bank without some rows, the others numbered anew; ValueError if there is no such row, or no other.

        Args:
            rows: the id of a row, a `source_id` (all rows of that image), or several of them.
        """
        rows = [rows] if isinstance(rows, (int, np.integer, str)) else list(rows)
        for row in rows:
            if not (len(self.ids_of(row)) if isinstance(row, str) else 0 <= row < len(self)):
                raise ValueError(
                    f"The bank has no row {row!r}, expected a source_id of bank.rows(ids) or an id from 0 to "
                    f"{len(self) - 1}."
                )
        keep = np.ones(len(self), dtype=bool)
        keep[self.excluded_ids(rows)] = False
        if not keep.any():
            raise ValueError(f"All {len(self)} rows would be removed, but a memory bank needs at least one.")
        kept = (pa.Table.from_batches([part.filter(pa.array(keep[part["id"].to_numpy()]))]) for part in self.batches())
        return self.keep_facts(self.with_rows(renumbered(kept)), "summary", "license", "language", "parts", "limits")

    def keep_facts(self, bank: MemoryBank, *names: str) -> MemoryBank:
        """Return a bank made of this one with those facts for its card that are so named."""
        if self.card_facts is not None:
            try:
                facts = dict(json.loads(self.card_facts))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"The bank's {CARD_FACTS_NAME} is no JSON object ({error}): mend or delete it."
                ) from error
            bank.card_facts = json.dumps({name: facts[name] for name in names if name in facts}, indent=2)
        return bank

    def shuffled(self, seed: int = 0) -> MemoryBank:
        """Return the control: the same rows, but every key leads to another row's value and caption."""
        order = np.random.default_rng(seed).permutation(len(self))
        # one cycle through all rows: no row keeps its key
        keys_of = np.roll(order, 1)[np.argsort(order)]
        return self.with_rows(self.batches(keys_of)).with_calibration(None)

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable[dict],
        like: MemoryBank | str | os.PathLike,
        revision: str | None = None,
        quantized: bool | None = None,
    ) -> MemoryBank:
        """Make a bank of a bank's rows: see `tinyalign_vlm.training.bank.build.bank_of_dataset`, which does it."""
        build = installed_package("bank.build", "Making a memory bank of a data set")
        return build.bank_of_dataset(dataset, like, revision, quantized)

    def encode_queries(
        self,
        vision_features: torch.Tensor,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return keys to search with: `(n, key_dim)` float32, unit length, on the features' device.

        Args:
            vision_features: `(n, tokens, width)` from the model's `get_vision_features`.
            query_input_ids: `(n, length)` token ids of the question with their mask; read in language space only.
        """
        check_tensor("vision_features", vision_features, "(images, tokens, width)")
        if self.any_tower:
            vision_features = F.pad(vision_features, (0, self.key_encoder.feature_dim - vision_features.shape[-1]))
        return self.key_encoder.to(vision_features.device)(vision_features, query_input_ids, query_attention_mask)

    def for_any_tower(self) -> MemoryBank:
        """Return this bank for a tower it was not built with, whose features are cut or filled up: an ablation."""
        bank = copy.copy(self)
        bank.any_tower = True
        return bank

    def with_calibration(self, calibration: CalibrationConfig | None) -> MemoryBank:
        """Return this bank with the weights that `retrieve` makes probabilities with, or without them."""
        bank = copy.copy(self)
        bank.config = replace(self.config, calibration=calibration)
        bank.repo_id = bank.revision = None  # which have another
        return bank

    def check_probes(self, model: PreTrainedModel) -> None:
        """Refuse a model of another vision tower than the bank's keys were made with: see `KeyEncoder.check_tower`."""
        self.key_encoder.check_tower(model, self.config.tower, self.probe_keys)

    @classmethod
    def open_encoders(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> MemoryBank:
        """Open a bank's config and encoders; its rows are not read. Arguments and errors as of `from_pretrained`."""
        return cls(*open_folder(name_or_path, revision, token))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        revision: str | None = None,
        token: str | bool | None = None,
        index: str | None = None,
    ) -> MemoryBank:
        """Load a bank from a folder or from a dataset repository of the Hub.

        The first load checks every row and lays the bank out under `HF_HOME/tinyalign/`; later ones only map it.
        Nothing but JSON, Parquet and safetensors is read from the folder.

        Args:
            revision: branch, tag or commit of the repository. A name with a revision is never taken for a folder.
            index: how to search: "exact", or a faiss factory string ("IVF1024,PQ288x4fs"), whose candidates are
                compared with the keys. By default exact in a bank of up to 20,000 rows, beyond through a fast index
                that finds at least 99% of the nearest neighbours (`index_facts`); on a GPU if faiss has one.

        Raises:
            ImportError: faiss or pyarrow is missing (what to install is named).
            ValueError: a file is missing, broken, or not what bank_config.json says (the file is named, and removed
                from the cache of downloads), or faiss can't make such an index.
            OSError: the bank can't be downloaded, or the local files can't be written.
        """
        bank = cls.open_encoders(name_or_path, revision, token)
        lay_out_folder(bank.config, name_or_path, bank.repo_id, bank.revision, token)
        bank.index = index
        facts = Path(name_or_path, CARD_FACTS_NAME)
        if bank.repo_id is None and facts.is_file():
            bank.card_facts = facts.read_text(encoding="utf-8", errors="replace")
        if index is not None:  # one that cannot be made is refused now
            bank.key_index = open_index(bank.key_array, bank.folder, index)
        return bank

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the bank as a folder that `from_pretrained` and `datasets.load_dataset` read: whole, or not at all.

        Raises:
            ValueError: the folder holds something other than a memory bank.
            OSError: it could not be written, the disk is full say.
        """
        if not isinstance(save_directory, (str, os.PathLike)):
            raise TypeError(f"save_directory is a {type(save_directory).__name__}, expected a folder.")
        replace_folder(Path(save_directory), self.write_files)

    def write_files(self, folder: Path) -> None:
        """Write the files of the bank into an empty folder."""
        schema = config_schema(self.config)
        self.write_encoders(folder, write_shards(folder, self.batches(), schema, self.config.quantized))
        if self.left_out:
            lines = (json.dumps(asdict(row)) + "\n" for row in self.left_out)
            (folder / LEFT_OUT_NAME).write_text("".join(lines), encoding="utf-8")
        if self.card_facts is not None:
            (folder / CARD_FACTS_NAME).write_text(self.card_facts, encoding="utf-8")

    def write_encoders(self, folder: Path, num_shards: int) -> None:
        """Write all of the bank but its rows: bank_config.json and the encoders."""
        hashes = {}
        try:
            self.key_encoder.save(folder / KEY_ENCODER_NAME, self.probe_keys)
            hashes["key_encoder"] = file_sha256(folder / KEY_ENCODER_NAME)
            if self.value_encoder is not None:
                self.value_encoder.save_pretrained(folder / "value_encoder")
                hashes["value_encoder"] = file_sha256(folder / VALUE_ENCODER_NAME)
        except SafetensorError as error:  # no OSError, though the disk is full
            raise OSError(errno.EIO, f"safetensors could not write the encoders: {error}") from error
        sha256 = replace(self.config.sha256, **hashes)
        replace(self.config, num_shards=num_shards, sha256=sha256).to_json(folder / CONFIG_NAME)

    def push_to_hub(self, repo_id: str, *, card: DatasetCard | str | None = None, **kwargs) -> CommitInfo:
        """Upload the bank to a dataset repository, in one commit; shards of an earlier version are deleted.

        `repo_id` and `revision` of this bank become those of the commit, and a model that it is attached to names
        them in its config.

        Args:
            card: README.md of the repository. By default the one that is there, else a short one.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision` (a branch, created if it
                does not exist) and `create_pr`, as of every `push_to_hub`.
        """
        with scratch_folder(cache_root(), SCRATCH_PREFIX) as folder:
            self.write_files(folder)
            (folder / LEFT_OUT_NAME).unlink(missing_ok=True)  # it may name files of this machine
            (folder / CARD_FACTS_NAME).unlink(missing_ok=True)
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            if card is not None:
                files[CARD_NAME] = str(card).encode()
            kwargs = {"commit_message": "Upload memory bank", **kwargs}
            kwargs["make_card"] = partial(make_bank_card, config=self.config)
            self.repo_id, commit = push_files(files, repo_id, "dataset", replaced=SHARDS, **kwargs)
        self.revision = commit.oid
        return commit


def opened_bank(
    bank: MemoryBank | str | os.PathLike, revision: str | None = None, token: str | bool | None = None
) -> MemoryBank:
    """Return a bank, loaded if it is a name or a path; `TypeError` for anything else."""
    if isinstance(bank, (str, os.PathLike)):
        return MemoryBank.from_pretrained(bank, revision=revision, token=token)
    if "MemoryBank" not in (kind.__name__ for kind in type(bank).__mro__):  # a checkpoint's own class is another one
        raise TypeError(f"The bank is a {type(bank).__name__}, expected a MemoryBank, a folder or a repository.")
    return bank
