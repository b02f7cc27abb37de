"""Format of a memory bank: bank_config.json and the columns of its rows, both strictly checked."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError

try:
    import pyarrow as pa
except ImportError:
    pa = None  # the other modules of a bank have it from here

CONFIG_NAME = "bank_config.json"
KEY_ENCODER_NAME = "key_encoder.safetensors"
VALUE_ENCODER_NAME = "value_encoder/model.safetensors"
LEFT_OUT_NAME = "left_out.jsonl"
CARD_FACTS_NAME = "card_facts.json"
FORMAT_VERSION = 1
BATCH_ROWS = 1024  # that are read, written and passed on together
FIXED_COLUMNS = ("id", "source_id", "caption", "key", "value", "thumbnail")
SOURCE_COLUMNS = ("image", "score", "probability")  # that `generate` adds to the rows it has read

# Limits far above any real bank, and far below what would exhaust a machine: a bank may be anybody's.
MAX_CONFIG_BYTES = 32 * 2**20
MAX_SIZE = 65_536  # of keys, of values, of a value's halves
MAX_GRID = 64  # side of a grid of visual tokens
MAX_THUMBNAIL = 4096  # side, in pixels
MAX_PIXELS = 2**22  # numbers in a probe image
NUM_WEIGHTS = 4  # of a logistic regression on similarities, see outputs.py
MAX_CALIBRATED_GROWTH = 1.5  # none_probability is off by 0.07 at 1.7, by 0.12 at 2.2: docs/keys.md
MAX_KEY_NORM = 1.001  # keys are of length 1, as far as float16 can tell


def between(low: float, high: float) -> Callable[[object], None]:
    """Return a validator of numbers; None passes where the field's type allows it."""

    def check(value: float | None) -> None:
        if value is not None and (isinstance(value, bool) or not low <= value <= high):
            raise ValueError(f"found {value!r}, expected {low} to {high}")

    return check


def broken_bank(found: str) -> ValueError:
    """Return the error of a bank that is not what was saved, with what to do."""
    return ValueError(f"{found}. Save or download the bank again.")


def check_text(value: str | None) -> None:
    """Raise ValueError unless the value is a short printable text, or None where the field's type allows it."""
    if value is not None and not (value.isprintable() and 1 <= len(value) <= 1000):
        raise ValueError(f"found {value[:80]!r}, expected 1 to 1000 printable characters")


def check_digest(value: str | None) -> None:
    """Raise ValueError unless the value is a sha256, or None where the field's type allows it."""
    if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"found {value[:80]!r}, expected 64 hex digits")


def check_weights(weights: Sequence[float]) -> None:
    """Raise ValueError unless these are the weights of a logistic regression of a `CalibrationConfig`."""
    if len(weights) != NUM_WEIGHTS or not all(map(math.isfinite, weights)):
        raise ValueError(f"found {weights[:8]!r}, expected {NUM_WEIGHTS} finite numbers")


def check_columns(columns: Sequence[str]) -> None:
    """Raise ValueError unless these columns of a data set can be kept with a bank's rows."""
    taken = FIXED_COLUMNS + SOURCE_COLUMNS
    distinct = {*columns, *taken}
    named = all(column.isprintable() and 1 <= len(column) <= 1000 for column in columns)
    if isinstance(columns, str) or len(distinct) < len(columns) + len(taken) or not named:
        raise ValueError(
            f"the columns to keep are {columns!r}, expected a list of printable names, each once, other than "
            f"{', '.join(taken)}: rename those columns first"
        )


def check_image_shape(shape: list[int]) -> None:
    """Raise ValueError unless the shape is [channels, height, width] of an image that fits in memory."""
    if len(shape) != 3 or not all(1 <= side <= 4096 for side in shape) or math.prod(shape) > MAX_PIXELS:
        raise ValueError(f"found {shape[:4]}, expected [channels, height, width], at most {MAX_PIXELS} numbers")


@strict
@dataclass
class TowerConfig:
    """The vision tower that a bank was built with: its name, revision and settings, and the images that it takes."""

    name: str = validated_field(check_text)
    revision: str | None = validated_field(check_text)
    image_shape: list[int] = validated_field(check_image_shape)
    config: dict
    vision_feature_layer: int | list[int]
    vision_feature_select_strategy: str


@strict
@dataclass
class KeyEncoderConfig:
    """Settings of a `KeyEncoder` that are not in its tensors."""

    key_space: Literal["vision", "language"]
    connector_act: str = validated_field(check_text)
    vision_pool_size: int | None = validated_field(between(1, MAX_GRID))
    alpha: float = validated_field(between(0, 1))
    grid: int = validated_field(between(1, MAX_GRID))


@strict
@dataclass
class CalibrationConfig:
    """Weights that turn the similarities of an image's neighbours into probabilities: see `probabilities`.

    Attributes:
        top_k: neighbours of an image that were looked at.
        num_rows: rows of the bank that they were fitted on.
        right, none: weights for a neighbour, and for none of the `top_k`, being right.
    """

    top_k: int = validated_field(between(1, 1000))
    num_rows: int = validated_field(between(1, 10**10))
    right: list[float] = validated_field(check_weights)
    none: list[float] = validated_field(check_weights)


