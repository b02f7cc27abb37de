"""From a dataset of images and captions to the rows of a memory bank."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .bank_config import FIXED_COLUMNS, MAX_THUMBNAIL, are_columns
from .bank_images import image_source_id, load_image, thumbnail_bytes
from .bank_shards import list_column, matrix, row_schema
from .bank_storage import BankFiles, Packed, check_packed, require_bank_packages, write_local_files
from .key_encoder import NUM_PROBES, KeyEncoder, fit_whitening
from .value_encoder import ValueEncoder

try:
    import pyarrow as pa
    from PIL import Image
except ImportError:
    pa = Image = None

# Rows the whitening is fitted on: their products with one another must fit in memory.
MAX_WHITENING_ROWS = 4096


@contextlib.contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Without gradients and in eval mode; the modes are put back afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        with torch.no_grad():
            for module in modules:
                module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def probe_pixels(image_shape: Sequence[int]) -> torch.Tensor:
    """Four fixed synthetic images `(4, *image_shape)`, float32 in [-1, 1], free of any random generator.

    Waves of several scales, as in a photograph: with a single slow wave bfloat16 alone moves EfficientNet's keys to a
    cosine of 0.93, with these to 0.999.
    """
    channels, height, width = image_shape
    probe, channel, y, x = np.ogrid[:NUM_PROBES, :channels, :height, :width]
    scales = (1, 2, 4, 8, 16)
    waves = [
        np.sin(
            2 * np.pi * k * x / width + k * probe + 1.7 * channel + np.sin(2 * np.pi * k * y / height + 2.3 * probe)
        )
        for k in scales
    ]
    weights = [k**-0.5 for k in scales]
    return torch.from_numpy(np.average(waves, axis=0, weights=weights)).float()


def describe_tower(model: PreTrainedModel, image_shape: list[int]) -> dict:
    """Name, revision and settings of a model's vision tower; a local folder is named without its path."""
    vision_config = model.config.vision_config
    settings = json.loads(vision_config.to_json_string())
    settings.pop("_name_or_path", None)
    name = vision_config._name_or_path or vision_config.model_type
    return {
        "name": Path(os.path.abspath(name)).name if os.path.isabs(name) or os.path.isdir(name) else name,
        "revision": model.config.vision_model_revision,
        "config": settings,
        "vision_feature_layer": model.config.vision_feature_layer,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "image_shape": image_shape,
    }


