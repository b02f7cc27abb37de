"""Folders that are there whole or not at all, and scratch folders that go away, even when the process is killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .bank_config import CONFIG_NAME

try:
    import fcntl
except ImportError:  # Windows: nothing can be locked there, so what a killed process left stays
    fcntl = None


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end. Earlier ones whose process was killed are removed as well."""
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked(parent):
            _remove_abandoned(parent, prefix)
            folder = parent / f"{prefix}{uuid.uuid4().hex[:8]}"
            folder.mkdir()
            stack.enter_context(locked(folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder beside `target` with `write(folder)`, then put it in `target`'s place.

    Whatever fails, `target` is as it was and nothing is left beside it; after a kill, `recover_folder` sees to that.
    Files in `target` that are not a bank's (a README.md, say) are kept, unless `write` has made new ones.

    Raises:
        ValueError: `target` holds something that is not a memory bank.
        OSError: the new folder could not be written.
    """
    target = Path(target).resolve()
    try:
        recover_folder(target)
        kept = _other_files(target)
        with scratch_folder(target.parent, f".{target.name}.new-") as fresh:
            write(fresh)
            for entry in kept:
                if (fresh / entry.name).exists():
                    continue
                copy = shutil.copytree if entry.is_dir() else shutil.copy2
                copy(entry, fresh / entry.name)
            for path in fresh.rglob("*"):
                if path.is_file():
                    sync(path)
            old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
            with locked(target.parent):
                if target.exists():
                    os.rename(target, old)
                try:
                    os.rename(fresh, target)
                except OSError:
                    if old.exists():
                        os.rename(old, target)
                    raise
                with contextlib.suppress(OSError):
                    os.rename(old, fresh)  # removed with the scratch folder
    except OSError as error:
        raise OSError(
            error.errno,
            f"Saving the memory bank to {target} failed: {error}. What was there before is unchanged. Free some space "
            "or choose another folder, and save again.",
        ) from error


def recover_folder(target: Path) -> None:
    """Clear up beside `target` after a process that was killed in `replace_folder`.

    Killed between its renames, it left no `target`: the earlier bank is put back.
    """
    target = Path(target).resolve()
    old, new = f".{target.name}.old-", f".{target.name}.new-"
    if _entries(target.parent, old) or _entries(target.parent, new):
        with locked(target.parent):
            for folder in _entries(target.parent, old):
                if any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
                    continue  # no bank: somebody else's
                if target.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    os.rename(folder, target)
            _remove_abandoned(target.parent, new)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, which the system takes back when the process dies; False if it could not be had."""
    handle, held = None, False
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # held by another process, or the file system has no locks
                handle = os.open(folder, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
        yield held
    finally:
        if handle is not None:
            if held:
                fcntl.flock(handle, fcntl.LOCK_UN)  # also of forked processes, which share the handle
            os.close(handle)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in _entries(parent, prefix):
        with locked(folder, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)


def _entries(parent: Path, prefix: str) -> list[Path]:
    """Folders with a name that this module gave, and no others: they may be deleted."""
    try:
        pattern = re.escape(prefix) + "[0-9a-f]{8}"
        return [entry for entry in parent.iterdir() if re.fullmatch(pattern, entry.name) and entry.is_dir()]
    except OSError:  # it is not there, or not ours to list
        return []


def _other_files(target: Path) -> list[Path]:
    """What is in a bank's folder and not the bank's; ValueError if the folder holds no bank."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder. Choose another place for the memory bank.")
    entries = list(target.iterdir())
    if entries and not (target / CONFIG_NAME).is_file():
        raise ValueError(
            f"{target} is not empty and holds no memory bank ({CONFIG_NAME} is missing). Choose an empty folder."
        )
    ours = {CONFIG_NAME, "data", "key_encoder.safetensors", "value_encoder"}
    return [entry for entry in entries if entry.name not in ours]
