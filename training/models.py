"""The model, processor and memory bank that the settings of a run ask for: loaded, or composed."""

from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..modeling_tinyalign import MemoryBank, TinyAlignConfig, TinyAlignForConditionalGeneration
from ..modeling_tinyalign.connectors import Connector
from ..processing import TinyAlignProcessor
from .arguments.names import check_name
from .arguments.stage import StageArguments

logger = logging.get_logger(__name__)


def load_model(config: StageArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a config and its processor, loaded or composed."""
    for name in ("vision_model", "language_model") if config.model is None else ("model",):
        if vars(config)[name] is not None:
            check_name(name, vars(config)[name])
    if config.model is not None:
        model = _load_checkpoint(config)
        padding = {"image_aspect_ratio": "pad"} if config.image_aspect_ratio == "pad" else {}
        processor = TinyAlignProcessor.from_pretrained(config.model, **padding)
        # model_kwargs or a baseline may have changed them
        processor.num_image_tokens = model.config.num_image_tokens
        processor.key_space = model.config.key_space
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
    try:
        model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
            config.vision_model, config.language_model, **model_fields(config)
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


def _load_checkpoint(config: StageArguments) -> PreTrainedModel:
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


def load_to_answer(
    name: str,
    revision: str = "main",
    memory_bank: str | None = None,
    memory: str = "on",
    device: str = "auto",
    writes_captions: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a model with its bank, and its processor, by this package's classes: no code of the checkpoint is run.

    Args:
        memory_bank: a folder or repository. None: the bank that the config names; ValueError if it names none.
        memory: `"off"`: no bank is needed.
        writes_captions: whoever asks writes the captions of neighbours into prompts, for a model trained so;
            ValueError for one if nobody does.
    """
    model = TinyAlignForConditionalGeneration.from_pretrained(name, revision=revision, dtype="auto", device_map=device)
    processor = TinyAlignProcessor.from_pretrained(name, revision=revision)
    if memory == "on" and model.config.prompt_captions and not writes_captions:
        raise ValueError(
            f"{name} reads captions in its prompt (prompt_captions is {model.config.prompt_captions}), which only "
            "`tinyalign evaluate` writes: pass --memory off to answer without."
        )
    if memory == "on" and model.config.num_neighbours > 0:
        if memory_bank is not None:
            model.attach_memory_bank(memory_bank, tokenizer=processor.tokenizer)
        if model.memory_bank is None:
            raise ValueError(
                f"{name} retrieves {model.config.num_neighbours} neighbours an image, but its config names no memory "
                "bank: pass --memory_bank FOLDER_OR_REPOSITORY, or --memory off to answer without."
            )
    return model, processor


def model_fields(config: StageArguments) -> dict:
    """The fields of [`TinyAlignConfig`] to set in a run's model: `model_kwargs`, and what its baseline changes."""
    fields = dict(config.model_kwargs or {})
    if config.baseline == "text_rag":
        fields["prompt_captions"] = neighbours_of_baseline(config)
    if config.baseline in ("static_rag", "text_rag") or (config.baseline and config.model):
        fields["memory_top_k"] = 0
    return fields


def neighbours_of_baseline(config: StageArguments) -> int:
    """Neighbours whose captions are written into a question: as many as TinyAlign would read."""
    return (config.model_kwargs or {}).get("memory_top_k") or TinyAlignConfig().memory_top_k


def widen_connector(model: PreTrainedModel):
    """Put one connector in the place of connector and memory connector, wider, with as many parameters as both (to
    within those of one hidden unit): does the memory help, or do the parameters (paper, Table 2, row 2)?
    """
    base, config = model.base_model, model.config
    hidden_size = config.text_config.hidden_size
    added = sum(parameter.numel() for parameter in base.memory_connector.parameters())
    of_a_unit = config.vision_feature_size + 1 + hidden_size
    config.connector_size = (config.connector_size or hidden_size) + round(added / of_a_unit)
    config.memory_top_k = base.built_top_k = 0
    del base.memory_connector
    base.connector = Connector(
        config.vision_feature_size, config.connector_size, hidden_size, config.projector_hidden_act
    )
    base.connector.apply(model._init_weights)


def read_bank(config: StageArguments) -> MemoryBank | None:
    """The bank that a config names, or None if it names none or is of the baseline."""
    if not config.memory_bank or (config.model_kwargs or {}).get("memory_top_k") == 0:
        return None
    check_name("memory_bank", config.memory_bank, "dataset")
    bank = MemoryBank.from_pretrained(config.memory_bank)
    return bank.for_any_tower() if config.any_tower else bank


def attach_bank(
    config: StageArguments, model: PreTrainedModel, processor: ProcessorMixin, bank: MemoryBank | None
) -> MemoryBank | None:
    """The bank, attached to the model, or None for a model without memory."""
    neighbours = neighbours_of_baseline(config) if config.baseline == "static_rag" else model.config.num_neighbours
    if neighbours == 0:
        return None
    if bank is None:
        raise ValueError(
            f"The model retrieves {neighbours} neighbours an image, but there is no bank: set "
            "`memory_bank`, or `model_kwargs: {memory_top_k: 0}` for the baseline."
        )
    model.attach_memory_bank(bank, tokenizer=processor.tokenizer)
    padded = bank.config.preprocessing.get("do_pad"), processor.image_processor.to_dict().get("do_pad")
    if bool(padded[0]) != bool(padded[1]):
        logger.warning(
            f"Images are {'padded to a square' if padded[1] else 'not padded'}, but those of the bank were "
            f"{'padded' if padded[0] else 'not'}: neighbours of images that are not square will be worse. Use the "
            "image_aspect_ratio of the bank, or build it with this processor."
        )
    return bank


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the language model was made for; None if its config does not say."""
    config = model.config.text_config
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")  # GPT-2's is n_positions
    return config.to_dict().get(name)
