"""`tinyalign bank remove`, `merge` and `compact`: a new version of a bank beside the old one, then in its place."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.bank_builder import renumbered
from ...modeling_tinyalign.bank_folders import recover_folder, scratch_folder
from ...modeling_tinyalign.bank_images import image_source_id
from ...modeling_tinyalign.bank_storage import SCRATCH_PREFIX, cache_root
from .log import changing, is_last_change, open_bank, read_log, save_change

# What two banks must have in common for their rows to be in one: (field of bank_config.json, what it is)
SHARED = {
    "tower.name": "vision tower",
    "num_latents": "number of latents",
    "latent_dim": "size of a latent",
    "key_dim": "size of a key",
    "key_encoder.key_space": "key space",
    "columns": "kept columns",
    "thumbnail_size": "size of thumbnails",
    "sha256.key_encoder": "key encoder (its mean and whitening are fitted to a bank's own rows)",
    "sha256.value_encoder": "value encoder",
}


def remove_rows(
    folder: Path, source_ids: Sequence[str] = (), images: Sequence[str] = (), where: Sequence[str] = ()
) -> None:
    """
    Removes the rows of images with these names, of these image files, and those that all of `where` is true of.

    Raises:
        ValueError: An image is not in the bank, a condition is not one, or no row is meant, or none would be left.
    """
    if not (source_ids or images or where):
        raise ValueError("Nothing says which rows: expected --source-id, --image or --where.")
    given, folder = folder, Path(folder).resolve()
    with changing(folder):
        bank = open_bank(folder)
        names = {name: name for name in source_ids} | {path: image_source_id(path) for path in images}
        change = {"change": "remove", "source_ids": sorted(names.values()), "where": list(where)}
        if is_last_change(folder, change):
            print(f"{given}: {len(bank)} rows; these were removed before, there is nothing to do.")
            return
        rows = set()
        if where:
            rows.update(np.flatnonzero(matching(bank._table, where)).tolist())
            if not rows:
                raise ValueError(
                    f"No row of {folder} has {' and '.join(where)}: nothing is removed. `tinyalign bank info` shows "
                    "what the columns hold."
                )
        for asked, name in names.items():
            found = bank.ids_of(name).tolist()
            if not found:
                raise ValueError(
                    f"{folder} has no row of the image {asked}{'' if asked == name else f' ({name})'}, expected a "
                    "source_id of the bank: 32 hex digits that follow from the image's pixels. Nothing is removed."
                )
            rows.update(found)
        if len(rows) == len(bank):
            raise ValueError(
                f"All {len(bank)} rows of {folder} would be removed, but a memory bank needs at least one. To do "
                "without the bank, delete its folder."
            )
        smaller = bank.remove(sorted(rows))
        save_change(smaller, folder, {**change, "removed": len(rows)})
    print(
        f"{given}: {len(smaller)} rows, {len(rows)} removed. Copies of the earlier version may be left on this "
        f"machine: `tinyalign bank compact {given}` deletes them."
    )


def matching(table: pa.Table, where: Sequence[str]) -> np.ndarray:
    """
    Which rows `(rows,)` all of the conditions are true of: `column=value`, the whole text, or `column~value`, which is
    somewhere in it. `column=` is true of what is empty or missing.

    Raises `ValueError` for anything else, and for a column that is not there.
    """
    columns = [name for name in table.column_names if name != "thumbnail"]
    chosen = np.ones(len(table), dtype=bool)
    for condition in where:
        parts = re.fullmatch(r"\s*([^=~]+?)\s*([=~])(.*)", condition, re.DOTALL)
        if parts is None or parts[1] not in columns:
            found = "no condition" if parts is None else f"no column {parts[1]!r}"
            raise ValueError(
                f"--where {condition!r}: {found}, expected column=value, or column~text for values with a text in "
                f"them, where the column is one of {', '.join(columns)}."
            )
        texts = pc.fill_null(table[parts[1]].cast(pa.string()), "")
        is_true = pc.equal(texts, parts[3]) if parts[2] == "=" else pc.match_substring(texts, parts[3])
        chosen &= is_true.to_numpy()
    return chosen


def merge_banks(folders: Sequence[Path], out: Path, keep_duplicates: bool = False) -> None:
    """
    A new bank with the rows of several, in their order; of an image that more than one has, those of the first.

    Raises:
        ValueError: The banks were made with other towers or encoders, or are of other shapes or columns (all that
            differs is named), or there is something else in `out`.
    """
    if len(folders) < 2:
        raise ValueError(f"Found {len(folders)} bank, expected two or more to merge.")
    given, out = out, Path(out).resolve()
    banks = [open_bank(folder) for folder in folders]
    for folder, bank in zip(folders[1:], banks[1:], strict=True):
        differences = [
            f"{name}: {found!r} here, {expected!r} there"
            for field, name in SHARED.items()
            if (found := _field(bank, field)) != (expected := _field(banks[0], field))
        ]
        if differences:
            raise ValueError(
                f"{folder} cannot be merged with {folders[0]}. {'; '.join(differences)}. Build it again with "
                f"`tinyalign bank build --like {folders[0]}`, which uses the same encoders."
            )
    change = {
        "change": "merge",
        "banks": [str(folder) for folder in folders],
        "of": [bank.config["sha256"]["config"] for bank in banks],
        "keep_duplicates": keep_duplicates,
    }
    with changing(out):
        recover_folder(out)
        if is_last_change(out, change):
            print(f"{given} is complete: there is nothing to do.")
            return
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise ValueError(f"{out} is there already: choose another --out.")
        tables, seen = [], np.empty(0, "S32")
        for bank in banks:
            keep = np.ones(len(bank), dtype=bool)
            names, order = bank._source_order
            if not keep_duplicates:
                keep[order[np.isin(names, seen)]] = False
            seen = np.union1d(seen, names)
            tables.append((bank, keep))
        merged = banks[0]._with_rows(
            renumbered(
                pa.Table.from_batches([batch]).filter(pa.array(keep[batch["id"].to_numpy()]))
                for bank, keep in tables
                for batch in bank._batches()
            ),
            [],
        )
        save_change(merged, out, change)
    left_out = sum(map(len, banks)) - len(merged)
    print(f"{given}: {len(merged)} rows of {len(banks)} banks; {left_out} left out, whose image an earlier bank has.")


def _field(bank: MemoryBank, field: str) -> object:
    found = bank.config
    for name in field.split("."):
        found = found[name]
    return found


def compact_bank(folder: Path) -> None:
    """
    Writes the shards of a bank anew, as few as hold its rows, and deletes what earlier versions of it have left on
    this machine: their memory-mapped copies, with the rows that have been removed since.
    """
    given, folder = folder, Path(folder).resolve()
    with changing(folder):
        bank = open_bank(folder)
        versions = [change[name] for change in read_log(folder) for name in ("sha256", "replaced")]
        earlier = {digest for version in versions for digest in version.values()}
        before = size_of(folder)
        if not is_last_change(folder, {"change": "compact"}):
            save_change(bank, folder, {"change": "compact"})
        freed = 0
        current = set(bank.config["sha256"].values())
        with scratch_folder(cache_root(), SCRATCH_PREFIX) as scratch:  # each copy goes whole, should this be killed
            for copy in cache_root().iterdir():
                digest = copy.name.partition("-")[0]
                if copy.is_dir() and digest in earlier - current:
                    freed += size_of(copy)
                    copy.rename(scratch / copy.name)
    print(
        f"{given}: {size_of(folder):,} bytes, {before:,} before; {freed:,} bytes of earlier versions deleted from "
        "HF_HOME/tinyalign."
    )


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
