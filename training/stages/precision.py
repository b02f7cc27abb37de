"""Computing in bfloat16 without losing what the float32 weights hold."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel


@contextlib.contextmanager
def bfloat16_language_model(model: PreTrainedModel, enabled: bool = True, frozen_only: bool = False) -> Iterator[None]:
    """The language model's weights in bfloat16; afterwards they are what they were, bit for bit. For answering, and
    (`frozen_only`) for training: what trains stays as it is. So does what is quantized.
    """
    kept = {}
    if enabled:
        for module in (model.base_model.language_model, model.get_output_embeddings()):
            for parameter in module.parameters():
                if parameter.is_floating_point() and not (frozen_only and parameter.requires_grad):
                    kept.setdefault(parameter, parameter.data)
                    parameter.data = parameter.data.bfloat16()
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data.to(parameter.device)


@contextlib.contextmanager
def ready_to_answer(model: PreTrainedModel) -> Iterator[None]:
    """Leave the model in evaluation mode, and free of what accelerate and TRL put around its forward."""
    try:
        yield
    finally:
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
        model.eval()
