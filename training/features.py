"""Frozen visual features of a data set, computed once and kept in a memory-mapped file."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..modeling_tinyalign.bank_images import load_image

logger = logging.get_logger(__name__)


def cache_vision_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Any],
    path: str | os.PathLike,
    batch_size: int = 8,
    desc: str = "Vision features",
) -> np.memmap:
    """
    Reads what `model.get_vision_features` makes of each image, computing only what an earlier call has not.

    The features are in `<path>-<fingerprint>.npy`. The fingerprint covers the images' bytes, the tower's weights and
    the preprocessing, so another input never gets an old file. What a killed call had finished is used by the next.

    Args:
        model: A TinyAlign model; its tower runs where it is, in its dtype.
        images: A column of a `datasets.Dataset` (`dataset["image"]`), or PIL images, bytes or paths.
        path: Where to keep the features; the folder is made.
        batch_size: Images per forward pass. Small ones are faster on a CPU: EfficientNet-Lite0 takes 24 ms an image
            in batches of 4, 82 ms in batches of 32.
        desc: What the progress bar says.

    Returns:
        `(n, T, C)` float16, memory-mapped, one row an image.

    Raises:
        ValueError: There is no image, one cannot be read, its features do not fit in float16 (its number is named),
            the tower trains, or a transform changes the images.
        OSError: The disk has no room for them, or is full: what was computed is kept for the next call.
    """
    if isinstance(images, datasets.Column):
        refuse_transforms(images.source)
    images = undecoded(images)
    if len(images) == 0:
        raise ValueError("There are no images, expected at least one.")
    fingerprint = fingerprint_images(model, processor, images)
    path = Path(path)
    complete = path.with_name(f"{path.name}-{fingerprint}.npy")
    complete.parent.mkdir(parents=True, exist_ok=True)
    # another run that wants the same waits for this one, and then finds them
    with nullcontext() if complete.exists() else FileLock(complete.with_suffix(".lock")):
        if not complete.exists():
            partial = complete.with_suffix(".partial")
            _compute(model, processor, images, partial, batch_size, desc)
            os.replace(partial, complete)
    return np.load(complete, mmap_mode="r", allow_pickle=False)


def refuse_transforms(dataset: datasets.Dataset):
    """Raises `ValueError` if `set_transform` has put something (augmentation, say) between a data set and its rows."""
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The data set has a transform, which may change its images (augmentation): features computed once are "
            "not theirs. Take it away (dataset.reset_format()), or train from images: cache_features: false, no "
            "vision_features."
        )


def undecoded(images: Sequence[Any]) -> Sequence[Any]:
    """A dataset's image column as the bytes and paths it holds; any other sequence as it is."""
    if isinstance(images, datasets.Column) and isinstance(images.features, datasets.Image):
        return images.source.cast_column(images.column_name, datasets.Image(decode=False))[images.column_name]
    return images


def read_image(images: Sequence[Any], index: int) -> Any:
    """The image as upright RGB; raises `ValueError` with its number."""
    try:
        return load_image(images[index])
    except ValueError as error:
        raise ValueError(f"Image {index}: {error}. Repair it or remove the row.") from error


def fingerprint_images(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Any]) -> str:
    """32 hex digits of images, tower and preprocessing."""
    digest = hashlib.sha256()
    config, tower = model.config, model.base_model.vision_tower
    settings = (tower.dtype, config.vision_feature_layer, config.vision_feature_select_strategy)
    preprocessing = json.loads(processor.image_processor.to_json_string())
    preprocessing.pop("auto_map", None)  # saving a processor adds it
    digest.update(f"{preprocessing}{settings}{len(images)}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for image in tqdm(images, "Checking for cached features", leave=False):
        digest.update(hashlib.sha256(_image_bytes(image)).digest())
    return digest.hexdigest()[:32]


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    return f"{image}".encode() if image is None else f"{image.mode}{image.size}".encode() + image.tobytes()


@torch.no_grad()
def _compute(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Any],
    partial: Path,
    batch_size: int,
    desc: str,
):
    """Appends to `partial`, an .npy file that is complete up to its last whole row."""
    with open(partial, "ab+") as file:
        done = _rows_in(file, len(images))
        if done:
            logger.info(f"{partial}: going on after {done} of {len(images)} images.")
        starts = range(done, len(images), batch_size)
        with tqdm(total=len(images), initial=done, desc=desc, unit="image") as bar:
            for start, features in zip(starts, _batches(model, processor, images, starts, batch_size), strict=True):
                if file.tell() == 0:
                    _check_room(partial, features, len(images))
                    header = {"descr": "<f2", "fortran_order": False, "shape": (len(images), *features.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                features = features.to("cpu", torch.float16)
                finite = features.flatten(1).isfinite().all(dim=1)
                if not finite.all():
                    raise ValueError(
                        f"Image {start + int(finite.int().argmin())} has features that are NaN or do not fit in "
                        "float16: check the tower's weights and dtype."
                    )
                file.write(features.numpy().tobytes())
                file.flush()
                bar.update(len(features))
        os.fsync(file.fileno())


def _check_room(partial: Path, features: torch.Tensor, num_images: int):
    needed, free = features[0].numel() * 2 * num_images, shutil.disk_usage(partial.parent).free
    if needed > free:
        raise OSError(
            f"The features of {num_images} images take {needed / 1e9:.1f} GB, but {partial.parent} has "
            f"{free / 1e9:.1f} GB left. Make room, set HF_HOME to a larger disk, or train with cache_features: false."
        )


def _batches(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Any],
    starts: Iterable[int],
    batch_size: int,
):
    for start in starts:
        batch = [read_image(images, index) for index in range(start, min(start + batch_size, len(images)))]
        pixel_values = processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
        yield model.get_vision_features(pixel_values)


def _rows_in(file, num_images: int) -> int:
    """Whole rows in an unfinished file; the rest of it is cut off."""
    file.seek(0)
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:  # killed before the header was written
        file.truncate(0)
        return file.seek(0)
    header = file.tell()
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    done = min((file.seek(0, os.SEEK_END) - header) // row_bytes, num_images)
    file.truncate(header + done * row_bytes)
    file.seek(0, os.SEEK_END)
    return done
