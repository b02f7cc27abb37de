"""`tinyalign train`: a stage from YAML files."""

import copy
import dataclasses
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import datasets
import numpy as np
import torch
import yaml
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed
from transformers.utils import logging
from trl import TrlParser

from ..modeling_tinyalign import MemoryBank, TinyAlignConfig, TinyAlignForConditionalGeneration
from ..modeling_tinyalign.bank_storage import cache_root
from ..modeling_tinyalign.composition import check_origins
from ..processing import TinyAlignProcessor
from .arguments import RunArguments
from .baselines import model_fields, neighbours_of_baseline, widen_connector, with_static_captions
from .calibration import calibrate_rows, write_threshold
from .data_check import DataCheck, check_rows, training_data
from .disk import keeping
from .rows import with_features, with_neighbours
from .stage1 import Stage1Config, train_stage1
from .stage2 import Stage2Config, train_stage2
from .training_card import write_training_card

logger = logging.get_logger(__name__)
SHUFFLE_BUFFER = 1000  # streamed rows to draw from, images and all
CONFIGS = Path(__file__).parent / "configs"
STAGES = {1: (Stage1Config, train_stage1), 2: (Stage2Config, train_stage2)}


def train_from_files(paths: Sequence[str | os.PathLike], fields: list[str]):
    """
    Trains what the YAML files at `paths` say (later ones win), with `fields` (`["--learning_rate", "5e-4"]`) put
    before them, and saves model and processor to `output_dir`.

    Raises `ValueError` or `OSError` that says what is wrong with the files, the data, the model or the bank.
    """
    config = read_config(paths, fields)
    with keeping(config.output_dir, "the checkpoints so far"):
        run = prepare(config)
        bank = run.bank
        if config.baseline == "static_rag":
            run.rows = with_static_captions(config, run.processor, run.rows, bank)
            if run.eval_rows is not None:
                run.eval_rows = with_static_captions(config, run.processor, run.eval_rows, bank)
            bank = None
        train = STAGES[config.stage][1]
        trainer = train(config, run.model, run.processor, run.rows, bank, run.features, run.eval_rows)
        save(trainer, run.model, run.processor)
        if trainer.is_world_process_zero():
            command = shlex.join(["tinyalign", "train", *map(str, paths), *fields])
            write_training_card(config, run.model, trainer, bank, command)


@dataclass
class Run:
    """What a stage trains, and on what."""

    model: PreTrainedModel
    processor: ProcessorMixin
    bank: MemoryBank | None
    rows: datasets.Dataset | datasets.IterableDataset
    features: np.ndarray | None
    eval_rows: datasets.Dataset | None = None


def prepare(config: RunArguments) -> Run:
    """Model, bank and rows of a run, with their features and neighbours, which are computed where they are missing."""
    set_seed(config.seed)
    bank = read_bank(config)
    model, processor = load_model(config, bank)
    if config.save_only is not None:
        check_origins(model.config)
    model.to(config.device)
    bank = attach_bank(config, model, processor, bank)
    if config.max_length is None:
        config.max_length = context_length(model)
    with PartialState().main_process_first():
        rows = training_data(config, processor, name_images=bank is not None)
        if config.streaming and config.train_sampling_strategy == "random":
            seed = config.seed if config.data_seed is None else config.data_seed
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        of_evaluation = None if config.eval_dataset is None else evaluation_config(config)
        eval_rows = None if of_evaluation is None else training_data(of_evaluation, processor)
    rows, features = with_features(config, model, processor, rows)
    if bank is not None:
        top_k = model.config.num_neighbours or neighbours_of_baseline(config)
        rows = with_neighbours(config, model, processor, rows, bank, top_k, features)
        if eval_rows is not None:
            eval_rows = with_neighbours(of_evaluation, model, processor, eval_rows, bank, top_k)
    return Run(model, processor, bank, rows, features, eval_rows)


def evaluation_config(config: RunArguments) -> RunArguments:
    """The settings of a run, for reading its evaluation rows: these are neither streamed nor cached."""
    changed = copy.copy(config)
    changed.dataset, changed.dataset_split, changed.streaming = config.eval_dataset, config.eval_split, False
    changed.output_dir = os.path.join(config.output_dir, "evaluation")
    return changed


