"""The two models in a TinyAlign model: built of configs, or loaded where a checkpoint holds connectors alone."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration_tinyalign import TinyAlignConfig

# What AutoConfig and AutoTokenizer need to find the same checkpoint as the model.
DOWNLOAD_KWARGS = ("token", "cache_dir", "local_files_only")
HUB_KWARGS = (*DOWNLOAD_KWARGS, "revision", "subfolder", "trust_remote_code", "gguf_file")


def build_part(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Make a part of the model, of transformers' own code and no other; `ValueError` if it cannot be built."""
    try:
        return AutoModel.from_config(config, trust_remote_code=False)
    except RuntimeError as error:
        raise ValueError(f"{name} describes a model that cannot be built: {error}.") from error


def load_vision_tower(name_or_path: str, kwargs: dict) -> tuple[PreTrainedModel, dict]:
    """Return a vision tower, the vision half of a dual one, and transformers' report on its loading."""
    config = AutoConfig.from_pretrained(name_or_path, **{key: kwargs[key] for key in HUB_KWARGS if key in kwargs})
    if "vision_config" in config.sub_configs:  # a dual tower
        config = config.vision_config
        config._name_or_path = name_or_path
    return AutoModel.from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)


def add_rows(model: PreTrainedModel, rows: int):
    """Add rows to embedding and head; the new ones are the mean of the others."""
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows, mean_resizing=False)
    lm_head = model.get_output_embeddings()
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, lm_head.weight, lm_head.bias):
            if weight is not None:
                weight[before:] = weight[:before].mean(0)


def check_origins(config: TinyAlignConfig):
    """Raise `ValueError` unless the checkpoints are known that vision tower and language model are from."""
    unknown = [name for name in ("vision_model", "language_model") if vars(config)[name] is None]
    if unknown:
        raise ValueError(
            f"config.{' and config.'.join(unknown)}: None, expected the checkpoint that vision tower or language "
            "model is from. The connectors can't be saved alone when these were trained, or are not known (a complete "
            "checkpoint does not keep the paths of a machine): save all of the model, or compose it of Hub models."
        )


def load_models(model: PreTrainedModel, kwargs: dict):
    """Give a model, whose connectors were loaded alone, the vision tower and language model that its config names.

    Args:
        kwargs: Of `from_pretrained`; what is for downloads is used.

    Raises:
        ValueError: The config does not name them, they do not fit the connectors, or they would be quantized.
        OSError: One of them cannot be loaded.
    """
    config = model.config
    check_origins(config)
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "Found quantization_config and a checkpoint of connectors alone: load it without, save_pretrained it, and "
            "load that with quantization_config."
        )
    hub = {"trust_remote_code": False, "use_safetensors": True}  # the checkpoint names them, not who loads it
    hub |= {key: kwargs[key] for key in DOWNLOAD_KWARGS if key in kwargs}
    try:
        tower, _ = load_vision_tower(config.vision_model, {"revision": config.vision_model_revision or "main", **hub})
        text = AutoModelForCausalLM.from_pretrained(
            config.language_model, revision=config.language_model_revision or "main", **hub
        )
    except OSError as error:
        raise OSError(
            f"This checkpoint holds connectors alone, and of {config.vision_model} (revision "
            f"{config.vision_model_revision}) and {config.language_model} (revision "
            f"{config.language_model_revision}), which they belong to, one cannot be loaded: {error}"
        ) from error
    if config.image_token_id >= text.get_input_embeddings().num_embeddings:
        add_rows(text, config.image_token_id + 1)
    base = model.base_model
    try:
        base.vision_tower.load_state_dict(tower.state_dict())
        base.language_model.load_state_dict(text.base_model.state_dict())
        if model.get_output_embeddings() is not None:
            model.get_output_embeddings().load_state_dict(text.get_output_embeddings().state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{config.vision_model} or {config.language_model} is not what the connectors were trained with: {error}"
        ) from error
    config.connectors_only = False
