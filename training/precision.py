"""Where bfloat16 is fast, and computing in it without losing what the float32 weights hold."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel


def bfloat16_is_fast(use_cpu: bool) -> bool:
    """Whether the device that trains computes in bfloat16 itself."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return use_cpu and (capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))


@contextlib.contextmanager
def bfloat16_language_model(model: PreTrainedModel, enabled: bool = True, frozen_only: bool = False) -> Iterator[None]:
    """
    The language model's weights in bfloat16; afterwards they are what they were, bit for bit. For answering, and
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
