"""Files that are there whole or not at all, and disks that are full."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from ..modeling_tinyalign.files import sync

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # the last: faiss's


def save_file(path: Path, content: bytes | pa.Buffer):
    """Write a file that is there whole or not at all. Raises `OSError` when it cannot."""
    fresh = path.with_suffix(".new")
    try:
        with open(fresh, "wb") as file:
            file.write(content)
        sync(fresh)
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error


@contextmanager
def nothing_left(folder: Path, *names: str) -> Iterator[None]:
    """Remove `folder`, and its parents, if work on it fails that has made them and left nothing but files so named."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            if path.is_dir() and {entry.name for entry in path.iterdir()} <= set(names):
                shutil.rmtree(path, ignore_errors=True)
        raise


@contextmanager
def full_disk_advice(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Report a full disk with what to do about it: `what` of the work is kept in `folder`.

    Raises `OSError` for whatever a full disk makes of Python, safetensors, tokenizers, PyTorch and `datasets`.
    """
    try:
        yield
    except Exception as error:  # whatever each library makes of it
        cause = full_disk_error(error)
        if cause is None:
            raise
        reason = cause.args[1] if len(cause.args) > 1 else str(cause)
        place = cause.filename2 or cause.filename
        raise OSError(
            cause.errno,
            f"{str(reason).rstrip('.')}{f' ({place})' if place else ''}. Nothing is lost: {folder} keeps {what}. Free "
            "some space and run the same command again; it goes on from there.",
        ) from error


def full_disk_error(error: BaseException) -> OSError | None:
    """Return the `OSError` of a full disk that is behind an error; None if it has another cause."""
    if isinstance(error, OSError) and error.errno in FULL:
        return error
    if isinstance(error, OSError) and str(error).startswith("Not enough disk space"):  # of datasets
        return OSError(errno.ENOSPC, str(error))
    of_rust = re.search(r"\(os error (\d+)\)$", str(error))  # safetensors' and tokenizers' own exceptions
    if of_rust and int(of_rust[1]) in FULL:
        return OSError(int(of_rust[1]), str(error))
    # torch.save: of a block that it cannot write, or of the end of the file
    of_torch = "inline_container.cc" in str(error) or "iostream error" in str(error)
    if isinstance(error, RuntimeError) and of_torch and "Reader" not in str(error):
        return OSError(errno.EIO, f"torch.save could not write a whole file: {error}")
    earlier = error.__cause__ or error.__context__
    return None if earlier is None else full_disk_error(earlier)
