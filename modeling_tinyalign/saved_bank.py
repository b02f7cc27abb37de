"""A memory bank as files: in a folder, on the Hub, and laid out for use."""

from __future__ import annotations

import dataclasses
import errno
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import CommitInfo, DatasetCard
from safetensors import SafetensorError

from .bank_config import CONFIG_NAME, check_config, check_file, file_sha256, read_json, write_config
from .bank_fast_index import EXACT, first_measured, recorded
from .bank_folders import recover_folder, replace_folder, scratch_folder
from .bank_foreign_index import check_foreign_index
from .bank_rows import BankRows
from .bank_shards import config_schema, read_shards, shard_names, shard_paths, write_shards
from .bank_storage import SCRATCH_PREFIX, BankFiles, cache_root, require_bank_packages, write_local_files
from .hub_files import CARD_NAME, SHARDS, fetch, forgetting, push_files
from .key_encoder import KeyEncoder
from .plain_cards import bank_card
from .value_encoder import ValueEncoder

if TYPE_CHECKING:
    from typing_extensions import Self

INDEX_NAME = "index.faiss"
KEY_ENCODER_NAME = "key_encoder.safetensors"
VALUE_ENCODER_NAME = "value_encoder/model.safetensors"


class SavedBank(BankRows):
    """What a bank does about files.

    Attributes:
        key_encoder: the frozen `KeyEncoder`.
        probe_keys: `(4, raw_dim)`, raw keys of four fixed synthetic images.
        repo_id, revision: the Hub repository and commit it came from or was pushed to, or None.
    """

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
        index: str | None = None,
    ):
        super().__init__(config, files, index)
        self.key_encoder = key_encoder.requires_grad_(False)
        self.probe_keys = probe_keys
        self.repo_id = repo_id
        self.revision = revision
        self._value_encoder = value_encoder
        self._folder = folder

    @cached_property
    def value_encoder(self) -> ValueEncoder:
        """The value encoder the bank was built with, loaded when first asked for."""
        if self._value_encoder is not None:
            return self._value_encoder
        path = self._folder / VALUE_ENCODER_NAME
        with forgetting([path] if self.repo_id else []):
            check_file(path, self.config["sha256"]["value_encoder"])
        return ValueEncoder.of_bank(path, self.config["value_encoder"])

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
        num_shards = write_shards(folder, self._table, self._keys, self._values)
        index = self.config.get("index")
        if index is None:
            index = recorded(first_measured(self.index_facts, self._files.keys_folder))
        self._write_encoders(folder, num_shards, index)

    def _write_encoders(self, folder: Path, num_shards: int, index: dict) -> None:
        """All but the rows: bank_config.json, with what is `recorded` of the index, and the encoders."""
        try:
            self.key_encoder.save(folder / KEY_ENCODER_NAME, self.probe_keys)
            self.value_encoder.save_pretrained(folder / "value_encoder")
        except SafetensorError as error:
            raise OSError(errno.EIO, f"safetensors could not write the encoders: {error}") from error
        sha256 = {
            **self._files.sha256,
            "key_encoder": file_sha256(folder / KEY_ENCODER_NAME),
            "value_encoder": file_sha256(folder / VALUE_ENCODER_NAME),
        }
        config = {**self.config, "num_shards": num_shards, "index": index, "sha256": sha256}
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
        index: str | None = None,
    ) -> Self:
        """Load a bank from a folder or from a dataset repository of the Hub.

        The first load checks every row and lays the bank out under `HF_HOME/tinyalign/`; later ones only map it. Of
        processes that load it for the first time at once, one does so and the others wait.
        Nothing but JSON, Parquet and safetensors is read from the folder.

        Args:
            revision: branch, tag or commit of the repository. A name with a revision is never taken for a folder.
            token: of the Hub; by default the one that you are logged in with.
            trust_index: search the index.faiss that is in the folder or repository, once it was found to be a flat
                index of the bank's keys. By default it is ignored, and one is built here from the keys.
            index: how to search: "exact", or a faiss factory string ("IVF1024,PQ288x4fs"), whose candidates are
                compared with the keys. By default exact in a bank of up to 20,000 rows, beyond through a fast index
                that finds at least 99% of the nearest neighbours (`index_facts`); on a GPU if faiss has one.

        Raises:
            ImportError: faiss or pyarrow is missing (what to install is named).
            ValueError: a file is missing, broken, or not what bank_config.json says (the file is named). Files that
                were downloaded are taken out of the cache. Or faiss can't make such an index.
            OSError: the bank can't be downloaded, or the local files can't be written.
        """
        bank = cls._open(name_or_path, revision, token)
        config, folder = bank.config, bank._folder
        if bank.repo_id is None:
            shard_paths(folder, config["num_shards"])
        if not bank._files.exist():
            with bank._files.laid_out_once():
                if not bank._files.exist():
                    bank._lay_out(token)
        if trust_index:
            if bank.repo_id is not None:
                fetch(bank.repo_id, INDEX_NAME, bank.revision, token)
            path = folder / INDEX_NAME
            check_foreign_index(path, len(bank), bank.key_dim, config["sha256"]["keys"])
            bank._files = dataclasses.replace(bank._files, trusted_index=path)
            index = index or EXACT
        bank._keys, bank._values, bank._table  # noqa: B018  mapped now: `bank compact` may delete the files
        bank.index = index
        if index is not None:
            bank._searcher  # noqa: B018  an index that can't be made is refused now
        return bank

    def _lay_out(self, token: str | bool | None) -> None:
        """Check the shards, fetched if the bank is on the Hub, and write the local files."""
        config, fetched = self.config, []
        if self.repo_id is not None:
            names = (CONFIG_NAME, *shard_names(config["num_shards"]))
            fetched = [fetch(self.repo_id, name, self.revision, token) for name in names]
        with forgetting(fetched):
            write_local_files(
                read_shards(self._folder, config),
                config_schema(config),
                (config["num_latents"], config["latent_dim"]),
                str(self._folder / "data"),
                self._files.packed,
                config["sha256"],
            )

    @classmethod
    def _open(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
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
        packed = config.get("packed", False)
        files = BankFiles(config["sha256"], config["num_rows"], config["key_dim"], value_shape, packed)
        return cls(config, key_encoder, probe_keys, files, folder=folder, repo_id=repo_id, revision=revision)
