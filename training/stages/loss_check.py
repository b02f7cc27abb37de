"""A loss that is NaN or infinite stops training, and the rows that it is of are named."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

TEXT_INPUTS = ("input_ids", "attention_mask", "labels")  # one row a row; all others have one an image


class BadLoss(ValueError):
    """A loss that is no number."""


class LossCheck(TrainerCallback):
    """
    Looks at the losses of a step's batches all at once, before the optimizer takes the step: the device is waited for
    once a step, however many batches are accumulated, and the weights are still those that the loss is of.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.batches = []

    def add(self, loss: torch.Tensor, inputs: dict[str, Any], rows: list[str]):
        """Keeps a batch of the step, which [`Trainer`] keeps as well, and the names of its rows."""
        self.batches.append((loss.detach(), inputs, rows))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batches, self.batches = self.batches, []
        finite = torch.stack([loss for loss, _, _ in batches]).isfinite()
        if not finite.all():
            _, inputs, rows = batches[int(finite.int().argmin())]
            raise BadLoss(self._explain(float(batches[int(finite.int().argmin())][0]), inputs, rows))

    def _explain(self, loss: float, inputs: dict[str, Any], rows: list[str]) -> str:
        args, model = self.trainer.args, self.trainer.model
        found = f"The loss of step {self.trainer.state.global_step + 1} is {loss}"
        advice = f"lower the learning rate ({args.learning_rate:g})"
        if args.fp16:
            advice += ", or train in bfloat16 or float32: numbers over 65,504 overflow in float16 (fp16: true)"
        rerun = "The step was not taken; the same command goes on from the last checkpoint in output_dir."
        broken = [name for name, value in model.named_parameters() if value.requires_grad and not _is_finite(value)]
        if broken:
            return (
                f"{found}: weights are NaN or infinite ({broken[0]} and {len(broken) - 1} others), so that an earlier "
                f"step went wrong, and not {', '.join(rows)}, which this one is of. Delete the last checkpoint if it "
                f"is as late, and {advice}. {rerun}"
            )
        bad = self._bad_rows(inputs, rows)
        if not bad:
            return (
                f"{found}: that of {', '.join(rows)}. The loss of each of them alone is finite. Look at them, "
                f"and {advice}. {rerun}"
            )
        others = f", and finite for the other {len(rows) - len(bad)} rows of its batch" if len(bad) < len(rows) else ""
        return (
            f"{found}. It is no number for {', '.join(bad)}{others}. Look at what these rows say and show (`tinyalign "
            f"data check` tells what is wrong in form), remove them if they are broken; if they are fine, {advice}. "
            f"{rerun}"
        )

    @torch.no_grad()
    def _bad_rows(self, inputs: dict[str, Any], rows: list[str]) -> list[str]:
        """The rows whose own loss is no number; all where the model is divided, and one can't run it alone."""
        trainer = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return rows
        config = trainer.model.config
        counts = (inputs["input_ids"] == config.image_token_id).sum(1) // config.num_image_tokens
        ends = counts.cumsum(0).tolist()
        bad = []
        for index, (name, end, count) in enumerate(zip(rows, ends, counts.tolist(), strict=True)):
            row = {key: inputs[key][index : index + 1] for key in TEXT_INPUTS}
            if count:
                row |= {key: value[end - count : end] for key, value in inputs.items() if key not in TEXT_INPUTS}
            with trainer.compute_loss_context_manager():
                loss = trainer.model(**row, supervised_logits_only=True, use_cache=False).loss
            if not loss.isfinite():
                bad.append(name)
        return bad


def _is_finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())
