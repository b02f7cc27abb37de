"""A loss that is NaN or infinite stops training, and the rows that it is of are named."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

TEXT_INPUTS = ("input_ids", "attention_mask", "labels")  # one row a row; all others have one an image


class BadLoss(ValueError):
    """A loss that is no number."""


class EvaluationLoss:
    """The mean loss over all supervised tokens, whatever the batches and the processes."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.begin()

    def begin(self):
        self.sums = torch.zeros(2, device=self.trainer.args.device)  # loss over supervised tokens, and their number

    def add(self, loss: torch.Tensor, labels: torch.LongTensor):
        """Count a batch with its mean loss, which is NaN where it has no supervised token."""
        tokens = (labels[:, 1:] != -100).sum()
        self.sums += torch.stack([torch.where(tokens > 0, loss.detach().float() * tokens, 0.0), tokens.float()])

    def mean(self, name: str) -> float:
        """Return the loss of the data of this name; ValueError if they have no supervised token."""
        loss, tokens = self.trainer.accelerator.reduce(self.sums, "sum").tolist()
        if not tokens:
            raise ValueError(f"The {name} data have no answers, expected at least one.")
        return loss / tokens


class LossCheck(TrainerCallback):
    """Look at the losses of all batches of a step at once, before it is taken: the device is waited for once."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.batches = []

    def add(self, loss: torch.Tensor, inputs: dict[str, Any], rows: list[str]):
        """Keep a batch of the step, which [`Trainer`] keeps as well, and the names of its rows."""
        self.batches.append((loss.detach(), inputs, rows))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batches, self.batches = self.batches, []
        finite = torch.stack([loss for loss, _, _ in batches]).isfinite()
        if not finite.all():
            loss, inputs, rows = batches[int(finite.int().argmin())]
            raise BadLoss(self._explain(float(loss), inputs, rows))

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Drop the batches of a stream that fill no step: the next epoch's first step would have their gradients, and
        its logged loss theirs.
        """
        if self.batches:
            self.trainer._tr_loss -= sum(loss for loss, _, _ in self.batches)
            self.batches = []
            model.zero_grad()

    def _explain(self, loss: float, inputs: dict[str, Any], rows: list[str]) -> str:
        args, model = self.trainer.args, self.trainer.model
        found = f"The loss of step {self.trainer.state.global_step + 1} is {loss}"
        advice = f"lower the learning rate ({args.learning_rate:g})"
        if args.fp16:
            advice += ", or train in bfloat16 or float32: numbers over 65,504 overflow in float16 (fp16: true)"
        rerun = "The step was not taken; the same command goes on from the last checkpoint in output_dir."
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        broken = [name for name, value in trained if not bool(value.isfinite().all())]
        if broken:
            return (
                f"{found}: weights are NaN or infinite ({broken[0]} and {len(broken) - 1} others), so that an earlier "
                f"step went wrong, and not {', '.join(rows)}. Delete the last checkpoint if it is as late, and "
                f"{advice}. {rerun}"
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
        """Return the rows whose own loss is no number; all where the model is divided, and one can't run it alone."""
        trainer = self.trainer
        if trainer.is_divided:
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