@strict
@dataclass
class BankHashes:
    """The sha256 of a bank's parts; None until they are written."""

    keys: str | None = validated_field(check_digest, default=None)
    values: str | None = validated_field(check_digest, default=None)
    rows: str | None = validated_field(check_digest, default=None)
    key_encoder: str | None = validated_field(check_digest, default=None)
    value_encoder: str | None = validated_field(check_digest, default=None)
    config: str | None = validated_field(check_digest, default=None)


NESTED = {
    "tower": TowerConfig,
    "key_encoder": KeyEncoderConfig,
    "sha256": BankHashes,
    "calibration": CalibrationConfig,
}


@strict
@dataclass
class BankConfig:
    """The content of bank_config.json.

    Attributes:
        quantized: keys are rounded to float16 and values to 8 bits.
        preprocessing: settings of the image processor.
        num_latents, latent_dim, value_encoder: shape of a value, and sizes of the `ValueEncoder`; 0 and None in a bank
            without values.
        columns: what was kept of the source beside image and caption.
        thumbnail_size: side of the pictures in pixels, or None where there are none.
        num_left_out: rows of the source that are not in the bank: bad ones, and images that were there already.
        calibration: what `tinyalign bank calibrate` found, or None.
        num_rows, num_shards: rows and Parquet files; 0 until they are written.
    """

    key_dim: int = validated_field(between(1, MAX_SIZE))
    num_latents: int = validated_field(between(0, MAX_SIZE))
    latent_dim: int = validated_field(between(0, MAX_SIZE))
    quantized: bool
    tower: TowerConfig
    preprocessing: dict
    key_encoder: KeyEncoderConfig
    value_encoder: dict | None
    columns: list[str] = validated_field(check_columns)
    thumbnail_size: int | None = validated_field(between(1, MAX_THUMBNAIL))
    versions: dict
    num_left_out: int = validated_field(between(0, 10**12), default=0)
    calibration: CalibrationConfig | None = None
    num_rows: int = validated_field(between(0, 10**10), default=0)
    num_shards: int = validated_field(between(0, 99_999), default=0)
    sha256: BankHashes = field(default_factory=BankHashes)
    format_version: int = validated_field(between(FORMAT_VERSION, FORMAT_VERSION), default=FORMAT_VERSION)

    def validate_value_shape(self) -> None:
        """Raise ValueError unless the values' size is sane and that of the value encoder."""
        for name in ("num_latents", "latent_dim"):
            found = (self.value_encoder or {}).get(name, 0)
            if found != vars(self)[name] or (found == 0) != (self.value_encoder is None):
                raise ValueError(f"value_encoder.{name} is {found!r}, expected {name} = {vars(self)[name]}")
        if self.value_size > 16 * MAX_SIZE:
            raise ValueError(f"num_latents x latent_dim is {self.value_size}, expected at most {16 * MAX_SIZE}")

    @property
    def is_calibration_stale(self) -> bool:
        """True in a bank that has grown too much since it was calibrated."""
        return self.calibration is not None and self.num_rows > MAX_CALIBRATED_GROWTH * self.calibration.num_rows

    @property
    def value_size(self) -> int:
        return self.num_latents * self.latent_dim

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.num_latents, self.latent_dim

    @classmethod
    def from_json(cls, path: Path) -> "BankConfig":
        """Read a bank_config.json. ValueError, naming file and field, if it is missing, not JSON, has fields too many,
        too few or of a wrong type, is absurd, or was changed since it was written.
        """
        content = read_json(path)
        try:
            config = _parsed(cls, content)
            hashes = dict(vars(config.sha256))
            if config.value_encoder is None:
                hashes.pop("value_encoder")
            if config.num_rows == 0 or config.num_shards == 0 or None in hashes.values():
                raise ValueError(
                    "num_rows or num_shards is 0, or a sha256 is null: this bank was not written to its end"
                )
            if config_sha256(content) != config.sha256.config:
                raise ValueError(
                    f"the sha256 of this file's content is {config_sha256(content)}, expected {config.sha256.config}"
                )
        except (StrictDataclassError, ValueError) as error:
            text = " ".join(str(error).split())[:1000]
            raise broken_bank(f"{path}: {text}") from error
        return config

    def to_json(self, path: Path) -> None:
        """Write a bank_config.json with its own sha256; ValueError if it could not be read again."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))
        content["sha256"]["config"] = config_sha256(content)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self.from_json(path)


def _parsed(kind: type, content: object, name: str = "") -> object:
    """Make a strict dataclass of a JSON object. Raises ValueError for unknown and for missing fields."""
    if not isinstance(content, dict):
        raise ValueError(f"{name.rstrip('.')} is {str(content)[:80]!r}, expected an object")
    for key in sorted({known.name for known in dataclasses.fields(kind)} ^ content.keys()):
        found = "unknown: this version of tinyalign-vlm does not read it" if key in content else "missing"
        raise ValueError(f"the field {name}{key[:80]} is {found}")
    nested = dict(NESTED) if kind is BankConfig else {}
    if content.get("calibration") is None:
        nested.pop("calibration", None)
    return kind(**content | {key: _parsed(part, content[key], f"{key}.") for key, part in nested.items()})


def read_json(path: Path) -> dict:
    """Read a JSON object of at most `MAX_CONFIG_BYTES`, or raise ValueError naming the file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MAX_CONFIG_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is not a (whole) memory bank.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise broken_bank(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise broken_bank(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def config_sha256(content: dict) -> str:
    """Return the sha256 of all that bank_config.json says but itself, however it is laid out."""
    hashes = {name: digest for name, digest in content["sha256"].items() if name != "config"}
    return hashlib.sha256(json.dumps({**content, "sha256": hashes}, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(path: Path, sha256: str) -> None:
    """Refuse a file that is missing or not the one bank_config.json was written for (ValueError naming it)."""
    found = file_sha256(path) if path.is_file() else "none, the file is missing"
    if found != sha256:
        raise ValueError(
            f"{path}: its sha256 is {found}, but {CONFIG_NAME} says {sha256}. The bank was damaged or changed by "
            "hand: save or download it again."
        )


def row_schema(key_dim: int, value_size: int, thumbnails: bool, kept: Iterable[str]) -> "pa.Schema":
    """Return the columns of a bank: the fixed ones, then what was `kept` of the source, as text."""
    fields = {
        "id": pa.int64(),
        "source_id": pa.string(),
        "caption": pa.string(),
        "key": pa.list_(pa.float32(), key_dim),
    }
    if value_size:
        fields["value"] = pa.list_(pa.float16(), value_size)
    metadata = None
    if thumbnails:
        fields["thumbnail"] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        metadata = {"huggingface": json.dumps({"info": {"features": {"thumbnail": {"_type": "Image"}}}})}
    return pa.schema(fields | dict.fromkeys(kept, pa.string()), metadata=metadata)


def config_schema(config: BankConfig) -> "pa.Schema":
    """Return the columns that bank_config.json declares."""
    return row_schema(config.key_dim, config.value_size, config.thumbnail_size is not None, config.columns)


def arrays_of(schema: "pa.Schema") -> list[str]:
    """Return the columns of numbers: the key and, in a bank with values, the value."""
    return [name for name in ("key", "value") if name in schema.names]


def matrix(batch: "pa.RecordBatch", column: str) -> np.ndarray:
    """Return a fixed-size-list column as a `(rows, width)` array, without a copy where Arrow allows it."""
    values = batch.column(column)
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), values.type.list_size)


def list_column(array: np.ndarray) -> "pa.FixedSizeListArray":
    """Return a `(rows, width)` array as a fixed-size-list column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def check_schema(found: "pa.Schema", expected: "pa.Schema", name: str) -> None:
    """Refuse columns other than the expected ones (ValueError naming `name` and the column)."""
    for column in [*expected.names, *found.names]:
        types = [
            schema.field(column).type if schema.names.count(column) == 1 else "missing or there twice"
            for schema in (found, expected)
        ]
        if types[0] != types[1]:
            raise broken_bank(f"{name}: column {column!r} is {types[0]}, expected {types[1]}")


def check_batch(batch: "pa.RecordBatch", start: int, name: str) -> None:
    """Refuse nulls, numbers that are not finite, long keys and malformed ids in the rows `start, start + 1, ...`."""

    def refuse(wrong: Sequence[bool], column: str, found: str | Sequence, expected: str) -> None:
        if np.any(wrong):
            row = int(np.argmax(wrong))
            text = found if isinstance(found, str) else repr(found[row])[:80]
            raise broken_bank(f"{name}: row {start + row} has {column} {text}, expected {expected}")

    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise broken_bank(f"{name}: the rows from {start} on are malformed ({error})") from error
    arrays = arrays_of(batch.schema)
    for column in ("id", "source_id", "caption", *arrays):
        refuse(batch.column(column).is_null().to_numpy(False), column, "null", "a value")
    for column in arrays:
        if batch.column(column).flatten().null_count:
            raise broken_bank(f"{name}: {column} has nulls from row {start} on, expected numbers")
        refuse(~np.isfinite(matrix(batch, column)).all(axis=1), column, "'NaN or infinity'", "finite numbers")
    norms = np.linalg.norm(matrix(batch, "key").astype(np.float64), axis=1)
    refuse(norms > MAX_KEY_NORM, "key", f"of length {norms.max():.3g}", "at most 1, or it would win every search")
    ids = batch.column("id").to_pylist()
    refuse(ids != np.arange(start, start + len(batch)), "id", ids, "the row's number")
    names = batch.column("source_id").to_pylist()
    refuse([not re.fullmatch("[0-9a-f]{32}", source_id) for source_id in names], "source_id", names, "32 hex digits")
    if "thumbnail" in batch.schema.names:
        paths = batch.column("thumbnail").field("path")
        refuse(paths.is_valid().to_numpy(False), "thumbnail", "with a path", "pictures inside the bank")
