"""Frozen visual features of a data set, computed once and kept in a memory-mapped file."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...processing.images import decode_image, image_source
from .progress import ImageProgress
from .rows import image_path

PART_IMAGES = 256  # what a killed process loses at most


def cache_vision_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Any],
    path: str | os.PathLike,
    batch_size: int = 8,
    desc: str = "Vision features",
) -> np.memmap:
    """Read what `model.get_vision_features` makes of each image, computing only what an earlier call has not.

    The features are in `<path>-<fingerprint>.npy`. The fingerprint covers the images' bytes, the tower's weights and
    the preprocessing, so another input never gets an old file. What a killed call had finished is used by the next.
    Under `accelerate launch` or `torchrun` all processes must call this: each computes a share, on its own device.

    Args:
        model: a TinyAlign model; its tower runs where it is, in its dtype.
        images: a column of a `datasets.Dataset` (`dataset["image"]`), or PIL images, bytes or paths.
        batch_size: images per forward pass. Small ones are faster on a CPU: EfficientNet-Lite0 takes 24 ms an image
            in batches of 4, 82 ms in batches of 32.
        desc: what the progress bar says.

    Returns:
        `(n, T, C)` float16, memory-mapped, one row an image.

    Raises:
        ValueError: there is no image, one cannot be read, its features do not fit in float16 (its number is named),
            the tower trains, or a transform changes the images.
        OSError: the disk has no room for them, or is full: what was computed is kept for the next call.
    """
    if isinstance(images, datasets.Column):
        refuse_transforms(images.source)
    images = undecoded_images(images)
    if len(images) == 0:
        raise ValueError("There are no images, expected at least one.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = from_main_process(lambda: fingerprint_images(model, processor, images))
    complete = path.with_name(f"{path.name}-{fingerprint}.npy")
    if not from_main_process(complete.exists):
        with one_run_at_a_time(complete.with_suffix(".lock")) as state:
            if not complete.exists():
                partial = complete.with_suffix(".partial")
                _compute(model, processor, images, partial, batch_size, desc)
                if state.is_main_process:
                    os.replace(partial, complete)
    return np.load(complete, mmap_mode="r", allow_pickle=False)


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


def refuse_transforms(dataset: datasets.Dataset):
    """Raise `ValueError` if `set_transform` has put something (augmentation, say) between a data set and its rows."""
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The data set has a transform, which may change its images (augmentation): features computed once are "
            "not theirs. Take it away (dataset.reset_format()), or train from images: cache_features: false, no "
            "vision_features."
        )


def undecoded_images(images: Sequence[Any]) -> Sequence[Any]:
    """Return a dataset's image column as the bytes and paths it holds; any other sequence as it is."""
    if isinstance(images, datasets.Column) and isinstance(images.features, datasets.Image):
        return images.source.cast_column(images.column_name, datasets.Image(decode=False))[images.column_name]
    return images


def read_image(images: Sequence[Any], index: int) -> Any:
    """Return an image as upright RGB; raises `ValueError` with its number."""
    try:
        return decode_image(images[index])
    except ValueError as error:
        raise ValueError(f"Image {index}: {error}. Repair it or remove the row.") from error


def fingerprint_images(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Any]) -> str:
    """Return 32 hex digits that images, tower and preprocessing decide."""
    digest = hashlib.sha256()
    config, tower = model.config, model.base_model.vision_tower
    settings = (tower.dtype, config.vision_feature_layer, config.vision_feature_select_strategy)
    preprocessing = json.loads(processor.image_processor.to_json_string())
    preprocessing.pop("auto_map", None)  # saving a processor adds it
    digest.update(f"{preprocessing}{settings}{len(images)}".encode())
    hash_weights(digest, tower)
    for image in tqdm(images, "Checking for cached features", leave=False):
        digest.update(hashlib.sha256(_image_bytes(image)).digest())
    return digest.hexdigest()[:32]


def hash_weights(digest: "hashlib._Hash", module: torch.nn.Module):
    """Add the weights of a module to a hash."""
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # as bytes: numpy has no bfloat16; flat first: a scalar cannot be viewed as another type
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _image_bytes(image: Any) -> bytes:
    source, path = image_source(image), image_path(image)
    if path is not None and "://" not in path:
        return Path(path).read_bytes()
    if isinstance(source, Image.Image):
        colours = source.getpalette(), source.info.get("transparency")
        return f"{source.mode}{source.size}{colours}".encode() + source.tobytes()
    return source if isinstance(source, bytes) else f"{source}".encode()


@torch.no_grad()
def _compute(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Any], partial: Path, batch_size: int, desc: str
):
    """Fill `partial`, an .npy file. Until all is there, a byte for each part, 1 when it is written, ends the file."""
    state = PartialState()
    ((_, features),) = feature_batches(model, processor, images, range(1), 1)  # for their shape
    header, row_bytes, num_parts = BytesIO(), 2 * features.numel(), -(-len(images) // PART_IMAGES)
    shape = (len(images), *features.shape[1:])
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    end = header.tell() + len(images) * row_bytes
    if state.is_main_process and not (partial.exists() and partial.stat().st_size in (end, end + num_parts)):
        free = shutil.disk_usage(partial.parent).free
        if end > free:
            raise OSError(
                f"The features of {len(images)} images take {end / 1e9:.1f} GB, but {partial.parent} has "
                f"{free / 1e9:.1f} GB left. Make room, set HF_HOME to a larger disk, or train with cache_features: "
                "false."
            )
        with open(partial, "wb") as file:
            file.write(header.getvalue())
            file.truncate(end + num_parts)
    state.wait_for_everyone()
    with open(partial, "rb+") as file:
        file.seek(end)
        written = file.read() or bytes([1]) * num_parts  # the bytes are gone once all parts are written
        state.wait_for_everyone()  # all know what is to do before one of them starts to do it
        todo = [part for part in range(num_parts) if not written[part]]
        todo = todo[state.process_index :: state.num_processes]
        spans = [range(part * PART_IMAGES, min((part + 1) * PART_IMAGES, len(images))) for part in todo]
        with ImageProgress(sum(map(len, spans)), desc, state.process_index) as bar:
            for part, span in zip(todo, spans, strict=True):
                file.seek(header.tell() + span.start * row_bytes)
                for start, features in feature_batches(model, processor, images, span, batch_size):
                    features = features.to("cpu", torch.float16)
                    finite = features.flatten(1).isfinite().all(dim=1)
                    if not finite.all():
                        raise ValueError(
                            f"Image {start + int(finite.int().argmin())} has features that are NaN or do not fit in "
                            "float16: check the tower's weights and dtype."
                        )
                    file.write(features.numpy().tobytes())  # not by a memory map: a full disk would be a SIGBUS
                    bar.update(len(features))
                file.flush()
                os.fsync(file.fileno())
                file.seek(end + part)
                file.write(b"\1")
    state.wait_for_everyone()
    if state.is_main_process:
        os.truncate(partial, end)


def feature_batches(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Any], span: range, batch_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the number of the first image, and the features `(n, T, C)`, of each batch in `span`."""
    for start in range(span.start, span.stop, batch_size):
        batch = [read_image(images, index) for index in range(start, min(start + batch_size, span.stop))]
        pixel_values = processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
        yield start, model.get_vision_features(pixel_values)
