"""Metrics logged beside the loss: speed, memory, gradient norms, and what retrieval gave."""

import contextlib
import copy
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ...modeling_tinyalign.connectors import Connector
from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.tuning import PARTS, part_of
from ..hub.run_facts import peak_memory_gb

# Peak FLOP/s of dense bfloat16 (V100, T4: float16) matrix products, from NVIDIA's data sheets. First match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Counted on the device, without waiting for it:
ON_DEVICE = ("tokens", "token_pairs", "supervised", "slots", "slots_off", "similarities")
# and on the host.
ON_HOST = ("samples", "images", "encoded_images", "named_images", "own_images")


class Meter(TrainerCallback):
    """
    Adds to each logged loss what was measured since the last one, over all processes and accumulated batches:

    - `samples_per_second`, `tokens_per_second`: rows, and tokens without padding, those of images included. The time
      is all but that of evaluating and saving.
    - `mfu`: model FLOPs utilisation, see [`ModelFlops`], of GPUs that `PEAK_FLOPS` knows.
    - `memory_gb`: the peak so far, see [`peak_memory_gb`], of the process that needs most.
    - `grad_norm_<part>` for each of `PARTS` that trains: the norm before clipping, at the step that is logged. Not
      with DeepSpeed, which keeps gradients to itself, nor, but at the last step, with a `logging_strategy` other than
      `"steps"`.
    - `neighbour_similarity`: the mean over the neighbours that the model read.
    - `own_samples_excluded`: share of the images that are in the bank themselves, or have one in their row that is:
      those rows of the bank were left out.
    - `memory_slots_off`: share of the slots without a neighbour: too few were found, memory dropout took it away, or
      it is below `retrieval_threshold`.
    """

    def __init__(self, trainer: Trainer, bank: MemoryBank | None):
        self.trainer, self.bank = trainer, bank
        self.model: PreTrainedModel = trainer.model
        self.flops: ModelFlops | None = None
        self.peak_flops = peak_flops()
        self.norms: dict[str, torch.Tensor] = {}
        self.image_shape: torch.Size | None = None
        self.has_images = False
        self._reset()

    @contextlib.contextmanager
    def counting_slots(self) -> Iterator[None]:
        """Count the slots that the memory connector reads inside; the model is left as it was."""
        if self.model.config.memory_top_k == 0:
            yield
            return
        hook = self.model.base_model.memory_connector.register_forward_pre_hook(self._count_slots)
        try:
            yield
        finally:
            hook.remove()

    def _reset(self):
        device = self.trainer.args.device
        self.on_host = dict.fromkeys(ON_HOST, 0)
        self.on_device = torch.zeros(len(ON_DEVICE), dtype=torch.int64, device=device)
        self.similarity = torch.zeros((), device=device)
        self.started = self.last_step = time.monotonic()

    def count(self, inputs: dict[str, Any]):
        """Counts a batch that is about to be trained on."""
        lengths = inputs["attention_mask"].sum(1)
        supervised = (inputs["labels"] != -100).sum()
        zero = torch.zeros_like(supervised)
        self.on_device += torch.stack([lengths.sum(), (lengths**2).sum(), supervised, zero, zero, zero])
        encoded, cached = (len(inputs.get(name, ())) for name in ("pixel_values", "vision_features"))
        self.has_images = encoded + cached > 0
        if encoded:
            self.image_shape = inputs["pixel_values"].shape[1:]
        names = inputs.get("exclude_ids", ()) if self.bank is not None else ()
        found = {
            "samples": len(lengths),
            "images": encoded + cached,
            "encoded_images": encoded,
            "named_images": len(names),
            "own_images": sum(any(len(self.bank.ids_of(name)) for name in of_row) for of_row in names),
        }
        for name, count in found.items():
            self.on_host[name] += count

    def _count_slots(self, connector: torch.nn.Module, arguments: tuple):
        """Before each call of the memory connector. A blank image (`with_blank_image`) is none."""
        values, used, _, scores = arguments
        if not connector.training or not self.has_images:
            return
        device = self.on_device.device
        used = torch.ones(values.shape[:2], dtype=torch.bool) if used is None else used
        used = used.to(device)
        similar = torch.zeros_like(used)
        if scores is not None:
            scores = torch.as_tensor(scores).to(device, torch.float32)
            similar = used & scores.isfinite()
            self.similarity += torch.where(similar, scores, 0.0).sum()
        self.on_device[3:] += torch.stack([torch.ones_like(used).sum(), (~used).sum(), similar.sum()])

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
        """
        Return what to add to `logs`, which have `loss` and `grad_norm`, and count from 0 again. All processes call it.
        """
        seconds = time.monotonic() - self.started
        accelerator = self.trainer.accelerator
        on_host = torch.tensor(list(self.on_host.values()), device=self.on_device.device)
        totals = accelerator.reduce(torch.cat([self.on_device, on_host]), "sum").tolist()
        counts = dict(zip((*ON_DEVICE, *ON_HOST), totals, strict=True))
        similarity = accelerator.reduce(self.similarity, "sum").item()
        memory = accelerator.gather(torch.tensor([peak_memory_gb()], device=self.on_device.device)).max().item()
        metrics = {name: counts[f"{name}s"] / seconds for name in ("sample", "token")}
        metrics = {f"{name}s_per_second": value for name, value in metrics.items()}
        if self.peak_flops is not None:
            if self.flops is None or (self.flops.image == 0 and self.image_shape is not None):
                self.flops = ModelFlops(self.model, self.image_shape)
            peak = self.peak_flops * accelerator.num_processes
            metrics["mfu"] = self.flops.of(counts) / seconds / peak
        metrics["memory_gb"] = memory
        metrics |= self._norms_before_clipping(logs)
        if counts["similarities"]:
            metrics["neighbour_similarity"] = similarity / counts["similarities"]
        if counts["named_images"]:
            metrics["own_samples_excluded"] = counts["own_images"] / counts["named_images"]
        if counts["slots"]:
            metrics["memory_slots_off"] = counts["slots_off"] / counts["slots"]
        self._reset()
        return {name: float(f"{value:.5g}") for name, value in metrics.items()}

    def _norms_before_clipping(self, logs: dict[str, float]) -> dict[str, float]:
        """All gradients were clipped by the same factor, the norm in `logs` is from before."""
        norms = {part: norm.item() for part, norm in self.norms.items()}
        clipped = sum(norm**2 for norm in norms.values()) ** 0.5
        factor = logs["grad_norm"] / clipped if clipped and "grad_norm" in logs else 1.0
        self.norms = {}
        return {f"grad_norm_{part}": norm * factor for part, norm in norms.items()}


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


class ModelFlops:
    """
    FLOPs that training takes by the model's shapes, whatever was really computed: the numerator of MFU as in PaLM
    (Chowdhery et al., 2022, appendix B). A multiply-add is two; padding, recomputed activations (gradient
    checkpointing), the optimizer, retrieval and the lexicon are none.

    A matrix product with weights costs as much again for the gradient of its input, and once more for that of its
    weights if they train: 3 forward passes for what trains (PaLM's 6 per parameter and token), 2 for a frozen language
    model, through which the connectors' gradient goes, and 1 for a frozen vision tower. Where a share of a part's
    parameters trains (LoRA, the last layers of the tower), so much of the rest is added. Attention is counted over
    all pairs of a row's tokens, as PaLM does (12 L H Q T), and always with its backward pass: 3 forward passes.

    Forward passes of the tower and the language model are counted by `FlopCounterMode` on the meta device, without
    their weights.

    Args:
        image_shape: `(3, H, W)` of an image, or None where features are cached: then the tower costs nothing.
    """

    def __init__(self, model: PreTrainedModel, image_shape: torch.Size | None = None):
        config, base = model.config, model.base_model
        trained = {part: _trained_share(model, part) for part in PARTS}
        self.image = 0.0
        if image_shape is not None:
            pixel_values = torch.empty(1, *image_shape, device="meta")
            self.image = _forward_flops(config.vision_config, pixel_values=pixel_values) * (
                1 + 2 * trained["vision_tower"]
            )
        of_connectors = config.image_seq_length * _connector_flops(base.connector, trained["vision_tower"] > 0)
        if config.memory_top_k > 0:
            of_connectors += config.num_memory_tokens * _connector_flops(base.memory_connector.mlp, False)
        self.connectors = of_connectors
        hidden_size = config.text_config.hidden_size
        short, long = (  # a * n + b * n**2
            _forward_flops(config.text_config, inputs_embeds=torch.empty(1, n, hidden_size, device="meta"))
            for n in (64, 128)
        )
        pair = (long - 2 * short) / (128**2 - 2 * 64**2)
        self.token_pair = 3 * pair
        self.token = (short - pair * 64**2) / 64 * (2 + trained["language_model"])
        head = model.get_output_embeddings().weight
        self.logits = 2 * hidden_size * config.text_config.vocab_size * (2 + head.requires_grad)

    def of(self, counts: dict[str, int]) -> float:
        """Count the FLOPs of so many images, tokens, pairs of tokens of one row, and supervised tokens."""
        return (
            counts["encoded_images"] * self.image
            + counts["images"] * self.connectors
            + counts["tokens"] * self.token
            + counts["token_pairs"] * self.token_pair
            + counts["supervised"] * self.logits
        )


def _trained_share(model: PreTrainedModel, part: str) -> float:
    parameters = [parameter for name, parameter in model.named_parameters() if part_of(name) == part]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained / max(1, sum(parameter.numel() for parameter in parameters))


def _connector_flops(connector: Connector, input_trains: bool) -> float:
    """Count the FLOPs of a token, with gradients; that of the input only if something before it trains."""
    first, second = connector.linear_1, connector.linear_2
    return (6 if input_trains else 4) * first.in_features * first.out_features + (
        6 * second.in_features * second.out_features
    )


@torch.no_grad()
def _forward_flops(config: PreTrainedConfig, **inputs: torch.Tensor) -> int:
    """
    Count the forward FLOPs of a model without its weights; eager attention, whose products the counter sees on every
    device.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager").eval()(**inputs)
    return counter.get_total_flops()
