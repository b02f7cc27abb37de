"""Files of models and banks: folders that are there whole or not at all, and repositories of the Hub."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from huggingface_hub import CardData, CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from transformers import PreTrainedConfig

from .bank_format import CONFIG_NAME, KEY_ENCODER_NAME, LEFT_OUT_NAME, BankConfig

try:
    import fcntl
except ImportError:  # Windows: nothing can be locked there, so what a killed process left stays
    fcntl = None

CARD_NAME = "README.md"
SHARDS = "data/train-*.parquet"
WEIGHTS = "model*.safetensors*"


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a new folder in `parent`, removed at the end. Earlier ones whose process was killed are removed as well."""
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked(parent):
            _remove_abandoned(parent, prefix)
            folder = parent / f"{prefix}{uuid.uuid4().hex[:8]}"
            folder.mkdir()
            stack.enter_context(locked(folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder with `write(folder)`, then rename it to `target`: the new bank is there whole, or the old one.

    Files there that are no bank's (a README.md, say) are kept, unless `write` has made new ones. A process that is
    killed between the two renames leaves the earlier bank as `.NAME.old`; whoever loads or saves it next puts it back.

    Raises:
        ValueError: `target` holds something that is not a memory bank.
        OSError: the new folder could not be written.
    """
    target = Path(target).resolve()
    try:
        put_back(target)
        kept = _other_files(target)
        with scratch_folder(target.parent, f".{target.name}.new-") as fresh:
            write(fresh)
            for entry in kept:
                if not (fresh / entry.name).exists():
                    copy = shutil.copytree if entry.is_dir() else shutil.copy2
                    copy(entry, fresh / entry.name)
            for path in fresh.rglob("*"):
                if path.is_file():
                    sync(path)
            with locked(target.parent):
                _swap(fresh, target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Saving the memory bank to {target} failed: {error}. What was there before is unchanged. Free some space "
            "or choose another folder, and save again.",
        ) from error


def _swap(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; what was there is deleted afterwards, or put back if that fails."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():  # of a process that was killed while it deleted it
        shutil.rmtree(old)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    (old / CONFIG_NAME).unlink(missing_ok=True)  # from here on it is no bank that could be put back
    shutil.rmtree(old, ignore_errors=True)


def put_back(target: Path) -> None:
    """Put the earlier bank back in its place, if a process was killed while it replaced it."""
    old = target.parent / f".{target.name}.old"
    if not target.exists() and old.is_dir():
        with locked(target.parent):  # another process may be between the two renames
            if not target.exists() and (old / CONFIG_NAME).is_file():
                os.rename(old, target)


def apply_umask(folder: str | os.PathLike) -> None:
    """Give weights in a folder the permissions of any new file: safetensors lets nobody else read what it writes."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, which the system takes back when the process dies; yields False if it can't be had."""
    handle, held = None, False
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # held by another process, or the file system has no locks
                handle = os.open(folder, os.O_RDONLY)  # a folder can be locked as a file can: nothing is left in it
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
        yield held
    finally:
        if handle is not None:
            if held:
                fcntl.flock(handle, fcntl.LOCK_UN)  # also of forked processes, which share the handle
            os.close(handle)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove folders that `scratch_folder` named, and no others, unless a process holds their lock."""
    for entry in parent.iterdir():
        if re.fullmatch(re.escape(prefix) + "[0-9a-f]{8}", entry.name) and entry.is_dir():
            with locked(entry, wait=False) as abandoned:
                if abandoned:
                    shutil.rmtree(entry, ignore_errors=True)


def _other_files(target: Path) -> list[Path]:
    """Return what is in a bank's folder and not the bank's; ValueError if the folder holds no bank."""
    if target.is_file():
        raise ValueError(f"{target} is a file, expected a folder. Choose another place for the memory bank.")
    entries = list(target.iterdir()) if target.exists() else []
    if entries and not (target / CONFIG_NAME).is_file():
        raise ValueError(
            f"{target} is not empty and holds no memory bank ({CONFIG_NAME} is missing). Choose an empty folder."
        )
    ours = {CONFIG_NAME, "data", KEY_ENCODER_NAME, "value_encoder", LEFT_OUT_NAME}
    return [entry for entry in entries if entry.name not in ours]


def fetch(repo_id: str, filename: str, revision: str | None, token: str | bool | None) -> Path:
    """Return a file of a bank in the cache, in a folder named after the commit; OSError if it can't be downloaded."""
    try:
        return Path(hf_hub_download(repo_id, filename, repo_type="dataset", revision=revision, token=token))
    # huggingface_hub raises errors of its own, and those of an HTTP library that changes from version to version
    except Exception as error:
        raise OSError(
            f"{filename} of the memory bank {repo_id!r} at revision {revision or 'main'} could not be downloaded from "
            f"the Hub ({type(error).__name__}: {error}). Check the name (it is no local folder, or a revision was "
            "given), the revision, the connection and the token."
        ) from error


@contextlib.contextmanager
def evict_on_error(downloaded: list[Path]) -> Iterator[None]:
    """Remove these files from the cache, links and all, on a ValueError, so that they are downloaded anew."""
    try:
        yield
    except ValueError:
        for path in downloaded:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise


def resolve_commit(repo_id: str, revision: str | None, token: str | bool | None = None) -> str:
    """Return the commit hash of a bank's revision; OSError if the Hub has no such thing, or cannot be reached."""
    try:
        return HfApi().dataset_info(repo_id, revision=revision, token=token).sha
    except Exception as error:  # as in fetch
        raise OSError(
            f"The commit of the memory bank {repo_id!r} at revision {revision or 'main'} could not be found "
            f"({error}). Push the bank first (bank.push_to_hub), or detach it (model.detach_memory_bank)."
        ) from error


def push_files(
    files: dict[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    *,
    replaced: str,
    make_card: Callable[[str], str],
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **commit,
) -> tuple[str, CommitInfo]:
    """Put files into a repository in one commit; repository and branch are created if they do not exist. Return the
    full name of the repository, and the commit.

    `HfApi.upload_folder` would do it in several commits, and between them the repository would be of two versions.

    Args:
        files: what to upload, by name in the repository.
        replaced: pattern of files that are deleted unless they are in `files`: shards of an earlier version.
        make_card: makes README.md from the repository's name, where neither `files` nor the repository has one.
        commit: of `HfApi.create_commit`.

    Raises ValueError for a bank whose shards would replace those of a data set that is none.
    """
    api, where = HfApi(token=token), {"repo_type": repo_type, "revision": revision}
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    present = set(api.list_repo_files(repo_id, **where))
    if repo_type == "dataset" and CONFIG_NAME not in present and fnmatch.filter(present, replaced):
        raise ValueError(f"{repo_id} holds another data set ({replaced}), expected a bank: choose another name.")
    if CARD_NAME not in present | files.keys():
        files = {**files, CARD_NAME: make_card(repo_id).encode()}
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    operations += map(CommitOperationDelete, sorted(fnmatch.filter(present - files.keys(), replaced)))
    return repo_id, api.create_commit(repo_id, operations, **where, **commit)


def make_model_card(repo_id: str, config: PreTrainedConfig, tags: list[str]) -> str:
    """Return README.md of a model that is pushed without a card: only metadata where the package is not installed."""
    try:
        from tinyalign_vlm.hub_cards.cards import plain_model_card
    except ImportError:
        tags = list(dict.fromkeys(["tinyalign", "custom_code", *tags]))
        data = CardData(
            library_name="transformers", pipeline_tag="image-text-to-text", tags=tags, datasets=config.memory_bank
        )
        return f"---\n{data.to_yaml()}\n---\n"
    return plain_model_card(repo_id, config, tags)


def make_bank_card(repo_id: str, config: BankConfig) -> str:
    """Return README.md of a bank that is pushed without a card, as `make_model_card`."""
    try:
        from tinyalign_vlm.hub_cards.cards import plain_bank_card
    except ImportError:
        # without `configs` the Hub's viewer and `load_dataset` would have to guess what the files are
        files = [{"split": "train", "path": SHARDS}]
        configs = [{"config_name": "default", "data_files": files}]
        data = CardData(tags=["tinyalign", "memory-bank"], configs=configs)
        return f"---\n{data.to_yaml()}\n---\n"
    return plain_bank_card(repo_id, config)


def installed_package(module: str, task: str) -> ModuleType:
    """Import a module of the installed package's `training`, for a task that a checkpoint's own code leaves to it;
    ImportError, naming the task ("Building a memory bank" say), if the package is not installed.
    """
    try:
        return importlib.import_module(f"tinyalign_vlm.training.{module}")
    except ModuleNotFoundError as error:
        if error.name != "tinyalign_vlm":
            raise
        raise ImportError(f"{task} needs the package: pip install tinyalign-vlm.") from error
