"""Card templates, into which facts go as text: none of them can become a heading, a link, a table cell or HTML."""

import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def text(value: object) -> str:
    """`value` on one line, with the characters that mean something in Markdown escaped."""
    if isinstance(value, Markup):
        return value
    line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(value))
    line = re.sub(r"[\\`*\[\]<>|~]", r"\\\g<0>", line)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)  # not within_words


def code(value: object) -> Markup:
    """`value` as inline code, also in a table."""
    line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(value)).replace("|", "\\|")
    ticks = "`" * (_longest_run(line) + 1)
    return Markup(f"{ticks} {line} {ticks}" if len(ticks) > 1 else f"`{line}`")


def block(value: object, language: str) -> Markup:
    """`value` as a code block."""
    lines = str(value).strip("\n")
    ticks = "`" * max(3, _longest_run(lines) + 1)
    return Markup(f"{ticks}{language}\n{lines}\n{ticks}")


def literal(value: str) -> Markup:
    """`value` as a string in Python code."""
    return Markup(json.dumps(value, ensure_ascii=False))


def _longest_run(line: str) -> int:
    return max(map(len, re.findall("`+", line)), default=0)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    finalize=text,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)
TEMPLATES.filters.update(code=code, block=block, literal=literal)
