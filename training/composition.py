"""Composing a TinyAlign model from a vision checkpoint and a language-model checkpoint."""

import os
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the shortcut needs torchvision in 5.17
from transformers.utils import cached_file, extract_commit_hash, logging

from ..modeling_tinyalign.composition import DOWNLOAD_KWARGS, HUB_KWARGS, add_rows, load_vision_tower
from ..modeling_tinyalign.configuration_tinyalign import TinyAlignConfig
from ..modeling_tinyalign.connectors import Connector, MemoryConnector, pool_grid, read_vision_tower

logger = logging.get_logger(__name__)

# Both have images, and `{% generation %}` around answers, so that only they are trained on. The first has the turns of
# SmolLM2, Qwen2 and Qwen2.5, without a system prompt unless one is given. Every other language model gets the turns of
# LLaVA 1.5, which TinyLLaVA uses with TinyLlama and Phi-2. There, the space before the answer is part of it, because
# byte-level tokenizers merge it with the first word.
CHATML_TEMPLATE, PLAIN_TEMPLATE = (Path(__file__).with_name(f"{name}.jinja") for name in ("chatml", "plain"))


def compose(
    model_class: type[PreTrainedModel],
    vision_name_or_path: str,
    text_name_or_path: str,
    *,
    image_token: str = "<image>",
    dtype: torch.dtype | str | None = None,
    vision_kwargs: dict | None = None,
    text_kwargs: dict | None = None,
    **config_kwargs,
) -> PreTrainedModel:
    """Compose a model from two checkpoints; its connectors are new. What is initialised and not loaded is logged.

    Args:
        vision_name_or_path (`str`): A vision tower, or a dual tower (SigLIP, CLIP) whose vision half is taken.
        text_name_or_path (`str`): A causal language model with its tokenizer.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder, added if the tokenizer lacks it.
        dtype (`torch.dtype`, *optional*): Of both models; the connectors are float32 in any case.
        vision_kwargs, text_kwargs (`dict`, *optional*): For the two `from_pretrained` (`dtype`, `revision`, ...).
        config_kwargs: Fields of [`TinyAlignConfig`].

    Raises:
        ValueError: `config_kwargs` has a name that is none of its fields.
    """
    _check_part_names(config_kwargs)
    settings = {} if dtype is None else {"dtype": dtype}
    vision_kwargs, text_kwargs = {**settings, **(vision_kwargs or {})}, {**settings, **(text_kwargs or {})}
    vision_tower, vision_info = load_vision_tower(vision_name_or_path, vision_kwargs)
    hub_kwargs = {key: vision_kwargs[key] for key in HUB_KWARGS if key in vision_kwargs}
    image_processor = AutoImageProcessor.from_pretrained(vision_name_or_path, **hub_kwargs)
    language_model, tokenizer, image_token_id, report = _load_language_model(
        text_name_or_path, image_token, text_kwargs
    )
    config = TinyAlignConfig(
        **{
            "vision_config": vision_tower.config,
            "text_config": language_model.config,
            "image_token_id": image_token_id,
            "lm_head_bias": language_model.get_output_embeddings().bias is not None,
            **_origin("vision_model", vision_name_or_path, vision_kwargs),
            **_origin("language_model", text_name_or_path, text_kwargs),
            **_measured_tokens(vision_tower, image_processor, config_kwargs),
            **config_kwargs,
        }
    )
    model = _put_together(model_class, config, vision_tower, language_model)
    _check_logits(model, language_model)
    model.read_captions_with(tokenizer)
    new = "connector, memory_connector" if config.memory_top_k > 0 else "connector"
    report = report + _missing(vision_name_or_path, vision_info)
    logger.warning(f"Not from a checkpoint, train before use: {new} (random){report}.")
    return model.eval()


def _put_together(
    model_class: type[PreTrainedModel],
    config: TinyAlignConfig,
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
) -> PreTrainedModel:
    with torch.device("meta"):  # both halves are there already
        model = model_class(config)
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    hidden_size = config.text_config.hidden_size
    # made anew: those on the meta device have no weights
    model.model.connector = Connector(
        config.vision_feature_size, config.connector_size or hidden_size, hidden_size, config.projector_hidden_act
    )
    model.model.connector.apply(model._init_weights)
    if config.memory_top_k > 0:
        model.model.memory_connector = MemoryConnector(config)
        model.model.memory_connector.apply(model._init_weights)
    model.generation_config = language_model.generation_config
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model


def _check_logits(model: PreTrainedModel, language_model: PreTrainedModel):
    """Raise `ValueError` if a language model does something else with its logits than is known here."""
    token = int(model.config.image_token_id == 0)
    input_ids = torch.full((1, 2), token, device=language_model.device)
    with torch.no_grad():
        found, expected = model(input_ids=input_ids).logits, language_model(input_ids).logits
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"A {language_model.config.model_type} changes its logits in a way that is not known here, expected one "
            "whose logits come out of its head: use another language model."
        )


