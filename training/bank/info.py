"""`tinyalign bank info`: what is in a memory bank, in lines."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.bank_format import CONFIG_NAME, KEY_ENCODER_NAME, BankConfig
from .folders import folder_of_bank

COMMON, WIDTH = 8, 80  # values of a column that are shown, and their characters


def bank_info(name: str | os.PathLike) -> str:
    """Return what is in a bank, by its folder or repository, a line each; raises `ValueError` if there is none."""
    folder = folder_of_bank(name)
    config, bank = BankConfig.from_json(folder / CONFIG_NAME), MemoryBank.from_pretrained(folder)
    encoders = (size_of(folder / "value_encoder") + (folder / KEY_ENCODER_NAME).stat().st_size) / 2**20
    images = len(np.unique(bank.source_order[0]))
    rows = size_of(folder / "data") / 2**20
    shards = f"{rows:.1f} MiB rows in {config.num_shards} shards, {encoders:.1f} MiB encoders"
    revision = f" at {config.tower.revision}" if config.tower.revision else ""
    index = [f"{value}" if name == "index" else f"{name} {value}" for name, value in bank.index_facts.items()]
    values = "none: for models that read captions"
    if config.value_size:
        values = f"{config.num_latents} x {config.latent_dim} numbers of {8 if config.quantized else 16} bits"
    lines = [  # pairs: a column may be named like one of these
        ("rows", f"{len(bank):,} of {images:,} images"),
        ("left out", f"{config.num_left_out:,} rows of the data set"),
        ("on disk", shards),
        ("local copy", str(bank.folder)),
        ("keys", ", ".join(_describe_keys(bank))),
        ("values", values),
        ("thumbnails", f"{config.thumbnail_size} pixels" if config.thumbnail_size else "none"),
        ("tower", f"{config.tower.name}{revision}, images of {' x '.join(map(str, config.tower.image_shape))}"),
        ("index", ", ".join(index)),
        ("calibrated", _describe_calibration(bank)),
        *((column, _common_values(bank.table[column])) for column in config.columns),
        *((f"sha256 {name}", digest) for name, digest in vars(config.sha256).items() if name != "config" and digest),
    ]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in lines)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _describe_keys(bank: MemoryBank) -> list[str]:
    config, encoder = bank.config, bank.key_encoder
    lines = [
        f"{config.key_dim} numbers of {16 if config.quantized else 32} bits, {config.key_encoder.key_space} space"
    ]
    if encoder.grid > 1:
        lines.append(f"{encoder.grid} x {encoder.grid} cells")
    if encoder.projection is not None:
        lines.append(f"whitened from {encoder.mean.numel()}")
    return lines


def _describe_calibration(bank: MemoryBank) -> str:
    calibration = bank.config.calibration
    if calibration is None:
        return "no"
    advice = "; stale, run `tinyalign bank calibrate` again" if bank.config.is_calibration_stale else ""
    return f"for {calibration.top_k} neighbours, with {calibration.num_rows:,} rows{advice}"


def _common_values(column: pa.ChunkedArray) -> str:
    """Return `cc0 12, cc-by 3, (none) 1`, the most frequent first."""
    counts = Counter(column.to_pylist()).most_common()
    names = {None: "(none)", "": "(empty)"}
    shown = [f"{names.get(value) or ' '.join(value.split())[:WIDTH]} {count:,}" for value, count in counts[:COMMON]]
    if len(counts) > COMMON:
        shown.append(f"and {len(counts) - COMMON} other values")
    return ", ".join(shown)
