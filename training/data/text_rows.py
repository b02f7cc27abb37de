"""Rows of text files: JSON in the layouts that tools write, and tables."""

import csv
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any, TextIO

# Lists of dictionaries in one row, where other objects with one such list hold rows in it.
ROW_LISTS = {"messages", "conversations", "texts", "images", "prompt", "completion", "sentences"}


def json_rows(file: TextIO) -> Iterator[str]:
    """Yield the text of each row: a line, or an entry of the list or object that is the file."""
    lines = (line for line in file if line.strip())
    first, second = next(lines, ""), next(lines, "")
    if second and _is_object(first):
        yield from chain([first, second], lines)
        return
    rest = list(lines)
    try:
        value = json.loads("".join([first, second, *rest]) or "[]")
    except ValueError:
        if not _is_object(second):
            raise
        yield from [first, second, *rest]
    else:
        yield from map(json.dumps, _rows_in(value))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _rows_in(value: Any) -> list:
    """Return the rows of a list, of an object that has them under one key, or of COCO's captions; or the one row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"it holds the {type(value).__name__} {value!r:.50}")
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)}
    if {"images", "annotations"} <= lists.keys():
        names = {image.get("id"): image.get("file_name") for image in lists["images"]}
        return [{**row, "image": names.get(row.get("image_id"))} for row in lists["annotations"]]
    tables = [item for item in value.values() if isinstance(item, dict)]
    if len(tables) == len(value) > 0:
        if all(number.isdigit() for column in tables for number in column):  # columns, as pandas writes them
            rows = zip(*(column.values() for column in tables), strict=False)
            return [dict(zip(value, row, strict=True)) for row in rows]
        if "image" not in value:  # rows by their names
            return tables
    holders = lists.keys() - ROW_LISTS
    is_row = not {"image", *ROW_LISTS - {"prompt"}}.isdisjoint(value)
    return lists[holders.pop()] if len(holders) == 1 and not is_row else [value]


def csv_rows(file: TextIO) -> Iterator[str]:
    """Yield the rows of a table as JSON; the column names say what stands between columns."""
    csv.field_size_limit(2**31 - 1)  # a picture in base64 is one field
    header = next((line for line in file if line.strip()), "")
    separator = max("\t,;|", key=header.count)
    spaced = f"{separator} " in header  # Flickr30k's
    rows = csv.DictReader(chain([header], file), delimiter=separator, skipinitialspace=spaced, strict=True)
    try:
        for row in rows:
            # a quote that is closed lines later; the end of a caption with a comma is in the next field: such a row
            # is a list, and bad
            swallowed = separator == "\t" and any("\t" in str(text) and "\n" in str(text) for text in row.values())
            yield json.dumps(list(row.values()) if None in row or swallowed else row)
    except csv.Error as error:
        raise ValueError(
            f"line {rows.reader.line_num}: a quote inside a field, or one that is not closed: put such a field in "
            "quotes, and double those in it"
        ) from error