def _check_part_names(config: dict):
    """A config keeps whatever it is given: a mistyped field would be the default, unnoticed. Raises `ValueError`."""
    known = [field.name for field in fields(TinyAlignConfig)] + ["top_k", "attn_implementation"]
    for name in config:
        if name not in known:
            close = " or ".join(get_close_matches(name, known)) or "a setting of one of the models"
            raise ValueError(
                f"{name} is no field of TinyAlignConfig, did you mean {close}? What is meant for from_pretrained of "
                "the two models goes into vision_kwargs and text_kwargs."
            )


def _load_language_model(name_or_path: str, image_token: str, kwargs: dict) -> tuple:
    """The language model with a row for the image token, its tokenizer, the token's id, and what is missing or new."""
    hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub_kwargs)
    model, info = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    if "text_config" in model.config.sub_configs:
        raise ValueError(
            f"{name_or_path} is a {model.config.model_type} with a vision tower of its own, expected a language model "
            "alone: save its text model, or use another."
        )
    image_token_id = tokenizer.get_vocab().get(image_token, len(tokenizer))
    report = _missing(name_or_path, info)
    rows = model.get_input_embeddings().num_embeddings
    if image_token_id >= rows:
        add_rows(model, image_token_id + 1)
        report = f", embedding row {rows} for {image_token} (mean of the others){report}"
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # as the processor does
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    ends = model.generation_config.eos_token_id
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    end = tokenizer.get_vocab().get("<|im_end|>", tokenizer.eos_token_id)  # which the processor's template teaches
    if end is not None and end not in ends:
        model.generation_config.eos_token_id = [*ends, end]
    return model, tokenizer, image_token_id, report


def _origin(name: str, name_or_path: str, kwargs: dict) -> dict:
    """The fields of [`TinyAlignConfig`] that say where a part is from; none for one that its name does not find."""
    if {"gguf_file", "subfolder"} & kwargs.keys():
        return {}
    if os.path.isdir(name_or_path):
        return {name: os.path.abspath(name_or_path)}
    location = {key: kwargs[key] for key in (*DOWNLOAD_KWARGS, "revision") if key in kwargs}
    commit = extract_commit_hash(cached_file(name_or_path, "config.json", **location), None)  # its folder's name
    return {name: str(name_or_path), f"{name}_revision": commit}


def _missing(name_or_path: str, info: dict) -> str:
    keys = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    return f", {len(keys)} weights that {name_or_path} lacks ({', '.join(keys)}; random)" if keys else ""


def _measured_tokens(vision_tower: PreTrainedModel, image_processor: BaseImageProcessor, config: dict) -> dict:
    """Number and width of the visual features, by running the tower once on an image as its processor makes it, which
    may be of another size than the tower's config says (DINOv2's).
    """
    inputs = image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    with torch.no_grad():
        features, _ = read_vision_tower(
            vision_tower,
            inputs["pixel_values"],
            config.get("vision_feature_layer", TinyAlignConfig.vision_feature_layer),
            config.get("vision_feature_select_strategy", TinyAlignConfig.vision_feature_select_strategy),
        )
    pooled = pool_grid(features, config.get("vision_pool_size"))
    return {"image_seq_length": pooled.shape[1], "vision_feature_size": features.shape[2]}


def compose_processor(
    processor_class: type[ProcessorMixin],
    vision_name_or_path: str,
    text_name_or_path: str,
    config: PreTrainedConfig,
    *,
    image_token: str = "<image>",
    image_aspect_ratio: str = "square",
    vision_kwargs: dict | None = None,
    text_kwargs: dict | None = None,
) -> ProcessorMixin:
    """The processor of a model composed from the same two checkpoints; `config` is that model's.

    Raises `ValueError` when the image token is not the one that the model expects.
    """
    image_processor = AutoImageProcessor.from_pretrained(vision_name_or_path, **(vision_kwargs or {}))
    tokenizer = AutoTokenizer.from_pretrained(text_name_or_path, **(text_kwargs or {}))
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    processor = processor_class(
        image_processor,
        tokenizer,
        chat_template=chat_template_for(tokenizer, image_token),
        image_token=image_token,
        num_image_tokens=config.num_image_tokens,
        key_space=config.key_space,
        image_aspect_ratio=image_aspect_ratio,
    )
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{image_token!r} is token {processor.image_token_id} of {text_name_or_path}, but the model expects "
            f"{config.image_token_id}: use the language model it was made from."
        )
    return processor


def chat_template_for(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """Return ChatML where the tokenizer has its tokens, else LLaVA's turns; after BOS, if the tokenizer adds one."""
    path = CHATML_TEMPLATE if "<|im_end|>" in tokenizer.get_vocab() else PLAIN_TEMPLATE
    template = path.read_text(encoding="utf-8").strip().replace("<image>", image_token)
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        template = "{{- bos_token -}}" + template
    return template
