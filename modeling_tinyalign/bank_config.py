"""bank_config.json: what a memory bank says of itself, and whether to believe it."""

import hashlib
import json
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path

CONFIG_NAME = "bank_config.json"
FORMAT_VERSION = 1
HASHED = ("keys", "values", "rows", "key_encoder", "value_encoder", "config")
FIXED_COLUMNS = ("id", "source_id", "caption", "key", "value", "thumbnail")
# Far above any real bank, far below what would exhaust a machine:
MAX_CONFIG_BYTES = 32 * 2**20
MAX_SIZE = 65_536  # of keys, of values, of a value's halves
MAX_GRID = 64  # side of a grid of visual tokens
MAX_THUMBNAIL = 4096  # side, in pixels
MAX_PIXELS = 2**22  # numbers in a probe image

Check = Callable[[object], bool]


def integer(low: int, high: int) -> tuple[Check, str]:
    return lambda value: type(value) is int and low <= value <= high, f"an integer between {low} and {high}"


def optional(check: tuple[Check, str]) -> tuple[Check, str]:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def later(check: tuple[Check, str]) -> tuple[Check, str]:
    """A field that earlier versions did not write."""
    return lambda value: value in (..., None) or check[0](value), f"{check[1]}, or null"


def is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 1 <= len(value) <= 1000


def is_image_shape(value: object) -> bool:
    sides = value if isinstance(value, list) and len(value) == 3 else [0]
    return all(map(integer(1, 4096)[0], sides)) and reduce(int.__mul__, sides) <= MAX_PIXELS


def are_columns(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value)) and len({*value, *FIXED_COLUMNS}) == len(value) + 6


def are_skipped_rows(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and type(row.get("row")) is int and isinstance(row.get("reason"), str) for row in value
    )


def is_index(value: object) -> bool:
    numbers = ("k_factor", "recall_at_5", "milliseconds")
    return (
        isinstance(value, dict)
        and value.keys() == {"index", *numbers}
        and is_text(value["index"])
        and all(type(value[name]) in (int, float) and 0 <= value[name] <= 1e9 for name in numbers)
    )


# What every field must be, and how an error says so.
FIELDS: dict[str, tuple[Check, str]] = {
    "format_version": (integer(FORMAT_VERSION, FORMAT_VERSION)[0], f"{FORMAT_VERSION} (or update tinyalign-vlm)"),
    "num_rows": integer(1, 10**10),
    "num_shards": integer(1, 99_999),
    "key_dim": integer(1, MAX_SIZE),
    "num_latents": integer(1, MAX_SIZE),
    "latent_dim": integer(1, MAX_SIZE),
    **{
        f"sha256.{name}": (
            lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
            "64 hex digits",
        )
        for name in HASHED
    },
    "tower.name": (is_text, "the name of the vision tower"),
    "tower.revision": optional((is_text, "a revision")),
    "tower.image_shape": (is_image_shape, f"[channels, height, width], at most {MAX_PIXELS} numbers"),
    "preprocessing": (lambda value: isinstance(value, dict), "an object"),
    "versions": (lambda value: isinstance(value, dict), "an object"),
    "key_encoder.key_space": (lambda value: value in ("vision", "language"), '"vision" or "language"'),
    "key_encoder.grid": integer(1, MAX_GRID),
    "key_encoder.vision_pool_size": optional(integer(1, MAX_GRID)),
    "key_encoder.alpha": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number between 0 and 1"),
    "key_encoder.connector_act": (is_text, "the name of an activation"),
    "value_encoder": (lambda value: isinstance(value, dict), "an object with the value encoder's sizes"),
    "columns": (are_columns, f"a list of printable names other than {', '.join(FIXED_COLUMNS)}, each once"),
    "thumbnail_size": optional(integer(1, MAX_THUMBNAIL)),
    "packed": later((lambda value: type(value) is bool or value == "keys", 'true, false or "keys"')),
    "index": later((is_index, "an object with index, k_factor, recall_at_5 and milliseconds")),
    "skipped_rows": (are_skipped_rows, 'a list of {"row": number, "reason": text}'),
}


def read_json(path: Path) -> dict:
    """A JSON object, or ValueError naming the file: no key twice, no NaN, at most `MAX_CONFIG_BYTES`."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MAX_CONFIG_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is not a (whole) memory bank.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Save or download the bank again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object. Save the bank again.")
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"a key is there twice, among {', '.join(name for name, _ in pairs)[:200]}")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"found {name}, expected numbers that are finite")


def check_config(config: dict, path: Path) -> None:
    """Refuse a bank_config.json whose fields are missing, of the wrong type, absurd or changed since it was written.

    Raises:
        ValueError: naming the file, the field, what was found and what was expected.
    """

    def refuse(field: str, found: object, expected: str) -> None:
        shown = "missing" if found is ... else repr(found)[:200]
        raise ValueError(f"{path}: {field} is {shown}, expected {expected}. Save or download the bank again.")

    for field, (is_right, expected) in FIELDS.items():
        found = config
        for name in field.split("."):
            found = found.get(name, ...) if isinstance(found, dict) else ...
        if not is_right(found):
            refuse(field, found, expected)
    for field in ("num_latents", "latent_dim"):
        if config["value_encoder"].get(field) != config[field]:
            refuse(f"value_encoder.{field}", config["value_encoder"].get(field), f"{field} = {config[field]}")
    if config["num_latents"] * config["latent_dim"] > 16 * MAX_SIZE:
        refuse("num_latents x latent_dim", config["num_latents"] * config["latent_dim"], f"at most {16 * MAX_SIZE}")
    if config_sha256(config) != config["sha256"]["config"]:
        refuse("the sha256 of this file's content", config_sha256(config), config["sha256"]["config"])


def write_config(config: dict, path: Path) -> None:
    """Write a bank_config.json with its own sha256; ValueError if it could not be read again."""
    config = json.loads(json.dumps(config))
    config["sha256"]["config"] = config_sha256(config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    check_config(read_json(path), path)


def config_sha256(config: dict) -> str:
    """The sha256 of all that bank_config.json says but itself, however it is laid out."""
    hashes = {name: digest for name, digest in config["sha256"].items() if name != "config"}
    return hashlib.sha256(json.dumps({**config, "sha256": hashes}, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
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
