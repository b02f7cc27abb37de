"""bank_config.json: what a memory bank says of itself, and whether to believe it."""

import hashlib
import json
import re
from pathlib import Path

CONFIG_NAME = "bank_config.json"
FORMAT_VERSION = 1
HASHED = ("keys", "values", "rows", "key_encoder", "value_encoder")
# Largest counts a bank_config.json may declare: far above any real bank, far below what would exhaust a machine.
LIMITS = {
    "num_rows": 10**10,
    "num_shards": 99_999,
    "key_dim": 65_536,
    "num_latents": 65_536,
    "latent_dim": 65_536,
}
# ... and side of a grid of visual tokens
MAX_GRID = 64


def read_json(path: Path) -> dict:
    """A JSON object, or ValueError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is not a (whole) memory bank.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Save or download the bank again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object. Save the bank again.")
    return content


def check_config(config: dict, path: Path) -> None:
    """Refuse a bank_config.json whose fields are missing, of the wrong type or absurd.

    Raises:
        ValueError: naming the file, the field, what was found and what was expected.
    """

    def refuse(field: str, found: object, expected: str) -> None:
        raise ValueError(f"{path}: {field} is {found!r}, expected {expected}. Save or download the bank again.")

    if config.get("format_version") != FORMAT_VERSION:
        refuse("format_version", config.get("format_version"), f"{FORMAT_VERSION} (or update tinyalign-vlm)")
    for field, limit in LIMITS.items():
        value = config.get(field)
        if type(value) is not int or not 1 <= value <= limit:
            refuse(field, value, f"an integer between 1 and {limit}")
    hashes = config.get("sha256")
    for name in HASHED:
        digest = hashes.get(name) if isinstance(hashes, dict) else None
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            refuse(f"sha256.{name}", digest, "64 hex digits")
    key_settings, tower = config.get("key_encoder"), config.get("tower")
    if not isinstance(key_settings, dict) or key_settings.get("key_space") not in ("vision", "language"):
        refuse("key_encoder", key_settings, 'an object whose key_space is "vision" or "language"')
    if not isinstance(tower, dict) or not isinstance(tower.get("name"), str):
        refuse("tower", tower, "an object with the tower's name")
    for field, values in (("grid", range(1, MAX_GRID + 1)), ("vision_pool_size", [None, *range(1, MAX_GRID + 1)])):
        found = key_settings.get(field)
        if type(found) not in (int, type(None)) or found not in values:
            refuse(f"key_encoder.{field}", found, f"an integer between 1 and {MAX_GRID}")
    shape = tower.get("image_shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(s) is int and 1 <= s <= 4096 for s in shape)):
        refuse("tower.image_shape", shape, "[channels, height, width]")
    if not isinstance(config.get("value_encoder"), dict):
        refuse("value_encoder", config.get("value_encoder"), "an object with the value encoder's sizes")
    columns, thumbnail_size = config.get("columns"), config.get("thumbnail_size")
    if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        refuse("columns", columns, "a list of names")
    if not (thumbnail_size is None or (type(thumbnail_size) is int and 1 <= thumbnail_size <= 4096)):
        refuse("thumbnail_size", thumbnail_size, "a number of pixels or null")
    if not isinstance(config.get("skipped_rows"), list):
        refuse("skipped_rows", config.get("skipped_rows"), "a list")


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
