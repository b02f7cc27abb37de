"""`tinyalign train FILE.yaml --help`: this package's settings first, what is inherited when it is asked for."""

import argparse
import dataclasses
import inspect
from functools import partial
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

WIDTH, NAME_WIDTH = 119, 34
NAMES_OF_KINDS = {bool: "true|false", int: "N", float: "NUMBER", str: "TEXT", dict: "JSON"}


def settings_help(config_class: type, files: list[str], everything: bool) -> str:
    """
    Return the help of a stage's settings.

    Args:
        config_class: The dataclass of the stage.
        files: The YAML files of the command line.
        everything: Also the settings of transformers and TRL that are left as they are.
    """
    command = f"tinyalign train {' '.join(files)}"
    parser = argparse.ArgumentParser(
        usage=f"{command} [--FIELD VALUE ...]",
        epilog=None if everything else f"transformers' and TRL's settings, with these: {command} --help all",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=NAME_WIDTH, width=WIDTH),
        add_help=False,
    )
    kinds = get_type_hints(config_class)
    for title, fields in groups_of_settings(config_class, everything):
        group = parser.add_argument_group(title)
        for field in fields:
            group.add_argument(f"--{field.name}", metavar=value_name(field, kinds[field.name]), help=field_help(field))
    return parser.format_help()


def groups_of_settings(config_class: type, everything: bool) -> list[tuple[str, list[dataclasses.Field]]]:
    """Return titles and fields. A field belongs to the first class that has it, of this package if there is one."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    classes = [base for base in reversed(config_class.__mro__) if dataclasses.is_dataclass(base)]
    own = [base for base in classes if is_own(base)]
    rest = [base for base in classes if not is_own(base)]
    groups = []
    for base in [*own, *rest] if everything else own:
        names = [name for name in inspect.get_annotations(base) if name in fields]
        if names:
            groups.append((title_of(base), [fields.pop(name) for name in names]))
    return groups


def is_own(base: type) -> bool:
    """Return whether a class is this package's."""
    return base.__module__.startswith("tinyalign_vlm.")


def title_of(base: type) -> str:
    """Return the first line of the class's description."""
    if is_own(base):
        return base.__doc__.strip().splitlines()[0].rstrip(".:")
    return f"{base.__name__} of {base.__module__.partition('.')[0]}"


def value_name(field: dataclasses.Field, kind: Any) -> str:
    """Return how help writes the value of a field."""
    if field.metadata.get("choices"):
        return "|".join(map(str, field.metadata["choices"]))
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    named = [NAMES_OF_KINDS[kind] for kind in kinds if kind in NAMES_OF_KINDS]
    return named[0] if named else "VALUE"


def field_help(field: dataclasses.Field) -> str:
    """Return what a field is for, and its default."""
    text = str(field.metadata.get("help", "")).strip()
    if field.default in (None, "", dataclasses.MISSING) or "default" in text:
        return text
    return f"{text.rstrip('.')} (default: {str(field.default).replace('%', '%%')})."
