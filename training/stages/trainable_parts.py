"""Trainable parts of a model: freezing the others, and a table of what trains."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..arguments.tuning import PARTS, TuningArguments, part_of

logger = logging.get_logger(__name__)


def set_trainable(config: TuningArguments, model: PreTrainedModel):
    """Let the parts of `model` train that `config` says, in float32: in bfloat16 alone, updates of 2e-5 are rounded
    away. All else is frozen. (Adapters come with [`adapters`].)

    Raises:
        ValueError: A layer that the vision tower does not have, or that its features do not depend on.
    """
    model.requires_grad_(False)
    base = model.base_model
    base.trains_vision_tower = config.tune_vision_tower != "frozen"
    if base.trains_vision_tower:
        base.vision_tower.float()
        _tune_vision_tower(model, config.first_vision_layer)
        model.config.vision_model = model.config.vision_model_revision = None  # it will be another
        if model.config.memory_top_k > 0:
            logger.warning(
                "The vision tower trains: keys and values of the memory bank are of the tower as it was before. Build "
                "the bank anew with the trained model, which will refuse this one."
            )
    base.connector.requires_grad_(config.tune_connector == "full")
    if model.config.memory_top_k > 0:
        base.memory_connector.requires_grad_(config.tune_memory_connector == "full")
    if config.tune_language_model == "full":
        base.language_model.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    if config.tune_language_model != "frozen":
        model.config.language_model = model.config.language_model_revision = None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not config.uses_lora and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "Nothing trains: tune_memory_connector is full, but the model has no memory (memory_top_k: 0), and all "
            "else is frozen. Set tune_connector or tune_language_model."
        )


def _tune_vision_tower(model: PreTrainedModel, first_layer: int | None):
    """All of the tower that its features depend on, or (`first_layer`) what of it is not before that layer."""
    tower, config = model.base_model.vision_tower, model.config.vision_config
    parameters = list(tower.parameters())
    layers = next((module for module in tower.modules() if isinstance(module, nn.ModuleList)), [])
    if first_layer is not None:
        first = next((parameter for layer in layers[first_layer:] for parameter in layer.parameters()), None)
        start = next((index for index, other in enumerate(parameters) if other is first), len(parameters))
        parameters = parameters[start:]
    for parameter in parameters:
        parameter.requires_grad_(True)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with torch.enable_grad():  # what comes behind the layer that is read, a pooling head say, would never get any
        features = model.get_vision_features(torch.zeros(1, config.num_channels, height, width))
        gradients = [None] * len(parameters)
        if features.requires_grad:
            gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"tune_vision_tower is 'from layer {first_layer}', but the vision tower ({config.model_type}) has "
            f"{len(layers)} layers, counted from 0, and none from there on is read (vision_feature_layer "
            f"{model.config.vision_feature_layer}): choose an earlier layer."
        )


@dataclass
class TrainedPart:
    """A row of the table: a part, its policy, its parameters, those of them that train, their dtypes and rate."""

    name: str
    policy: str
    parameters: int
    trained: int
    dtypes: Counter[str]
    learning_rate: float


def parts_of(config: TuningArguments, model: PreTrainedModel) -> list[TrainedPart]:
    """The parts that the model has, in the order images go through them."""
    parts = {name: TrainedPart(name, config.policy(name), 0, 0, Counter(), 0.0) for name in PARTS}
    for name, parameter in model.named_parameters():
        part, packed = parts[part_of(name)], parameter.dtype == torch.uint8  # two weights of 4 bits a byte
        part.parameters += parameter.numel() * (2 if packed else 1)
        part.dtypes["4 bits" if packed else str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        if parameter.requires_grad:
            part.trained += parameter.numel()
            part.learning_rate = config.rate(part.name)
    return [part for part in parts.values() if part.parameters]


def table_of_parts(parts: list[TrainedPart]) -> str:
    """The parts as lines of text, for people:

    part              trains     parameters  trained         dtype     learning rate
    vision tower      frozen     92,884,224  0               float32   -
    """
    everything = sum(part.parameters for part in parts)
    trained = sum(part.trained for part in parts)
    rows = [("part", "trains", "parameters", "trained", "dtype", "learning rate")]
    for part in parts:
        name, rate = part.name.replace("_", " "), f"{part.learning_rate:g}" if part.trained else "-"
        dtypes = " + ".join(dtype for dtype, _ in part.dtypes.most_common())
        rows.append((name, part.policy, f"{part.parameters:,}", f"{part.trained:,}", dtypes, rate))
    rows.append(("all", "", f"{everything:,}", f"{trained:,} ({trained / everything:.2%})", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def parameter_groups(config: TuningArguments, model: nn.Module, decayed: set[str]) -> list[dict]:
    """Return what trains as groups of an optimizer: each part with its learning rate, `decayed` with weight decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part, decay = part_of(name), config.weight_decay if name in decayed else 0.0
            group = {"params": [], "lr": config.rate(part), "weight_decay": decay}
            groups.setdefault((part, decay), group)["params"].append(parameter)
    return list(groups.values())
