"""Facts as Markdown that shows them as plain text: none becomes a heading, a named link, a table cell or HTML."""

import json
import re
from collections.abc import Iterable
from typing import Any


def text(value: object) -> str:
    """Return `value` on one line, with the characters that mean something in Markdown escaped."""
    line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(value))
    line = re.sub(r"[\\`*\[\]<>|~]|^#", r"\\\g<0>", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # not within_words


def escaped(value: Any) -> Any:
    """Return a fact, or all facts in a list or dictionary, with their texts escaped."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, dict):
        return {text(name): escaped(item) for name, item in value.items()}
    return value


def block(value: str, language: str) -> str:
    """Return `value` as a code block."""
    lines = value.strip("\n")
    longest_run = max(map(len, re.findall("`+", lines)), default=0)
    ticks = "`" * max(3, longest_run + 1)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def literal(value: str) -> str:
    """Return `value` as a string in Python code."""
    return json.dumps(value, ensure_ascii=False)


def table(headings: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headings), *lines[1:]])
