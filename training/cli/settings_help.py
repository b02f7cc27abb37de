"""`tinyalign train FILE.yaml --help`: this package's settings first, what is inherited when it is asked for."""

import argparse
import dataclasses
import inspect
from functools import partial
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

WIDTH, NAME_WIDTH = 119, 34
# Titles by the class that has the settings; those of a stage's own class are settings of the run.
TITLES = {
    "ModelArguments": "the model and its memory",
    "DataArguments": "the data (docs/training.md)",
    "StageArguments": "the run",
    "TuningArguments": "what trains (docs/training.md)",
}
# Inherited ones that nearly every run sets.
COMMON = ("output_dir", "max_steps", "per_device_train_batch_size", "seed")
# The package needs these as they are.
FIXED = ("remove_unused_columns", "prediction_loss_only", "dataset_kwargs", "gradient_checkpointing")
NAMES_OF_KINDS = {bool: "true|false", int: "N", float: "NUMBER", str: "TEXT", dict: "JSON"}


def settings_help(config_class: type, files: list[str], everything: bool) -> str:
    """Return the help of a stage's settings; with `everything` also of those that are transformers' and TRL's."""
    command = f"tinyalign train {' '.join(files)}"
    parser = argparse.ArgumentParser(
        usage=f"{command} [--FIELD VALUE ...]",
        epilog=None if everything else f"transformers' and TRL's settings, with these: {command} --help all",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=NAME_WIDTH, width=WIDTH),
        add_help=False,
    )
    kinds = get_type_hints(config_class)
    for title, fields in groups_of_settings(config_class, everything).items():
        group = parser.add_argument_group(title)
        for field in fields:
            group.add_argument(f"--{field.name}", metavar=value_name(field, kinds[field.name]), help=field_help(field))
    return parser.format_help()


def groups_of_settings(config_class: type, everything: bool) -> dict[str, list[dataclasses.Field]]:
    """Return fields by the title of their group: this package's, and then the inherited ones if all are asked for."""
    from tinyalign_vlm.training.arguments.refused import ALLOWED

    hidden = {*FIXED, *(name for name, (values, _) in ALLOWED.items() if len(values) == 1)}
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.name not in hidden}
    groups = {title: [] for title in TITLES.values()}
    groups[TITLES["StageArguments"]] += [fields.pop(name) for name in COMMON]
    classes = [base for base in reversed(config_class.__mro__) if dataclasses.is_dataclass(base)]
    # stable: this package's classes first, whose defaults and help are the ones that count
    for base in sorted(classes, key=lambda base: not base.__module__.startswith("tinyalign_vlm.")):
        title = TITLES.get(base.__name__, TITLES["StageArguments"])
        if not base.__module__.startswith("tinyalign_vlm."):
            title = f"{base.__name__} of {base.__module__.partition('.')[0]}"
        group = groups.setdefault(title, [])
        group += [fields.pop(name) for name in inspect.get_annotations(base) if name in fields]
    return {title: group for title, group in groups.items() if everything or title in TITLES.values()}


def value_name(field: dataclasses.Field, kind: Any) -> str:
    """Return how help writes the value of a field."""
    if field.metadata.get("choices"):
        return "|".join(map(str, field.metadata["choices"]))
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((NAMES_OF_KINDS[kind] for kind in kinds if kind in NAMES_OF_KINDS), "VALUE")


def field_help(field: dataclasses.Field) -> str:
    """Return what a field is for, and its default."""
    text = str(field.metadata.get("help", "")).strip()
    if field.default in (None, "", dataclasses.MISSING) or "default" in text:
        return text
    default = str(field.default).replace("%", "%%")
    if isinstance(field.default, bool):
        default = default.lower()
    return f"{text.rstrip('.')} (default: {default})."
