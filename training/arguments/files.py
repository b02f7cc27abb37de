"""The settings of a run, from YAML files and the command line."""

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ...modeling_tinyalign import TinyAlignConfig
from .alignment import AlignmentConfig
from .instruction import InstructionConfig
from .stage import StageArguments

CONFIGS = Path(__file__).parents[1] / "configs"
NO_OUTPUT_DIR = (None, "", "trainer_output")
STAGE_CONFIGS = {1: AlignmentConfig, 2: InstructionConfig}


def read_settings(paths: Sequence[str | os.PathLike]) -> dict:
    """Return what the YAML files say together: later ones win, and `model_kwargs` of several are joined. A file that
    is not here is looked for in training/configs/.
    """
    settings = {}
    for name in paths:
        path = Path(name) if Path(name).exists() else CONFIGS / name
        if not path.is_file():
            shipped = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
            raise ValueError(f"There is no file {name}, expected a YAML file here or one of {shipped}.")
        try:
            new = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML in UTF-8 ({error}): repair it, or save it as UTF-8.") from error
        if not isinstance(new, dict):
            raise ValueError(f"{path} has {str(new)[:100]!r}, expected `name: value` lines.")
        kwargs = new.pop("model_kwargs", None) or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f"{path} has model_kwargs: {kwargs!r}, expected {{name: value, ...}}.")
        settings |= new | {"model_kwargs": {**settings.get("model_kwargs", {}), **kwargs}}
    return settings


def read_config(paths: Sequence[str | os.PathLike], fields: list[str]) -> StageArguments:
    """Return the settings of YAML files and `fields` (`["--learning_rate", "5e-4"]`), which win over them, as
    `AlignmentConfig` or `InstructionConfig`, whichever `stage` in the files asks for.
    """
    settings = read_settings(paths)
    named = " + ".join(map(str, paths))
    config_class = config_class_of(settings, named)
    prog = shlex.join(["tinyalign", "train", *map(str, paths)])
    config = parse_settings(config_class, settings, fields, prog)
    stage = settings["stage"]
    if config.stage != stage:
        raise ValueError(f"{named} is of stage {stage}, found --stage {config.stage}: name the file of that stage.")
    config.model_kwargs = {**settings["model_kwargs"], **(config.model_kwargs or {})}
    trained = config.baseline == "wider_connector" and config.model is not None
    if config.baseline is not None and config.model_kwargs.get("memory_top_k") == 0 and not trained:
        raise ValueError(
            f"baseline is {config.baseline} and memory_top_k 0: it takes as many neighbours, or parameters, as the "
            "TinyAlign that it is compared with has. Leave baseline or memory_top_k out."
        )
    if config.output_dir in NO_OUTPUT_DIR:
        raise ValueError(f"{named} has no output_dir: say where checkpoints and the trained model go.")
    return config


def config_class_of(settings: dict, named: str) -> type[StageArguments]:
    """Return the class of the stage that files ask for; `named` is what an error calls them."""
    stage = settings.get("stage")
    if stage not in list(STAGE_CONFIGS):
        raise ValueError(
            f"{named} has stage: {stage!r}, expected `stage: 1` (connectors) or `stage: 2` (and the language model). "
            "A recipe of a model needs that of a stage before it: tinyalign train stage1.yaml qwen2-0.5b-siglip.yaml"
        )
    return STAGE_CONFIGS[stage]


def parse_settings(config_class: type[StageArguments], settings: dict, fields: list[str], prog: str) -> StageArguments:
    """Return `config_class` with these settings and, over them, the `fields` of a command line.

    Raises `ValueError` for a setting that there is not, and a list or nothing where there is one value; exits as
    argparse does for values of the wrong type.
    """
    parser = HfArgumentParser(config_class, prog=prog, usage=f"{prog} [--FIELD VALUE ...]", allow_abbrev=False)
    known = config_class.__dataclass_fields__
    parser.set_defaults(**{name: None for name, value in settings.items() if value is None and name in known})
    arguments = [*as_arguments(config_class, settings), *fields]
    config, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(_unknown_setting(unknown[0].lstrip("-").partition("=")[0], config_class, prog))
    return config


def _unknown_setting(name: str, config_class: type[StageArguments], prog: str) -> str:
    names = [field.name for field in dataclasses.fields(config_class)]
    close = get_close_matches(name, names)
    hint = "."
    if name in ("top_k", *(field.name for field in dataclasses.fields(TinyAlignConfig))):
        hint = f", but a field of the model's config: --model_kwargs '{{\"{name}\": ...}}' sets it."
    elif close:
        hint = f", did you mean {' or '.join(close)}?"
    return f"{name} is no setting of {config_class.__name__}{hint} `{prog} --help` lists them."


def as_arguments(config_class: type[StageArguments], settings: dict) -> list[str]:
    """Return the settings of a file as a user would type them: `["--max_steps=3", ...]`. `null` has no argument.

    Raises `ValueError` for a list, a dictionary or `null` where there is another kind of value.
    """
    kinds = get_type_hints(config_class)
    arguments = []
    for name, value in settings.items():
        allowed = _types_of(kinds[name]) if name in kinds else {type(value)}
        if isinstance(value, (list, dict, NoneType)) and type(value) not in allowed:
            names = " or ".join(sorted(kind.__name__ for kind in allowed - {NoneType}))
            raise ValueError(f"{name} is {'null' if value is None else value}, expected {names}.")
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif value is False and bool not in allowed:  # YAML takes `no` for false
            arguments.append(f"--{name}=no")
        elif value is not None or name not in kinds:
            arguments.append(f"--{name}={value}")
    return arguments


def _types_of(kind: type) -> set[type]:
    """Return the classes of the values that a field may have: `{list, NoneType}` for `list[str] | None`."""
    alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return {get_origin(alternative) or alternative for alternative in alternatives}
