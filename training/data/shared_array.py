"""An array about the images of a data set: all processes of a run fill it, and a kill loses little."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock

from .progress import Progress

PART_IMAGES = 256  # what a killed process loses at most


def from_main_process(make: Callable[[], Any]) -> Any:
    """Return what `make` returns in the main process, in all of them."""
    (found,) = broadcast_object_list([make() if PartialState().is_main_process else None])
    return found


@contextmanager
def one_run_at_a_time(lock: Path) -> Iterator[PartialState]:
    """Let all processes of a run in and out together; another run that wants the same waits, and then finds it."""
    state = PartialState()
    with FileLock(lock) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield state
        state.wait_for_everyone()


def fill_array(
    path: Path,
    dtype: np.dtype,
    shape: tuple[int, ...],
    compute: Callable[[list[range]], Iterator[np.ndarray]],
    desc: str,
    advice: str = "",
) -> None:
    """Write an .npy file of numbers about `shape[0]` images, in parts; those of a process that was killed are kept.

    All processes of a run must call this: each computes a share. Until all is there, a byte for each part, 1 when it
    is written, ends the file.

    Args:
        compute: yields the rows of the images in some spans, in their order, in batches within a span.
        desc: what the progress bar says.
        advice: what else can be done where the disk has no room, which is an `OSError`.
    """
    state, num_images = PartialState(), shape[0]
    header, row_bytes, num_parts = BytesIO(), dtype.itemsize * math.prod(shape[1:]), -(-num_images // PART_IMAGES)
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    start, end = header.tell(), header.tell() + num_images * row_bytes
    if state.is_main_process and not (path.exists() and path.stat().st_size in (end, end + num_parts)):
        free = shutil.disk_usage(path.parent).free
        if end > free:
            raise OSError(
                f"{desc}: {num_images} images take {end / 1e9:.1f} GB, but {path.parent} has {free / 1e9:.1f} GB "
                f"left. Make room, or set HF_HOME to a larger disk{advice}, and run the same command again."
            )
        path.write_bytes(header.getvalue())
        os.truncate(path, end + num_parts)
    state.wait_for_everyone()
    with open(path, "rb+") as file:
        file.seek(end)
        written = file.read() or bytes([1]) * num_parts  # the bytes are gone once all parts are written
        state.wait_for_everyone()  # all know what is to do before one of them starts to do it
        todo = [part for part in range(num_parts) if not written[part]][state.process_index :: state.num_processes]
        spans = [range(num_images)[part * PART_IMAGES : (part + 1) * PART_IMAGES] for part in todo]
        batches, total, done = compute(spans), sum(map(len, spans)), 0
        if state.is_main_process and total:
            Progress.write(f"{desc}: {total:,} images.")
        with Progress(total=total, desc=desc, unit="image", position=state.process_index) as bar:
            for part, span in zip(todo, spans, strict=True):
                file.seek(start + span.start * row_bytes)
                while file.tell() < start + span.stop * row_bytes:
                    rows = next(batches)
                    file.write(rows.tobytes())  # not by a memory map: a full disk would be a SIGBUS
                    bar.update(len(rows))
                    done += len(rows)
                    bar.say(f"{desc}: {done:,} of {total:,} images")
                file.flush()
                os.fsync(file.fileno())
                file.seek(end + part)
                file.write(b"\1")
    state.wait_for_everyone()
    if state.is_main_process:
        os.truncate(path, end)
