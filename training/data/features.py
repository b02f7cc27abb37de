"""Frozen visual features of a data set, computed once and kept in a memory-mapped file."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...processing.images import decode_image, image_source
from .rows import image_path
from .shared_array import fill_array, from_main_process, one_run_at_a_time


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
        model: its tower runs where it is, in its dtype.
        images: a column of a `datasets.Dataset` (`dataset["image"]`), or PIL images, bytes or paths.
        batch_size: images per forward pass; few are faster on a CPU.

    Returns:
        `(n, T, C)` float16, memory-mapped, one row an image.

    Raises:
        ValueError: there is no image, a transform changes them, one cannot be read, or its features do not fit in
            float16 (its number is named).
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
    """Fill the file `partial` with the features of all images."""

    def compute(spans: list[range]) -> Iterator[np.ndarray]:
        for span in spans:
            for start, features in feature_batches(model, processor, images, span, batch_size):
                features = features.to("cpu", torch.float16)
                finite = features.flatten(1).isfinite().all(dim=1)
                if not finite.all():
                    raise ValueError(
                        f"Image {start + int(finite.int().argmin())} has features that are NaN or do not fit in "
                        "float16: check the tower's weights and dtype."
                    )
                yield features.numpy()

    ((_, first),) = feature_batches(model, processor, images, range(1), 1)  # for their shape
    shape = (len(images), *first.shape[1:])
    fill_array(partial, np.dtype("<f2"), shape, compute, desc, ", or train with cache_features: false")


def feature_batches(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Any], span: range, batch_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the number of the first image, and the features `(n, T, C)`, of each batch in `span`."""
    for start in range(span.start, span.stop, batch_size):
        batch = [read_image(images, index) for index in range(start, min(start + batch_size, span.stop))]
        pixel_values = processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
        yield start, model.get_vision_features(pixel_values)