@dataclass
class RowEncoder:
    """Encodes dataset rows, batch by batch, into record batches of a bank.

    Attributes:
        num_rows: the id that the next row gets.
        skipped_rows: `{"row": number, "reason": text}` of each bad row, when `skip_bad_rows`.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    value_encoder: ValueEncoder
    key_encoder: KeyEncoder
    image_column: str = "image"
    caption_column: str = "caption"
    keep_columns: Sequence[str] = ()
    batch_size: int = 32
    thumbnail_size: int | None = 64
    skip_bad_rows: bool = False
    vision_features: torch.Tensor | np.ndarray | None = None
    num_rows: int = 0
    skipped_rows: list[dict] = field(default_factory=list)
    packed: Packed | None = None

    def __post_init__(self):
        check_row_settings(self.keep_columns, self.batch_size, self.thumbnail_size)

    @classmethod
    def for_new_bank(
        cls,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        value_encoder: ValueEncoder,
        key_grid: int = 1,
        **settings,
    ) -> RowEncoder:
        """With a new key encoder, whose mean and whitening are fitted when all rows are encoded.

        Args:
            settings: the other fields of this class.
        """
        require_bank_packages()
        check_latents(value_encoder, model)
        check_packed(settings.get("packed"))
        with evaluating(model):
            features = model.get_vision_features(probe_pixels(image_shape(processor)))
            key_encoder = KeyEncoder.of_model(model, features.shape[-1], key_grid)
        return cls(model, processor, value_encoder, key_encoder, **settings)

    @property
    def schema(self) -> pa.Schema:
        """Of the record batches; the keys are raw."""
        config = self.value_encoder.config
        thumbnails = self.thumbnail_size is not None
        return row_schema(
            self.key_encoder.mean.numel(), config.num_latents * config.latent_dim, thumbnails, self.keep_columns
        )

    def batches(self, dataset: Iterable[dict]) -> Iterator[pa.RecordBatch]:
        """Record batches with raw keys; ids count from `num_rows`."""
        chunk = []
        for row in self._checked_rows(dataset):
            chunk.append(row)
            if len(chunk) == self.batch_size:
                yield self.encode(chunk)
                chunk = []
        if chunk:
            yield self.encode(chunk)

    def _checked_rows(self, dataset: Iterable[dict]) -> Iterator[dict]:
        """Rows with a decoded image and a caption; the others raise, or are listed."""
        total = len(dataset) if isinstance(dataset, Sized) else None
        if self.vision_features is not None and len(self.vision_features) < (total or 0):
            raise ValueError(
                f"vision_features has {len(self.vision_features)} rows, but the dataset has {total}: pass one row for "
                "each, in the dataset's order."
            )
        for number, row in enumerate(tqdm(_undecoded(dataset, self.image_column), "Encoding the bank", total)):
            self._check_columns(number, row)
            try:
                image = load_image(row[self.image_column])
                caption = row[self.caption_column]
                if not isinstance(caption, str) or not caption.strip():
                    raise ValueError(f"the caption is {caption!r}, expected text")
                caption.encode()  # half a surrogate pair cannot be stored
            except ValueError as error:
                if not self.skip_bad_rows:
                    raise ValueError(
                        f"Row {number} of the dataset: {error}. Repair or remove it, or pass skip_bad_rows=True to "
                        "leave such rows out and have them listed in bank.skipped_rows."
                    ) from error
                self.skipped_rows.append({"row": number, "reason": str(error)})
                continue
            kept = [None if row[column] is None else str(row[column]) for column in self.keep_columns]
            yield {
                "row": number,
                "image": image,
                "source_id": image_source_id(image),
                "caption": caption,
                "kept": kept,
            }

    def _check_columns(self, number: int, row: dict) -> None:
        if not isinstance(row, dict):
            raise ValueError(
                f"Row {number} of the dataset is a {type(row).__name__}, expected a dict of columns. Of a "
                'DatasetDict, pass one split: dataset["train"].'
            )
        for name, column in (("caption_column", self.caption_column), ("image_column", self.image_column)):
            if column not in row:
                raise ValueError(
                    f"The dataset has no column {column!r} (row {number}); its columns are {sorted(row)}. A memory "
                    f"bank needs an image and a caption per row: pass {name}=..., the name of that column."
                )
        for column in self.keep_columns:
            if column not in row:
                raise ValueError(f"The dataset has no column {column!r} to keep; its columns are {sorted(row)}.")

    @torch.no_grad()
    def encode(self, rows: list[dict]) -> pa.RecordBatch:
        """One batch: rows of a `row` number, an RGB `image`, its `source_id`, a `caption` and the `kept` columns.

        Raises:
            ValueError: a key or value is not finite (the row is named).
        """
        captions = [row["caption"] for row in rows]
        pixels = None
        if self.vision_features is None or self.value_encoder.config.image_input == "pixels":
            images = self.processor.image_processor(images=[row["image"] for row in rows], return_tensors="pt")
            pixels = images["pixel_values"]
        if self.vision_features is None:
            features = self.model.get_vision_features(pixels)
        else:
            features = torch.stack([torch.as_tensor(self.vision_features[row["row"]]) for row in rows])
        ids, mask = self._caption_ids(captions, features.device)
        keys = self.key_encoder.to(features.device).raw_keys(features, ids, mask).cpu()
        values = encode_values(self.value_encoder, pixels, features, captions)
        for name, tensor in (("key", keys), ("value", values.half())):
            finite = tensor.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                raise ValueError(
                    f"Row {rows[int(finite.int().argmin())]['row']} of the dataset gets a {name} that is NaN or "
                    "infinite in the bank's precision. Check the vision tower and the value encoder; float16 towers "
                    "overflow."
                )
        columns = {
            "id": pa.array(range(self.num_rows, self.num_rows + len(rows)), pa.int64()),
            "source_id": pa.array([row["source_id"] for row in rows]),
            "caption": pa.array(captions),
            "key": list_column(keys.numpy()),
            "value": list_column(values.half().flatten(1).numpy()),
        }
        if self.thumbnail_size is not None:
            small = [{"bytes": thumbnail_bytes(row["image"], self.thumbnail_size), "path": None} for row in rows]
            columns["thumbnail"] = pa.array(small, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        for number, column in enumerate(self.keep_columns):
            columns[column] = pa.array([row["kept"][number] for row in rows], pa.string())
        self.num_rows += len(rows)
        return pa.record_batch(list(columns.values()), schema=self.schema)

    def _caption_ids(
        self, captions: list[str], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Token ids and mask `(batch, length)` of the captions, in language space only."""
        if self.key_encoder.token_embeddings is None:
            return None, None
        ids = [self.processor.tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in captions]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in ids], True)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in ids], True)
        return padded.to(device), mask.to(device)


def image_shape(processor: ProcessorMixin) -> list[int]:
    """`[channels, height, width]` of what the processor makes of an image."""
    pixels = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    return list(pixels.shape[1:])


