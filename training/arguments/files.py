"""The settings of a run, from YAML files and the command line."""

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ...modeling_tinyalign import TinyAlignConfig
from .alignment import Stage1Config
from .instruction import Stage2Config
from .run_arguments import RunArguments

CONFIGS = Path(__file__).parents[1] / "configs"
STAGE_CONFIGS = {1: Stage1Config, 2: Stage2Config}


def read_settings(paths: Sequence[str | os.PathLike]) -> dict:
    """
    What the YAML files say together: later ones win, and `model_kwargs` of several are joined. A file that is not
    here is looked for in training/configs/.
    """
    settings = {}
    for name in paths:
        path = Path(name) if Path(name).exists() else CONFIGS / name
        if not path.is_file():
            shipped = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
            raise ValueError(f"There is no file {name}, expected a YAML file here or one of {shipped}.")
        new = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(new, dict):
            raise ValueError(f"{path} has {str(new)[:100]!r}, expected `name: value` lines.")
        kwargs = new.pop("model_kwargs", None) or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f"{path} has model_kwargs: {kwargs!r}, expected {{name: value, ...}}.")
        settings |= new | {"model_kwargs": {**settings.get("model_kwargs", {}), **kwargs}}
    return settings


def read_config(paths: Sequence[str | os.PathLike], fields: list[str]) -> RunArguments:
    """The settings as `Stage1Config` or `Stage2Config`, whichever `stage` asks for."""
    settings = read_settings(paths)
    named = " + ".join(map(str, paths))
    stage = settings.get("stage")
    if stage not in STAGE_CONFIGS:
        raise ValueError(
            f"{named} has stage: {stage}, expected `stage: 1` (connectors) or `stage: 2` (and the language model). "
            "A recipe of a model needs that of a stage before it: tinyalign train stage1.yaml qwen2-0.5b-siglip.yaml"
        )
    config = parse_settings(
        STAGE_CONFIGS[stage], settings, fields, shlex.join(["tinyalign", "train", *map(str, paths)])
    )
    if config.stage != stage:
        raise ValueError(f"{named} is of stage {stage}, found --stage {config.stage}: name the file of that stage.")
    config.model_kwargs = {**settings["model_kwargs"], **(config.model_kwargs or {})}
    trained = config.baseline == "wider_connector" and config.model is not None
    if config.baseline is not None and config.model_kwargs.get("memory_top_k") == 0 and not trained:
        raise ValueError(
            f"baseline is {config.baseline} and memory_top_k 0: it takes as many neighbours, or parameters, as the "
            "TinyAlign that it is compared with has. Leave baseline or memory_top_k out."
        )
    if config.output_dir in (None, "", "trainer_output"):
        raise ValueError(f"{named} has no output_dir: say where checkpoints and the trained model go.")
    return config


def parse_settings(config_class: type[RunArguments], settings: dict, fields: list[str], prog: str) -> RunArguments:
    parser = TrlParser(config_class, prog=prog, usage=f"{prog} [--FIELD VALUE ...]", allow_abbrev=False)
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder, "merged.yaml")
        merged.write_text(yaml.safe_dump(_as_text(config_class, settings)), encoding="utf-8")
        arguments = ["--config", str(merged), *fields]
        config, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        close = " or ".join(get_close_matches(name, vars(config)))
        hint = f", did you mean {close}?" if close else "."
        if name in ("top_k", *(field.name for field in dataclasses.fields(TinyAlignConfig))):
            hint = f", but a field of the model's config: --model_kwargs '{{\"{name}\": ...}}' sets it."
        raise ValueError(f"{name} is no setting of {config_class.__name__}{hint} `{prog} --help` lists them.")
    return config


def _as_text(config_class: type[RunArguments], settings: dict) -> dict:
    """
    The settings with numbers as text, so that the parser, which takes other values of a file as they are, converts
    them and refuses `max_steps: 2.5`, as it does on the command line; YAML takes `no` for false. Raises `ValueError`
    for what the parser would overlook: lists and nothing (`null`) where there is a value, and values that are not
    among `choices`.
    """
    kinds, text = get_type_hints(config_class), dict(settings)
    for field in dataclasses.fields(config_class):
        if field.name not in settings:
            continue
        value, kind, choices = settings[field.name], kinds[field.name], field.metadata.get("choices")
        allowed = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        allowed = {get_origin(kind) or kind for kind in allowed}
        if isinstance(value, (list, dict, NoneType)) and type(value) not in allowed:
            names = " or ".join(sorted(kind.__name__ for kind in allowed - {NoneType}))
            raise ValueError(f"{field.name} is {'null' if value is None else value}, expected {names}.")
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"{field.name} is {value!r}, expected one of {', '.join(choices)}.")
        if isinstance(value, (int, float)):
            text[field.name] = "no" if value is False and bool not in allowed else str(value)
    return text
