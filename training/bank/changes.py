"""`tinyalign bank remove`: a new bank without some of the rows of another one."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.row_encoder import image_source_id
from ...processing.images import decode_image
from ..hub.bank_facts import save_with_facts
from .folders import check_new_folder


def remove_rows(
    bank_name: str | os.PathLike,
    out: str | os.PathLike,
    source_ids: Sequence[str] = (),
    images: Sequence[str] = (),
    where: Sequence[str] = (),
) -> None:
    """Write a new bank to `out`: without the rows of images with these names, of these files, and where all is true.

    Raises `ValueError` if an image is not in the bank, a condition is not one, no row is meant or none would be left,
    or `out` is there, and `OSError` if it could not be written.
    """
    if not (source_ids or images or where):
        raise ValueError("Nothing says which rows: expected --source-id, --image or --where.")
    check_new_folder(Path(out))
    bank = MemoryBank.from_pretrained(bank_name)
    rows = set()
    if where:
        rows.update(np.flatnonzero(matching(bank.table, where)).tolist())
        if not rows:
            raise ValueError(
                f"No row of {bank_name} has {' and '.join(where)}: nothing is removed. `tinyalign bank info` shows "
                "what the columns hold."
            )
    names = dict(zip(source_ids, source_ids, strict=True))
    names |= {path: image_source_id(decode_image(path)) for path in images}
    for asked, name in names.items():
        found = bank.ids_of(name).tolist()
        if not found:
            raise ValueError(
                f"{bank_name} has no row of the image {asked}{'' if asked == name else f' ({name})'}, expected a "
                "source_id of the bank: 32 hex digits that follow from the image's pixels. Nothing is removed."
            )
        rows.update(found)
    smaller = bank.remove(sorted(rows))
    command = ["tinyalign", "bank", "remove", str(bank_name)]
    for option, values in (("--source-id", source_ids), ("--image", images), ("--where", where)):
        command += [word for value in values for word in (option, value)]
    save_with_facts(smaller, out, [*command, "--out", "bank"], [bank_name])
    print(f"{out}: {len(smaller)} rows, {len(rows)} removed.")


def matching(table: pa.Table, where: Sequence[str]) -> np.ndarray:
    """Find the rows that all conditions are true of, as a boolean array `(rows,)`.

    A condition is `column=value`, the whole text, or `column~value`, which is somewhere in it. `column=` is true of
    what is empty or missing. Raises `ValueError` if a condition is something else, or its column is not there.
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
