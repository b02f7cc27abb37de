"""The memory bank: training examples as (key, value) rows, searched by image."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import CommitInfo, DatasetCard
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin, __version__

from .bank_builder import (
    RowEncoder,
    check_keep_columns,
    check_latents,
    describe_tower,
    encode_and_fit,
    evaluating,
    finished,
    image_shape,
    probe_pixels,
    renumbered,
)
from .bank_config import CONFIG_NAME, FORMAT_VERSION, check_config, check_file, file_sha256, read_json, write_config
from .bank_folders import recover_folder, replace_folder, scratch_folder
from .bank_index import check_foreign_index
from .bank_rows import BankRows
from .bank_storage import (
    BATCH_ROWS,
    SCRATCH_PREFIX,
    BankFiles,
    Spool,
    cache_root,
    config_schema,
    read_shards,
    require_bank_packages,
    shard_names,
    shard_paths,
    write_local_files,
    write_shards,
)
from .hub_files import CARD_NAME, SHARDS, fetch, forgetting, hub_origin, push_files
from .key_encoder import KeyEncoder
from .plain_cards import bank_card
from .value_encoder import ValueEncoder

try:
    import pyarrow as pa
except ImportError:
    pa = None

INDEX_NAME = "index.faiss"
KEY_ENCODER_NAME = "key_encoder.safetensors"
VALUE_ENCODER_NAME = "value_encoder/model.safetensors"
MIN_PROBE_COSINE = 0.99
MAX_PROBE_DIFFERENCE = 1e-3


class MemoryBank(BankRows):
    """Rows of image, caption, key and value with the encoders that made them.

    Make one with `MemoryBank.build`, `from_pretrained` or `from_dataset`; look things up with the methods of
    `BankRows`. It is immutable: `add`, `remove` and `shuffled` return a new bank.

    Attributes:
        config: the content of bank_config.json.
        key_encoder: the frozen `KeyEncoder`.
        probe_keys: `(4, raw_dim)`, raw keys of four fixed synthetic images.
        repo_id, revision: the Hub repository and commit it came from, or None.
        any_tower: see `for_any_tower`.
    """

    any_tower = False

    def __init__(
        self,
        config: dict,
        key_encoder: KeyEncoder,
        probe_keys: torch.Tensor,
        files: BankFiles,
        value_encoder: ValueEncoder | None = None,
        folder: Path | None = None,
        repo_id: str | None = None,
        revision: str | None = None,
    ):
        super().__init__(config, files)
        self.key_encoder = key_encoder.requires_grad_(False)
        self.probe_keys = probe_keys
        self.repo_id = repo_id
        self.revision = revision
        self._value_encoder = value_encoder
        self._folder = folder

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

    @cached_property
    def value_encoder(self) -> ValueEncoder:
        """The value encoder the bank was built with, loaded when first asked for."""
        if self._value_encoder is not None:
            return self._value_encoder
        path = self._folder / VALUE_ENCODER_NAME
        with forgetting([path] if self.repo_id else []):
            check_file(path, self.config["sha256"]["value_encoder"])
        return ValueEncoder.of_bank(path, self.config["value_encoder"])

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

        Raises:
            ValueError: a column is missing, a row is bad (its number is named), there is no row, `key_grid` or
                `whiten_dim` is impossible, or the value encoder makes latents of another shape than `model.config`
                asks for.
        """
        require_bank_packages()
        check_keep_columns(keep_columns)
        check_latents(value_encoder, model)
        with evaluating(model, value_encoder):
            tower = describe_tower(model, image_shape(processor))
            probe_features = model.get_vision_features(probe_pixels(tower["image_shape"]))
            key_encoder = KeyEncoder.of_model(model, probe_features.shape[-1], key_grid).to(probe_features.device)
            probe_keys = key_encoder.raw_keys(probe_features).cpu()
            encoder = RowEncoder(
                model,
                processor,
                value_encoder,
                key_encoder,
                image_column,
                caption_column,
                keep_columns,
                batch_size,
                thumbnail_size,
                skip_bad_rows,
                vision_features,
            )
            files = encode_and_fit(encoder, dataset, whiten_dim)
        config = {
            "format_version": FORMAT_VERSION,
            "num_rows": files.num_rows,
            "key_dim": key_encoder.key_dim,
            "num_latents": model.config.num_latents,
            "latent_dim": model.config.latent_dim,
            "tower": tower,
            "preprocessing": json.loads(processor.image_processor.to_json_string()),
            "key_encoder": {
                "key_space": model.config.key_space,
                "connector_act": model.config.projector_hidden_act,
                "vision_pool_size": model.config.vision_pool_size,
                "alpha": model.config.query_alpha,
                "grid": key_grid,
            },
            "value_encoder": value_encoder.config.settings,
            "columns": list(keep_columns),
            "thumbnail_size": thumbnail_size,
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
        self.check_probes(model)
        with evaluating(model, self.value_encoder):
            encoder = RowEncoder(
                model,
                processor,
                self.value_encoder,
                self.key_encoder,
                image_column,
                caption_column,
                self.config["columns"],
                batch_size,
                self.config["thumbnail_size"],
                skip_bad_rows,
                vision_features,
                num_rows=len(self),
            )
            with Spool(encoder.batches(dataset)) as spool:
                self.key_encoder.cpu()
                added = finished(spool.batches(), self.key_encoder)
                return self._with_rows(
                    itertools.chain(self._batches(), added), self.skipped_rows + encoder.skipped_rows
                )

    def remove(self, rows: int | str | Sequence[int | str]) -> MemoryBank:
        """A new bank without some rows, the others numbered anew; this bank is unchanged.

        Args:
            rows: the id of a row, a `source_id` (all rows of that image), or several of them.

        Raises:
            ValueError: there is no such row, or none would be left.
        """
        rows = [rows] if isinstance(rows, (int, str)) else list(rows)
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
        cls, dataset: Iterable[dict], like: MemoryBank | str | os.PathLike | None = None, revision: str | None = None
    ) -> MemoryBank:
        """A bank from the rows of a bank, loaded with `datasets` and filtered or concatenated; they are numbered anew.

        Args:
            dataset: a `datasets.Dataset` or, streamed, an `IterableDataset` with a bank's columns. Filter the latter
                after `.decode(False)`: `datasets` would encode its thumbnails anew.
            like: the bank whose encoders made the rows, or its folder or repository (then at `revision`), of which
                no rows are downloaded. By default the repository that a `Dataset` was loaded from.

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
        return like._with_rows(renumbered(dataset.with_format("arrow").iter(BATCH_ROWS)), [])

    def _with_rows(self, batches: Iterable[pa.RecordBatch], skipped_rows: list[dict]) -> MemoryBank:
        """This bank's encoders over other rows."""
        value_shape = (self.num_latents, self.latent_dim)
        files = write_local_files(batches, config_schema(self.config), value_shape, "The new memory bank")
        changed = {"num_rows": files.num_rows, "sha256": files.sha256, "skipped_rows": skipped_rows}
        return MemoryBank(
            {**self.config, **changed}, copy.deepcopy(self.key_encoder), self.probe_keys, files, self.value_encoder
        )

    # ------------------------------------------------------------------ saving and loading

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the bank as a folder that `from_pretrained` and `datasets.load_dataset` read.

        The folder is complete or not there: it is written beside its final place and put there at the end. A failure
        leaves a bank that was there before untouched.

        Raises:
            ValueError: the folder holds something other than a memory bank.
            OSError: it could not be written, the disk is full say.
        """
        replace_folder(Path(save_directory), self._write)

    def _write(self, folder: Path) -> None:
        num_shards = write_shards(folder, self._table, self._index.keys, self._values)
        try:
            self.key_encoder.save(folder / KEY_ENCODER_NAME, self.probe_keys)
            self.value_encoder.save_pretrained(folder / "value_encoder")
        except SafetensorError as error:
            raise OSError(f"safetensors could not write the encoders: {error}") from error
        sha256 = {
            **self._files.sha256,
            "key_encoder": file_sha256(folder / KEY_ENCODER_NAME),
            "value_encoder": file_sha256(folder / VALUE_ENCODER_NAME),
        }
        config = {**self.config, "num_shards": num_shards, "sha256": sha256}
        write_config(config, folder / CONFIG_NAME)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload memory bank",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        card: DatasetCard | str | None = None,
    ) -> CommitInfo:
        """Upload the bank to a dataset repository, in one commit; shards of an earlier version are deleted.

        `repo_id` and `revision` of this bank become those of the commit: a model that it is attached to names them
        in its config.

        Args:
            repo_id: "org/name"; it is created if it does not exist.
            private: whether a new repository is private.
            token: of the Hub; by default the one that you are logged in with.
            revision: the branch to push to, created if it does not exist. By default main.
            create_pr: open a pull request with the commit instead.
            card: README.md of the repository (`hub_cards` makes one). By default the one that is there, else a short
                one.

        Returns:
            the commit; its hash is `.oid`.

        Raises:
            OSError: it could not be uploaded, or not be written to the disk before.
        """
        with scratch_folder(cache_root(), SCRATCH_PREFIX) as folder:
            self._write(folder)
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            if card is not None:
                files[CARD_NAME] = str(card).encode()
            self.repo_id, commit = push_files(
                files,
                repo_id,
                "dataset",
                replaced=SHARDS,
                plain_card=lambda name: bank_card(name, self.config, SHARDS),
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
        self.revision = commit.oid
        return commit

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_index: bool = False,
    ) -> MemoryBank:
        """Load a bank from a folder or from a dataset repository of the Hub.

        The first load checks every row and lays the bank out under `HF_HOME/tinyalign/`; later ones only map it.
        Nothing but JSON, Parquet and safetensors is read from the folder.

        Args:
            revision: branch, tag or commit of the repository. A name with a revision is never taken for a folder.
            token: of the Hub; by default the one that you are logged in with.
            trust_index: search the index.faiss that is in the folder or repository, once it was found to be a flat
                index of the bank's keys. By default it is ignored, and one is built here from the keys.

        Raises:
            ImportError: faiss or pyarrow is missing (what to install is named).
            ValueError: a file is missing, broken, or not what bank_config.json says (the file is named). Files that
                were downloaded are taken out of the cache.
            OSError: the bank can't be downloaded, or the local files can't be written.
        """
        bank = cls._open(name_or_path, revision, token)
        config, folder, fetched = bank.config, bank._folder, []
        if bank.repo_id is None:
            shard_paths(folder, config["num_shards"])
        if not bank._files.exist():
            if bank.repo_id is not None:
                names = (CONFIG_NAME, *shard_names(config["num_shards"]))
                fetched = [fetch(bank.repo_id, name, bank.revision, token) for name in names]
            with forgetting(fetched):
                value_shape = (config["num_latents"], config["latent_dim"])
                rows = read_shards(folder, config)
                write_local_files(rows, config_schema(config), value_shape, str(folder / "data"), config["sha256"])
        if trust_index:
            if bank.repo_id is not None:
                fetch(bank.repo_id, INDEX_NAME, bank.revision, token)
            path = folder / INDEX_NAME
            check_foreign_index(path, len(bank), bank.key_dim, config["sha256"]["keys"])
            bank._files = dataclasses.replace(bank._files, keys=path)
        return bank

    @classmethod
    def _open(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> MemoryBank:
        """A bank with its encoders; its rows may not be there yet."""
        require_bank_packages()
        folder, repo_id = Path(name_or_path), None
        recover_folder(folder)
        if revision is not None or not folder.is_dir():
            repo_id = str(name_or_path)
            folder = fetch(repo_id, CONFIG_NAME, revision, token).parent
            revision = folder.name
        config_path, encoder_path = folder / CONFIG_NAME, folder / KEY_ENCODER_NAME
        with forgetting([config_path] if repo_id else []):
            config = read_json(config_path)
            check_config(config, config_path)
        if repo_id is not None:
            for name in (KEY_ENCODER_NAME, VALUE_ENCODER_NAME):
                fetch(repo_id, name, revision, token)
        with forgetting([config_path, encoder_path] if repo_id else []):
            check_file(encoder_path, config["sha256"]["key_encoder"])
            key_encoder, probe_keys = KeyEncoder.load(encoder_path, config["key_encoder"], config["key_dim"])
        value_shape = (config["num_latents"], config["latent_dim"])
        files = BankFiles.cached(config["sha256"], config["num_rows"], config["key_dim"], value_shape)
        return cls(config, key_encoder, probe_keys, files, folder=folder, repo_id=repo_id, revision=revision)

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