def find_neighbours_from_files(paths: Sequence[str | os.PathLike], fields: list[str]):
    """Looks up the neighbours that `tinyalign train` with the same arguments needs, and nothing else."""
    config = read_config(paths, [*fields, "--cache_features", "False"])
    if config.streaming:
        raise ValueError("streaming is true: neighbours of streamed rows are looked up in every step.")
    with keeping(cache_root(), "what was computed"):
        bank = prepare(config).bank
    if bank is None:
        raise ValueError("The model has no memory (memory_top_k: 0): there is nothing to look up.")


def calibrate_from_files(paths: Sequence[str | os.PathLike], fields: list[str], target: float | None = None):
    """
    Prints how much neighbours agree with the answers of the rows, and sets the `retrieval_threshold` of the config's
    `model`, if that is a folder.
    """
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"min_agreement is {target}, expected a share, 0 (no word shared) to 1 (the same words).")
    config = read_config(paths, [*fields, "--cache_features", "False"])
    with keeping(cache_root(), "what was computed"):
        run = prepare(config)
    if run.model.config.num_neighbours == 0 or config.streaming:
        raise ValueError(
            f"memory_top_k is {run.model.config.memory_top_k} and streaming {config.streaming}: to calibrate takes a "
            "bank, and rows that are not streamed."
        )
    found = calibrate_rows(run.rows, run.bank, run.model.config.num_neighbours, target)
    print(found)
    if config.model is not None and Path(config.model).is_dir():
        write_threshold(Path(config.model), found.threshold)
        print(f"Written to {Path(config.model, 'config.json')}.")
    else:
        print(f"Set it with --model_kwargs '{{\"retrieval_threshold\": {found.threshold:.4f}}}'.")


def save(trainer: Trainer, model: PreTrainedModel, processor: ProcessorMixin):
    """Model and processor to `output_dir`; all processes call it, because each may hold a part of the weights."""
    state_dict = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state_dict = dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
        if model.config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)
        generation_config = model.generation_config
        with torch.device("meta"):  # FSDP changes the class of the model, and with it the code that is saved
            model = TinyAlignForConditionalGeneration(model.config)
        model.generation_config = generation_config
    if trainer.is_world_process_zero():
        alone = trainer.args.save_only == "connectors"
        model.save_pretrained(trainer.args.output_dir, connectors_only=alone, state_dict=state_dict)
        processor.save_pretrained(trainer.args.output_dir)


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
    if stage not in STAGES:
        raise ValueError(
            f"{named} has stage: {stage}, expected `stage: 1` (connectors) or `stage: 2` (and the language model). "
            "A recipe of a model needs that of a stage before it: tinyalign train stage1.yaml qwen2-0.5b-siglip.yaml"
        )
    config = _parse(STAGES[stage][0], settings, fields, shlex.join(["tinyalign", "train", *map(str, paths)]))
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


def _parse(config_class: type[RunArguments], settings: dict, fields: list[str], prog: str) -> RunArguments:
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


def check_data(names: Sequence[str], fields: list[str]) -> DataCheck:
    """
    What is wrong with a data set, named itself or by YAML files. The length of rows is checked if there is a model.
    A data set that would be streamed is read as others are.

    Raises `ValueError` or `OSError` when the files, the model or the data cannot be read.
    """
    if all(Path(name).suffix in (".yaml", ".yml") for name in names):
        config = read_config(names, fields)
    elif len(names) == 1:
        config = _parse(Stage1Config, {"dataset": names[0]}, fields, "tinyalign data check")
    else:
        raise ValueError(f"Found {', '.join(names)}, expected one data set, or YAML files.")
    config.streaming, processor = False, None
    if config.model is not None or config.language_model is not None:
        model, processor = load_model(config, read_bank(config))
        config.max_length = config.max_length or context_length(model)
    elif config.max_length is not None:
        raise ValueError(
            f"max_length is {config.max_length}, but no model says what a token is: add --model, or "
            "--vision_model and --language_model."
        )
    with keeping(cache_root(), "what was read"):
        return check_rows(config, processor)[1]


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the language model was made for; None if its config does not say."""
    return model.config.text_config.to_dict().get("max_position_embeddings")


def read_bank(config: RunArguments) -> MemoryBank | None:
    """The bank that a config names, or None if it names none or is of the baseline."""
    if not config.memory_bank or (config.model_kwargs or {}).get("memory_top_k") == 0:
        return None
    bank = MemoryBank.from_pretrained(config.memory_bank)
    return bank.for_any_tower() if config.any_tower else bank


def load_model(config: RunArguments, bank: MemoryBank | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a config and its processor, loaded or composed; a composed one reads the words of this bank."""
    if config.model is not None:
        model = _load_trained(config)
        padding = {"image_aspect_ratio": "pad"} if config.image_aspect_ratio == "pad" else {}
        processor = TinyAlignProcessor.from_pretrained(
            config.model, num_image_tokens=model.config.num_image_tokens, key_space=model.config.key_space, **padding
        )  # model_kwargs or a baseline may have changed them
        if config.image_aspect_ratio not in (None, processor.image_aspect_ratio):
            raise ValueError(
                f"image_aspect_ratio is {config.image_aspect_ratio!r}, but {config.model} was trained with "
                f"{processor.image_aspect_ratio!r}: leave it out."
            )
        return model, processor
    if config.vision_model is None or config.language_model is None:
        raise ValueError(
            "No model: set `model` (a TinyAlign checkpoint), or `vision_model` and `language_model` to compose one."
        )
    fields = {} if bank is None else {"latents_per_word": bank.config["value_encoder"]["latents_per_word"]}
    try:
        model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
            config.vision_model, config.language_model, **{**fields, **model_fields(config)}
        )
    except OSError as error:  # which may not say of which of them
        raise OSError(
            f"vision_model {config.vision_model} and language_model {config.language_model}, expected folders or Hub "
            f"repositories: {error}"
        ) from error
    if config.baseline == "wider_connector":
        widen_connector(model)
    processor = TinyAlignProcessor.from_vision_text_pretrained(
        config.vision_model,
        config.language_model,
        model.config,
        image_aspect_ratio=config.image_aspect_ratio or "square",
    )
    return model, processor


def _load_trained(config: RunArguments) -> PreTrainedModel:
    fields = model_fields(config)
    try:
        model = TinyAlignForConditionalGeneration.from_pretrained(config.model, **fields)
    except OSError as error:
        raise OSError(f"model {config.model}, expected a folder or a Hub repository: {error}") from error
    except RuntimeError as error:  # transformers has printed which weights
        raise ValueError(
            f"The weights of {config.model} are not of the shapes that its config with {fields} asks for: fields that "
            "change them are for a newly composed model. Leave them out, or train stage 1 with them."
        ) from error
    if fields.get("memory_top_k") and TinyAlignConfig.from_pretrained(config.model).memory_top_k == 0:
        raise ValueError(
            f"memory_top_k is {fields['memory_top_k']}, but {config.model} was trained without memory: set it to 0, "
            "name the baseline that it is of (--baseline), or train stage 1 with memory."
        )
    if config.baseline == "wider_connector" and model.config.connector_size is None:
        raise ValueError(
            f"baseline is wider_connector, but the connector of {config.model} is not wider: train stage 1 with "
            "--baseline wider_connector, and go on from that."
        )
    return model


def attach_bank(
    config: RunArguments, model: PreTrainedModel, processor: ProcessorMixin, bank: MemoryBank | None
) -> MemoryBank | None:
    """The bank, attached to the model and in its lexicon if the model is new, or None for a model without memory."""
    neighbours = neighbours_of_baseline(config) if config.baseline == "static_rag" else model.config.num_neighbours
    if neighbours == 0:
        return None
    if bank is None:
        raise ValueError(
            f"The model retrieves {neighbours} neighbours an image, but there is no bank: set "
            "`memory_bank`, or `model_kwargs: {memory_top_k: 0}` for the baseline."
        )
    model.attach_memory_bank(bank)
    padded = bank.config["preprocessing"].get("do_pad"), processor.image_processor.to_dict().get("do_pad")
    if bool(padded[0]) != bool(padded[1]):
        logger.warning(
            f"Images are {'padded to a square' if padded[1] else 'not padded'}, but those of the bank were "
            f"{'padded' if padded[0] else 'not'}: neighbours of images that are not square will be worse. Use the "
            "image_aspect_ratio of the bank, or build it with this processor."
        )
    new = config.model is None and model.config.memory_top_k > 0
    if config.lexicon and new and model.config.memory_lexicon_size == 0:
        model.build_lexicon(processor.tokenizer, bank)
    return bank
