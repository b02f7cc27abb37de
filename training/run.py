"""`tinyalign train`: a stage from a YAML file."""

import os

import yaml
from accelerate import PartialState
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from trl import TrlParser

from ..modeling_tinyalign import MemoryBank, TinyAlignForConditionalGeneration
from ..processing import TinyAlignProcessor
from .arguments import RunArguments
from .rows import read_rows, with_features_and_neighbours
from .stage1 import Stage1Config, train_stage1
from .stage2 import Stage2Config, train_stage2

STAGES = {1: (Stage1Config, train_stage1), 2: (Stage2Config, train_stage2)}


def train_from_file(path: str | os.PathLike, fields: list[str]):
    """
    Trains what the YAML file at `path` says, with `fields` (`["--learning_rate", "5e-4"]`) put before it, and saves
    model and processor to `output_dir`.

    Raises `ValueError` or `OSError` that says what is wrong with the file, the data, the model or the bank.
    """
    config = read_config(path, fields)
    set_seed(config.seed)
    bank = read_bank(config)
    model, processor = load_model(config, bank)
    model.to(config.device)
    bank = attach_bank(config, model, processor, bank)
    with PartialState().main_process_first():
        rows, features = with_features_and_neighbours(config, model, processor, read_rows(config), bank)
    train = STAGES[config.stage][1]
    trainer = train(config, model, processor, rows, bank, features)
    if trainer.is_world_process_zero():
        model.save_pretrained(config.output_dir)
        processor.save_pretrained(config.output_dir)


def read_config(path: str | os.PathLike, fields: list[str]) -> RunArguments:
    """The file's settings as `Stage1Config` or `Stage2Config`, whichever its `stage` asks for."""
    with open(path, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    stage = settings.get("stage") if isinstance(settings, dict) else None
    if stage not in STAGES:
        raise ValueError(f"{path} has stage: {stage}, expected `stage: 1` (connectors) or `stage: 2` (and the LM).")
    parser = TrlParser(STAGES[stage][0], prog=f"tinyalign train {path}", allow_abbrev=False)
    (config,) = parser.parse_args_and_config(["--config", str(path), *fields])
    if config.output_dir is None or config.output_dir == "trainer_output":
        raise ValueError(f"{path} has no output_dir: say where checkpoints and the trained model go.")
    return config


def read_bank(config: RunArguments) -> MemoryBank | None:
    """The bank that a config names, or None if it names none or is of the baseline."""
    if config.memory_bank is None or (config.model_kwargs or {}).get("memory_top_k") == 0:
        return None
    return MemoryBank.from_pretrained(config.memory_bank)


def load_model(config: RunArguments, bank: MemoryBank | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a config and its processor, loaded or composed; a composed one reads the words of this bank."""
    if config.model is not None:
        model = TinyAlignForConditionalGeneration.from_pretrained(config.model, **(config.model_kwargs or {}))
        return model, TinyAlignProcessor.from_pretrained(config.model)
    if config.vision_model is None or config.language_model is None:
        raise ValueError(
            "No model: set `model` (a TinyAlign checkpoint), or `vision_model` and `language_model` to compose one."
        )
    fields = {} if bank is None else {"latents_per_word": bank.config["value_encoder"]["latents_per_word"]}
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        config.vision_model, config.language_model, **{**fields, **(config.model_kwargs or {})}
    )
    processor = TinyAlignProcessor.from_vision_text_pretrained(
        config.vision_model, config.language_model, model.config
    )
    return model, processor


def attach_bank(
    config: RunArguments, model: PreTrainedModel, processor: ProcessorMixin, bank: MemoryBank | None
) -> MemoryBank | None:
    """The bank, attached to the model and in its lexicon if the model is new, or None for a model without memory."""
    if model.config.memory_top_k == 0:
        return None
    if bank is None:
        raise ValueError(
            f"The model retrieves {model.config.memory_top_k} neighbours an image, but there is no bank: set "
            "`memory_bank`, or `model_kwargs: {memory_top_k: 0}` for the baseline."
        )
    model.attach_memory_bank(bank)
    if config.lexicon and config.model is None and model.config.memory_lexicon_size == 0:
        model.build_lexicon(processor.tokenizer, bank)
    return bank
