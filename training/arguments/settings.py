"""Fields of settings: a default, and the help of `tinyalign train FILE.yaml --help`."""

from dataclasses import field
from typing import Any


def setting(default: Any, text: str, choices: list[str] | None = None) -> Any:
    """Return a dataclass field with its help, and the values that it may have where these are few."""
    metadata = {"help": text}
    if choices is not None:
        metadata["choices"] = choices
    return field(default=default, metadata=metadata)