def mean_and_sample(batches: Iterable[pa.RecordBatch], num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of all raw keys, float64 `(raw_dim,)`, and `MAX_WHITENING_ROWS` of them, always the same ones."""
    chosen = np.zeros(num_rows, dtype=bool)
    chosen[np.random.default_rng(0).permutation(num_rows)[:MAX_WHITENING_ROWS]] = True
    keys, total, start = [], 0.0, 0
    for batch in batches:
        of_batch = matrix(batch, "key")
        total += torch.from_numpy(of_batch.astype(np.float64)).sum(dim=0)
        keys.append(of_batch[chosen[start : start + len(batch)]])
        start += len(batch)
    return total / num_rows, torch.from_numpy(np.concatenate(keys))


def finished(batches: Iterable[pa.RecordBatch], key_encoder: KeyEncoder) -> Iterator[pa.RecordBatch]:
    """The batches with raw keys made into keys."""
    for batch in batches:
        keys = key_encoder.finish(torch.tensor(matrix(batch, "key"))).numpy()
        yield batch.set_column(batch.schema.names.index("key"), "key", list_column(keys))


def renumbered(tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    """The rows with ids 0, 1, 2, ..."""
    start = 0
    for table in tables:
        for batch in table.combine_chunks().to_batches():
            if "id" not in batch.schema.names:
                raise ValueError(f"The columns are {batch.schema.names}, expected those of a bank, id among them.")
            ids = pa.array(range(start, start + len(batch)), pa.int64())
            yield batch.set_column(batch.schema.names.index("id"), "id", ids)
            start += len(batch)


def encode_values(
    value_encoder: ValueEncoder, pixels: torch.Tensor | None, features: torch.Tensor, captions: list[str]
) -> torch.Tensor:
    """Values `(n, num_latents, latent_dim)`, float32 on the CPU, from the pixels or the features of the images."""
    images = pixels if value_encoder.config.image_input == "pixels" else features
    return value_encoder.encode(images, captions).float().cpu()


def check_latents(value_encoder: ValueEncoder, model: PreTrainedModel) -> None:
    """Refuse a value encoder whose latents are not of the shape the model reads (ValueError with both shapes)."""
    found = (value_encoder.config.num_latents, value_encoder.config.latent_dim)
    expected = (model.config.num_latents, model.config.latent_dim)
    if found != expected:
        raise ValueError(
            f"The value encoder makes latents of shape {found}, but the model expects {expected}. Give both the same "
            "num_latents and latent_dim."
        )


def check_row_settings(keep_columns: Sequence[str], batch_size: int, thumbnail_size: int | None) -> None:
    """Raise ValueError for what no bank can be built with."""
    if isinstance(keep_columns, str) or not are_columns(list(keep_columns)):
        raise ValueError(
            f"keep_columns is {keep_columns!r}, expected a list of columns, each once, with printable names other "
            f"than {', '.join(FIXED_COLUMNS)}: rename those columns first."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more.")
    if thumbnail_size is not None and not 1 <= thumbnail_size <= MAX_THUMBNAIL:
        raise ValueError(f"thumbnail_size is {thumbnail_size}, expected 1 to {MAX_THUMBNAIL} pixels, or none.")


def fit_and_write(
    encoder: RowEncoder, batches: Callable[[], Iterator[pa.RecordBatch]], whiten_dim: int | None
) -> BankFiles:
    """Fit the key encoder's mean and whitening to all `encoder.num_rows` rows and write the bank's local files."""
    if encoder.num_rows == 0:
        raise ValueError(
            f"The dataset has no usable rows ({len(encoder.skipped_rows)} were skipped): a memory bank needs at "
            "least one image with a caption."
        )
    key_encoder = encoder.key_encoder
    mean, sample = mean_and_sample(batches(), encoder.num_rows)
    key_encoder.cpu().mean = mean.float()
    if whiten_dim is not None:
        key_encoder.projection = fit_whitening(sample, mean, whiten_dim)
    config = encoder.value_encoder.config
    value_shape = (config.num_latents, config.latent_dim)
    thumbnails = encoder.thumbnail_size is not None
    schema = row_schema(key_encoder.key_dim, value_shape[0] * value_shape[1], thumbnails, encoder.keep_columns)
    return write_local_files(
        finished(batches(), key_encoder), schema, value_shape, "The new memory bank", encoder.packed
    )


def _undecoded(dataset: Iterable[dict], image_column: str) -> Iterable[dict]:
    """A Hub dataset whose images are read here, so that a corrupt one can be named and skipped."""
    try:
        import datasets
    except ImportError:
        return dataset
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        if isinstance((dataset.features or {}).get(image_column), datasets.Image):
            return dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset
