"""Metrics logged beside the loss: speed, memory, gradient norms, and what retrieval gave."""

import re
import time
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.outputs import TinyAlignImageFeatures
from ..arguments.tuning import part_of
from ..hub.run_facts import peak_memory_gb
from .trainable_parts import TrainedPart

# Peak FLOP/s of dense bfloat16 (V100, T4: float16) matrix products, from NVIDIA's data sheets. First match counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
}
COUNTED = ("samples", "tokens", "named_images", "own_images", "slots", "slots_off", "similarities")


class Meter(TrainerCallback):
    """Add to each logged loss what was measured since the last one, over all processes and accumulated batches: the
    metrics that docs/training.md lists. `grad_norm_<part>` is the norm before clipping, at the step that is logged;
    it is missing with DeepSpeed, and, but at the last step, with a `logging_strategy` other than `"steps"`.
    """

    def __init__(self, trainer: Trainer, bank: MemoryBank | None):
        self.trainer, self.bank = trainer, bank
        self.peak_flops = peak_flops()
        self.norms: dict[str, torch.Tensor] = {}
        self._reset()

    def _reset(self):
        device = self.trainer.args.device  # counted there, without waiting for it
        self.counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in COUNTED}
        self.similarity = torch.zeros((), device=device)
        self.started = self.last_step = time.monotonic()

    def count(self, inputs: dict[str, Any], images: TinyAlignImageFeatures | None):
        """Count a batch that is trained on, and what was read of its images' neighbours; None if it has none."""
        counts = self.counts
        names = inputs.get("exclude_ids", ()) if self.bank is not None else ()
        counts["samples"] += len(inputs["input_ids"])
        counts["tokens"] += inputs["attention_mask"].sum()
        counts["named_images"] += len(names)
        counts["own_images"] += sum(any(len(self.bank.ids_of(name)) for name in of_row) for of_row in names)
        if images is None or images.memory_ids is None:
            return
        used = images.memory_ids.to(self.similarity.device) >= 0
        counts["slots"] += used.numel()
        counts["slots_off"] += (~used).sum()
        if images.memory_scores is not None:
            scores = images.memory_scores.to(used.device, torch.float32)
            similar = used & scores.isfinite()
            counts["similarities"] += similar.sum()
            self.similarity += torch.where(similar, scores, 0.0).sum()

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        step = state.global_step + 1
        logged = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if (args.logging_strategy == IntervalStrategy.STEPS and logged) or step >= state.max_steps:
            self.norms = gradient_norms(model)

    def on_step_end(self, args, state, control, **kwargs):
        self.last_step = time.monotonic()

    def on_evaluate(self, args, state, control, **kwargs):
        """Its time does not count; nor that of saving."""
        now = time.monotonic()
        self.started += now - self.last_step
        self.last_step = now

    on_save = on_evaluate

    def read(self, logs: dict[str, float]) -> dict[str, float]:
        """Return what to add to `logs`, which have `loss` and `grad_norm`, and count from 0 again. All processes call
        it.
        """
        seconds = time.monotonic() - self.started
        accelerator = self.trainer.accelerator
        counts = {name: count.item() for name, count in accelerator.reduce(self.counts, "sum").items()}
        similarity = accelerator.reduce(self.similarity, "sum").item()
        memory = accelerator.gather(torch.tensor([peak_memory_gb()], device=self.similarity.device)).max().item()
        metrics = {f"{name}_per_second": counts[name] / seconds for name in ("samples", "tokens")}
        if self.peak_flops is not None:
            flops = counts["tokens"] * flops_per_token(self.trainer.parts)
            metrics["mfu"] = flops / seconds / (self.peak_flops * accelerator.num_processes)
        metrics["memory_gb"] = memory
        norms, self.norms = {part: norm.item() for part, norm in self.norms.items()}, {}
        clipped = sum(norm**2 for norm in norms.values()) ** 0.5
        # all gradients were clipped by the same factor, the norm in `logs` is from before
        factor = logs["grad_norm"] / clipped if clipped and "grad_norm" in logs else 1.0
        metrics |= {f"grad_norm_{part}": norm * factor for part, norm in norms.items()}
        if counts["similarities"]:
            metrics["neighbour_similarity"] = similarity / counts["similarities"]
        if counts["named_images"]:
            metrics["own_samples_excluded"] = counts["own_images"] / counts["named_images"]
        if counts["slots"]:
            metrics["memory_slots_off"] = counts["slots_off"] / counts["slots"]
        self._reset()
        return {name: float(f"{value:.5g}") for name, value in metrics.items()}


def gradient_norms(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The norm of the gradients there are, by part; of the whole model also where FSDP2 has divided it."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(part_of(name), []).append(parameter.grad)
    norms = {part: torch.nn.utils.get_total_norm(own) for part, own in gradients.items()}
    return {part: norm.full_tensor() if isinstance(norm, DTensor) else norm for part, norm in norms.items()}


def peak_flops() -> float | None:
    """Return the peak FLOP/s of this process's GPU, or None if it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for gpu, peak in PEAK_FLOPS.items() if re.search(rf"\b{gpu}\b(?! Laptop)", name)), None)


def flops_per_token(parts: list[TrainedPart]) -> int:
    """Count the FLOPs of training on a token as PaLM does (Chowdhery et al., 2022, appendix B): 6 for each parameter
    of the language model that trains, and 4 for each frozen one, which has no gradient of its own. Vision tower,
    connectors and attention are not counted: the utilisation is at least what is logged.
    """
    (language_model,) = [part for part in parts if part.name == "language_model"]
    return 4 * language_model.parameters + 2 * language_model.trained
