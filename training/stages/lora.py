"""Adapters on the language model (LoRA), and on one of 4 bits (QLoRA): put in, trained, merged."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..arguments.stage import StageArguments
from ..arguments.tuning import TuningArguments


def quantize_linears(config: TuningArguments, model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Put 4-bit (NF4, double quantization) copies of the language model's linear layers in their places, where the
    model is. Before `model.to("cuda")`, only the copies go there.

    Returns:
        The layers as they were, by name, on the CPU: adapters are merged into these.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    language_model = model.base_model.language_model
    compute_dtype = {config.bf16: torch.bfloat16, config.fp16: torch.float16}.get(True, torch.float32)
    originals = {name: layer for name, layer in language_model.named_modules() if type(layer) is nn.Linear}
    for name, layer in originals.items():
        small = Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            device="meta",
        )
        small.bias = layer.bias
        small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
        language_model.set_submodule(name, small.to(layer.weight.device))
        originals[name] = layer.cpu()
    language_model.is_loaded_in_4bit = True  # how PEFT knows
    return originals


@contextlib.contextmanager
def adapters(config: StageArguments, model: PreTrainedModel) -> Iterator[None]:
    """Inside, the language model has adapters, if `config` wants them, which train in float32. Afterwards they are
    merged into its weights, also when training was interrupted, and the model is of the classes it was: it loads
    without PEFT, anywhere.

    Raises `ValueError` when `lora_target_modules` are not in the language model, or this run's adapters are merged.
    """
    if not config.uses_lora:
        yield
        return
    merged = vars(model).setdefault("merged_runs", set())
    if config.output_dir in merged:
        raise ValueError(
            f"The model has the adapters of {config.output_dir} in its weights, expected it as it was before: load it "
            "again, and make a new trainer."
        )
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    language_model = model.base_model.language_model
    rank = 16 if config.lora_r is None else config.lora_r
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=0.05 if config.lora_dropout is None else config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    originals = quantize_linears(config, model) if config.tune_language_model == "qlora" else {}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the same adapters in every process, and in a run that goes on
            inject_adapter_in_model(settings, language_model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            parameter.requires_grad_("lora_" in name or name in trained)
        yield
    finally:
        for name, layer in list(language_model.named_modules()):
            if isinstance(layer, LoraLayer):
                merged.add(config.output_dir)
                linear = originals.setdefault(name, layer.get_base_layer())
                delta = layer.get_delta_weight("default").detach()
                linear.weight.data += delta.to(linear.weight.device, linear.weight.dtype)
        for name, linear in originals.items():
            language_model.set_submodule(name, linear)
        language_model.to(model.device)
        for name in ("peft_config", "is_loaded_in_4bit"):
            vars(language_model).pop(name, None)
