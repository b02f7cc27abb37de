"""Folders of new memory banks: nothing is written over what is there, and work on one is kept until it is complete."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from ...hub_cards.cards import is_hub_id
from ...modeling_tinyalign.bank_format import CONFIG_NAME, KEY_ENCODER_NAME
from ...modeling_tinyalign.files import SHARDS, fetch
from ..disk import full_disk_advice, nothing_left, save_file

SETTINGS_NAME, LOCK_NAME = "settings.json", "lock"


def check_new_folder(out: Path) -> None:
    """Raise `ValueError` if there is anything in the folder of a bank that is to be made."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(
            f"{out} is there already: choose another folder, or delete it. A new bank is written, and none is changed."
        )


def folder_of_bank(name: str | os.PathLike) -> Path:
    """Return the folder of a bank, of a repository the cached one with all its files.

    Raises `ValueError` if the name is of no folder and no repository, `OSError` if that cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(str(name)):
        raise ValueError(f"{name} is no folder, expected the one of a memory bank, or its repository, org/name.")
    commit = fetch(str(name), CONFIG_NAME, None, None).parent.name
    files = [CONFIG_NAME, KEY_ENCODER_NAME, "value_encoder/*", SHARDS]
    return Path(snapshot_download(str(name), repo_type="dataset", revision=commit, allow_patterns=files))


@dataclass
class WorkFolder:
    """The folder beside a bank that is being built: `settings.json`, and what is encoded so far."""

    path: Path

    @property
    def has_work(self) -> bool:
        return any(entry.stem not in ("settings", LOCK_NAME) for entry in self.path.iterdir())

    def read_settings(self) -> dict:
        """Return what `write_settings` of an earlier process has written, or nothing."""
        path = self.path / SETTINGS_NAME
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete {self.path} to begin anew.") from error

    def write_settings(self, settings: dict) -> None:
        with full_disk_advice(self.path, "what was encoded"):
            save_file(self.path / SETTINGS_NAME, json.dumps(settings, indent=1).encode())

    def clear(self) -> None:
        """Delete all work. `settings.json` goes last: as long as it is there, it is known whose work is left."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry.rename(entry.with_suffix(".old")))  # no part of it is taken for all of it
            elif entry.name not in (SETTINGS_NAME, LOCK_NAME):
                entry.unlink()
        (self.path / SETTINGS_NAME).unlink(missing_ok=True)


@contextmanager
def work_folder(out: Path) -> Iterator[WorkFolder]:
    """Make the folder `.OUT.build`, and remove it again unless there is work in it.

    Raises `ValueError` while another process builds the bank.
    """
    if not out.name:
        check_new_folder(out)  # the root of the file system
    folder = out.with_name(f".{out.name}.build")
    work, lock = WorkFolder(folder), FileLock(folder / LOCK_NAME, timeout=0)
    with nothing_left(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()  # the system takes it back when the process dies
        except Timeout as error:
            raise ValueError(
                f"Another process is building {out} (it holds {lock.lock_file}), expected one at a time. Wait until "
                "it has finished, or choose another --out."
            ) from error
        try:
            yield work
        finally:
            idle = not work.has_work
            if idle:
                work.clear()
            lock.release()
            if idle:
                with suppress(OSError):  # another process has come in
                    (folder / LOCK_NAME).unlink(missing_ok=True)
                    folder.rmdir()
