"""`tinyalign bank merge`: one bank of several that have the same encoders."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.bank_format import BankConfig
from ...modeling_tinyalign.bank_rows import renumbered
from ..hub.bank_facts import save_with_facts
from .folders import check_new_folder


def merge_banks(
    bank_names: Sequence[str | os.PathLike], out: str | os.PathLike, keep_duplicates: bool = False
) -> None:
    """Write a new bank to `out` with the rows of several, in their order.

    Of an image that more than one has, those of the first are taken. The new bank is quantized if the first one is.

    Raises `ValueError` if the banks were made with other towers or encoders, or are of other shapes or columns (all
    that differs is named), or `out` is there, and `OSError` if it could not be written.
    """
    if len(bank_names) < 2:
        raise ValueError(f"Found {len(bank_names)} bank, expected two or more to merge.")
    check_new_folder(Path(out))
    banks = [MemoryBank.from_pretrained(name) for name in bank_names]
    expected = shared_settings(banks[0].config)
    for name, bank in zip(bank_names[1:], banks[1:], strict=True):
        found = shared_settings(bank.config)
        differing = [field for field in expected if found[field] != expected[field]]
        differences = "; ".join(f"{field}: {found[field]!r} here, {expected[field]!r} there" for field in differing)
        if differences:
            raise ValueError(
                f"{name} cannot be merged with {bank_names[0]}. {differences}. Build it again with `tinyalign bank "
                f"build --like {bank_names[0]}`, which uses the same encoders."
            )
    merged = banks[0].with_rows(renumbered(merged_tables(banks, keep_duplicates)))
    left_out = sum(map(len, banks)) - len(merged)
    merged.config.num_left_out = left_out + sum(bank.config.num_left_out for bank in banks)
    duplicates = ["--keep_duplicates"] if keep_duplicates else []
    command = ["tinyalign", "bank", "merge", *map(str, bank_names), *duplicates, "--out", "bank"]
    save_with_facts(merged, out, command, bank_names)
    print(f"{out}: {len(merged)} rows of {len(banks)} banks; {left_out} left out, whose image an earlier bank has.")


def shared_settings(config: BankConfig) -> dict[str, object]:
    """Return what banks must have in common for their rows to be in one, by what it is called."""
    return {
        "vision tower": config.tower.name,
        "number of latents": config.num_latents,
        "size of a latent": config.latent_dim,
        "size of a key": config.key_dim,
        "key space": config.key_encoder.key_space,
        "kept columns": config.columns,
        "size of thumbnails": config.thumbnail_size,
        "key encoder (its mean and whitening are fitted to a bank's own rows)": config.sha256.key_encoder,
        "value encoder": config.sha256.value_encoder,
    }


def merged_tables(banks: Sequence[MemoryBank], keep_duplicates: bool) -> Iterator[pa.Table]:
    """Yield the rows of all banks, without those whose image an earlier bank has unless they are to be kept."""
    seen = set()
    for bank in banks:
        names = bank.table["source_id"].to_pylist()
        kept = np.array([keep_duplicates or name not in seen for name in names])
        seen.update(names)
        for batch in bank.batches():
            yield pa.Table.from_batches([batch]).filter(pa.array(kept[batch["id"].to_numpy()]))
