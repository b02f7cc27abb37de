"""What happened to a memory bank: its folder's `log.jsonl` has a line a change, `left_out.jsonl` the rows left out."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...modeling_tinyalign.bank_config import CONFIG_NAME, read_json
from ...modeling_tinyalign.bank_folders import recover_folder, replace_folder
from ...modeling_tinyalign.memory_bank import MemoryBank

LOG_NAME = "log.jsonl"
LEFT_OUT_NAME = "left_out.jsonl"
# What of a bank is laid out on the machines that use it.
LOCAL = ("keys", "values", "rows")


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """
    One process at a time builds or changes the bank in `folder`; a killed one keeps nobody out.

    Raises `ValueError` when another process is at it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is building or changing {folder} (it holds {lock.lock_file}), expected one at a time. "
            "Wait until it has finished, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def open_bank(folder: str | Path) -> MemoryBank:
    """The bank in a folder of this machine. Raises `ValueError` when there is none."""
    folder = Path(folder)
    recover_folder(folder)
    if not (folder / CONFIG_NAME).is_file():
        found = (
            "no such folder" if not folder.exists() else "a file" if folder.is_file() else f"no {CONFIG_NAME} in it"
        )
        raise ValueError(
            f"{folder} is no memory bank ({found}), expected a folder that `tinyalign bank build` or "
            "MemoryBank.save_pretrained made."
        )
    return MemoryBank.from_pretrained(folder)


def save_change(bank: MemoryBank, folder: Path, change: dict, left_out: Sequence[dict] = ()):
    """
    Puts a bank in the place of the one in `folder`, which is there until the new one is complete, with a line more in
    its log and the rows that were left out.
    """
    config = folder / CONFIG_NAME
    replaced = read_json(config)["sha256"] if config.is_file() else {}
    versions = {"sha256": {part: bank.config["sha256"][part] for part in LOCAL}}
    versions["replaced"] = {part: replaced[part] for part in LOCAL if part in replaced}
    lines = {LOG_NAME: [{**change, "rows": len(bank), **versions}], LEFT_OUT_NAME: left_out}

    def write(fresh: Path):
        bank._write(fresh)
        for name, new in lines.items():
            earlier = folder / name
            text = earlier.read_text(encoding="utf-8") if earlier.is_file() else ""
            text += "".join(f"{json.dumps(line)}\n" for line in new)
            (fresh / name).write_text(text, encoding="utf-8")

    replace_folder(folder, write)


def read_log(folder: Path) -> list[dict]:
    """
    The changes of a bank, the oldest first; none of a bank that was made in Python.

    Raises `ValueError` when the file is damaged.
    """
    path = folder / LOG_NAME
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as JSON lines ({error}). Repair or delete it: the bank does without, but "
            "`tinyalign bank compact` then leaves copies of its earlier versions on this machine."
        ) from error


def is_last_change(folder: Path, change: dict) -> bool:
    """Whether a bank is as a change left it: a command that was killed at its very end has nothing to do any more."""
    return change.items() <= (read_log(folder) or [{}])[-1].items()


def count_kinds(left_out: Sequence[dict]) -> str:
    """`3 left out (2 broken image, 1 duplicate)`"""
    kinds = Counter(row["reason"].partition(":")[0] for row in left_out)
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{len(left_out)} left out{found and f' ({found})'}"
