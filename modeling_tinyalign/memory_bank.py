"""The memory bank: training examples as (key, value) rows, searched by image."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin, __version__

from .bank_builder import (
    RowEncoder,
    describe_tower,
    evaluating,
    finished,
    fit_and_write,
    image_shape,
    probe_pixels,
    renumbered,
)
from .bank_config import FORMAT_VERSION
from .bank_shards import BATCH_ROWS, config_schema
from .bank_storage import Packed, Spool, write_local_files
from .hub_files import hub_origin
from .saved_bank import SavedBank
from .value_encoder import ValueEncoder

try:
    import pyarrow as pa
except ImportError:
    pa = None

MIN_PROBE_COSINE = 0.99
MAX_PROBE_DIFFERENCE = 1e-3


class MemoryBank(SavedBank):
    """Rows of image, caption, key and value with the encoders that made them.

    Make one with `MemoryBank.build`, `from_pretrained` or `from_dataset`; look things up with the methods of
    `BankRows`; save and push it with those of `SavedBank`. It is immutable: `add`, `remove` and `shuffled` return a
    new bank.

    Attributes:
        config: the content of bank_config.json.
        key_encoder: the frozen `KeyEncoder`.
        probe_keys: `(4, raw_dim)`, raw keys of four fixed synthetic images.
        repo_id, revision: the Hub repository and commit it came from, or None.
        any_tower: see `for_any_tower`.
    """

    any_tower = False

    def __repr__(self) -> str:
        return (
            f"MemoryBank({len(self)} rows, keys of {self.key_dim}, values of {self.num_latents} x {self.latent_dim}, "
            f"{self.key_space} space, tower {self.config['tower']['name']})"
        )

    @property
    def key_space(self) -> str:
        return self.config["key_encoder"]["key_space"]

    @property
    def skipped_rows(self) -> list[dict]:
        """`{"row": number, "reason": text}` of the dataset rows left out when the bank was built."""
        return self.config["skipped_rows"]

    # ------------------------------------------------------------------ making one

    @classmethod
    def build(
        cls,
        dataset: Iterable[dict],
        model: PreTrainedModel,
        processor: ProcessorMixin,
        value_encoder: ValueEncoder,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        keep_columns: Sequence[str] = (),
        batch_size: int = 32,
        key_grid: int = 1,
        whiten_dim: int | None = None,
        thumbnail_size: int | None = 64,
        skip_bad_rows: bool = False,
        vision_features: torch.Tensor | np.ndarray | None = None,
        packed: Packed | None = None,
    ) -> MemoryBank:
        """Encode a dataset into a bank.

        Args:
            dataset: a split of a Hub dataset (streamed or not) or any iterable of dicts, with an image (PIL, bytes,
                path) and a caption in every row.
            model: a TinyAlign model; its `get_vision_features` is used, and in language space (`config.key_space`)
                snapshots of its connector and token embeddings.
            processor: its `image_processor` is used, and in language space its `tokenizer`.
            value_encoder: makes the values; it is saved with the bank.
            keep_columns: other columns to keep with the rows as text, a source or licence say.
            key_grid: keys hold this many rows and columns of the image and tell where something is; they get
                `key_grid**2` times as wide, so give `whiten_dim` as well. 1: the whole image (the paper's keys).
            whiten_dim: fit a PCA whitening to this many dimensions on the bank's raw keys (a sample of 4,096 in a
                larger bank). None: only centre them.
            thumbnail_size: side in pixels of the JPEG kept of every image, or None for no thumbnails.
            skip_bad_rows: leave rows with a corrupt image or without a caption out and list them in `skipped_rows`.
            vision_features: `(rows of dataset, tokens, width)`, to skip the tower where features are cached.
            packed: round keys to 12 bits and values to 8, which halves the bank; "keys": only them. By default both
                are rounded in banks of more than 20,000 rows. What is made of the bank later is packed as it is.

        Raises:
            ValueError: a column is missing, a row is bad (its number is named), there is no row, `key_grid`,
                `whiten_dim` or `packed` is impossible, or the value encoder makes latents of another shape than
                `model.config` asks for.
        """
        encoder = RowEncoder.for_new_bank(
            model,
            processor,
            value_encoder,
            key_grid,
            image_column=image_column,
            caption_column=caption_column,
            keep_columns=keep_columns,
            batch_size=batch_size,
            thumbnail_size=thumbnail_size,
            skip_bad_rows=skip_bad_rows,
            vision_features=vision_features,
            packed=packed,
        )
        with evaluating(model, value_encoder), Spool(encoder.batches(dataset)) as spool:
            return cls.from_encoded(encoder, spool.batches, whiten_dim)

    @classmethod
    def from_encoded(
        cls, encoder: RowEncoder, batches: Callable[[], Iterator[pa.RecordBatch]], whiten_dim: int | None = None
    ) -> MemoryBank:
        """The second half of `build`, when all rows are encoded.

        Args:
            encoder: of `RowEncoder.for_new_bank`; its `num_rows` and `skipped_rows` are those of all batches.
            batches: starts over each time it is called.
        """
        model, processor, value_encoder, key_encoder = (
            encoder.model,
            encoder.processor,
            encoder.value_encoder,
            encoder.key_encoder,
        )
        with evaluating(model):
            tower = describe_tower(model, image_shape(processor))
            probe_features = model.get_vision_features(probe_pixels(tower["image_shape"]))
            probe_keys = key_encoder.to(probe_features.device).raw_keys(probe_features).cpu()
        files = fit_and_write(encoder, batches, whiten_dim)
        config = {
            "format_version": FORMAT_VERSION,
            "num_rows": files.num_rows,
            "key_dim": key_encoder.key_dim,
            "num_latents": model.config.num_latents,
            "latent_dim": model.config.latent_dim,
            "packed": files.packed,
            "tower": tower,
            "preprocessing": json.loads(processor.image_processor.to_json_string()),
            "key_encoder": {
                "key_space": model.config.key_space,
                "connector_act": model.config.projector_hidden_act,
                "vision_pool_size": model.config.vision_pool_size,
                "alpha": model.config.query_alpha,
                "grid": key_encoder.grid,
            },
            "value_encoder": value_encoder.config.settings,
            "columns": list(encoder.keep_columns),
            "thumbnail_size": encoder.thumbnail_size,
            "skipped_rows": encoder.skipped_rows,
            "sha256": files.sha256,
            "versions": {"torch": torch.__version__, "transformers": __version__},
        }
        return cls(config, key_encoder, probe_keys, files, copy.deepcopy(value_encoder).requires_grad_(False).eval())

    def add(
        self,
        dataset: Iterable[dict],
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        batch_size: int = 32,
        skip_bad_rows: bool = False,
        vision_features: torch.Tensor | np.ndarray | None = None,
    ) -> MemoryBank:
        """A new bank with the rows of `dataset` behind this one's, whose ids stay; this bank is unchanged.

        Keys and values are made with this bank's own encoders (the mean and the whitening stay as they were fitted),
        so nothing is retrained. Arguments and errors as in `build`; another vision tower is refused.
        """
        encoder = self.row_encoder(
            model,
            processor,
            image_column=image_column,
            caption_column=caption_column,
            batch_size=batch_size,
            skip_bad_rows=skip_bad_rows,
            vision_features=vision_features,
            num_rows=len(self),
        )
        with evaluating(model, self.value_encoder), Spool(encoder.batches(dataset)) as spool:
            return self.with_encoded(spool.batches(), encoder.skipped_rows)

    def row_encoder(self, model: PreTrainedModel, processor: ProcessorMixin, **settings) -> RowEncoder:
        """What makes rows for this bank, with its own encoders; another vision tower is refused.

        Args:
            settings: fields of `RowEncoder`.
        """
        self.check_probes(model)
        return RowEncoder(
            model,
            processor,
            self.value_encoder,
            self.key_encoder,
            keep_columns=self.config["columns"],
            thumbnail_size=self.config["thumbnail_size"],
            **settings,
        )

    def with_encoded(self, batches: Iterable[pa.RecordBatch], skipped_rows: Sequence[dict] = ()) -> MemoryBank:
        """The second half of `add`: a new bank with what the `row_encoder` has made behind this one's rows."""
        added = self._finished(batches)
        return self._with_rows(itertools.chain(self._batches(), added), [*self.skipped_rows, *skipped_rows])

    def of_encoded(self, batches: Iterable[pa.RecordBatch], packed: Packed | None = None) -> MemoryBank:
        """A new bank of nothing but what the `row_encoder` has made, packed as this one unless `packed` is given."""
        return self._with_rows(self._finished(batches), [], packed)

    def _finished(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        self.key_encoder.cpu()
        return finished(batches, self.key_encoder)

    def remove(self, rows: int | str | Sequence[int | str]) -> MemoryBank:
        """A new bank without some rows, the others numbered anew; this bank is unchanged.

        Args:
            rows: the id of a row, a `source_id` (all rows of that image), or several of them.

        Raises:
            ValueError: there is no such row, or none would be left.
        """
        rows = [rows] if isinstance(rows, (int, np.integer, str)) else list(rows)
        for row in rows:
            if not (len(self.ids_of(row)) if isinstance(row, str) else 0 <= row < len(self)):
                raise ValueError(
                    f"The bank has no row {row!r}, expected a source_id of bank.rows(ids) or an id from 0 to "
                    f"{len(self) - 1}."
                )
        keep = np.ones(len(self), dtype=bool)
        keep[self._excluded_ids(rows)] = False
        if not keep.any():
            raise ValueError(f"All {len(self)} rows would be removed, but a memory bank needs at least one.")
        tables = (pa.Table.from_batches([batch]) for batch in self._batches())
        kept = (table.filter(pa.array(keep[table["id"].to_numpy()])) for table in tables)
        return self._with_rows(renumbered(kept), self.skipped_rows)

    def shuffled(self, seed: int = 0) -> MemoryBank:
        """The control: the same rows, but every key leads to another row's value and caption."""
        order = np.random.default_rng(seed).permutation(len(self))
        keys_of = np.empty_like(order)
        # one cycle through all rows: no row keeps its key
        keys_of[order] = np.roll(order, 1)
        return self._with_rows(self._batches(keys_of), self.skipped_rows)

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable[dict],
        like: MemoryBank | str | os.PathLike | None = None,
        revision: str | None = None,
        packed: Packed | None = None,
    ) -> MemoryBank:
        """A bank from the rows of a bank, loaded with `datasets` and filtered or concatenated; they are numbered anew.

        Args:
            dataset: a `datasets.Dataset` or, streamed, an `IterableDataset` with a bank's columns. Filter the latter
                after `.decode(False)`: `datasets` would encode its thumbnails anew.
            like: the bank whose encoders made the rows, or its folder or repository (then at `revision`), of which
                no rows are downloaded. By default the repository that a `Dataset` was loaded from.
            packed: as of `build`; by default as `like` is.

        Raises:
            ValueError: a column is missing or of another type, there is no row, or `like` is needed.
            OSError: the encoders can't be downloaded.
        """
        if isinstance(dataset, dict):
            raise ValueError(f"The dataset has the splits {list(dataset)}: pass one of them, dataset['train'] say.")
        if like is None:
            like, revision = hub_origin(dataset)
        if not isinstance(like, MemoryBank):
            like = cls._open(like, revision)
        return like._with_rows(renumbered(dataset.with_format("arrow").iter(BATCH_ROWS)), [], packed)

    def _with_rows(
        self, batches: Iterable[pa.RecordBatch], skipped_rows: list[dict], packed: Packed | None = None
    ) -> MemoryBank:
        """This bank's encoders over other rows."""
        value_shape = (self.num_latents, self.latent_dim)
        if packed is None:
            packed = self._files.packed
        files = write_local_files(batches, config_schema(self.config), value_shape, "The new memory bank", packed)
        changed = {
            "num_rows": files.num_rows,
            "packed": files.packed,
            "sha256": files.sha256,
            "skipped_rows": skipped_rows,
            "index": None,
        }
        return MemoryBank(
            {**self.config, **changed},
            copy.deepcopy(self.key_encoder),
            self.probe_keys,
            files,
            self.value_encoder,
            index=self.index,
        )

    # ------------------------------------------------------------------ using it

    def encode_queries(
        self,
        vision_features: torch.Tensor,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keys to search with.

        Args:
            vision_features: `(n, tokens, width)` from the model's `get_vision_features`.
            query_input_ids: `(n, length)` token ids of the question with their mask; read in language space only.

        Returns:
            `(n, key_dim)` float32, unit length, on the features' device.
        """
        if self.any_tower:
            vision_features = F.pad(vision_features, (0, self.key_encoder.feature_dim - vision_features.shape[-1]))
        return self.key_encoder.to(vision_features.device)(vision_features, query_input_ids, query_attention_mask)

    def for_any_tower(self) -> MemoryBank:
        """This bank, to be used with a vision tower it was not built with: an ablation (the paper's Table 7).

        Features of another width are cut, or filled up with zeros. What is retrieved has little to do with the image.
        """
        bank = copy.copy(self)
        bank.any_tower = True
        return bank

    def check_probes(self, model: PreTrainedModel) -> None:
        """Refuse a model whose vision tower is not the one the bank's keys were made with.

        The keys of four fixed synthetic images are made anew and compared with those of the building tower: they are
        the same, or their cosine, centred, is near 1.

        Raises:
            ValueError: naming both towers and the cosine, or the widths of their features.
        """
        tower = self.config["tower"]
        found = describe_tower(model, tower["image_shape"])["name"]
        advice = "Use the tower the bank was built with, or build a bank with this one (MemoryBank.build)."
        with evaluating(model):
            try:
                features = model.get_vision_features(probe_pixels(tower["image_shape"]))
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"The memory bank was built with the vision tower {tower['name']}, of images "
                    f"{tower['image_shape']}, which this model's ({found}) does not take ({error}). {advice}"
                ) from error
        if features.shape[-1] != self.key_encoder.feature_dim:
            raise ValueError(
                f"The model's vision tower ({found}) makes features {features.shape[-1]} wide, but the memory bank "
                f"was built with {tower['name']}, {self.key_encoder.feature_dim} wide. {advice}"
            )
        self.key_encoder.to(features.device)
        raw, mean = self.key_encoder.raw_keys(features).cpu(), self.key_encoder.mean.cpu()
        # a nearly constant tower, an untrained one say, leaves nothing to take a cosine of; squares need float64
        probes = self.probe_keys.double()
        if ((raw - probes).norm(dim=-1) <= MAX_PROBE_DIFFERENCE * probes.norm(dim=-1)).all():
            return
        cosine = F.cosine_similarity(raw - mean, self.probe_keys - mean).min().item()
        if not cosine >= MIN_PROBE_COSINE:
            raise ValueError(
                f"The memory bank was built with the vision tower {tower['name']}, this model has {found}: on the "
                f"probe images the cosine of their keys is {cosine:.3f}, expected at least {MIN_PROBE_COSINE}. "
                f"{advice}"
            )
