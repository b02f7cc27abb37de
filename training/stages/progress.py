"""A run as people follow it: what will be done, a line for each logged step, and a bar on a terminal."""

import sys
import time
from collections.abc import Sized

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

FEW_STEPS = 10


class StepBar(ProgressCallback):
    """The bar alone; `StepLines` writes what is logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class StepLines(TrainerCallback):
    """Print the length of a run before it, and one short line for each logged step; the log itself is unchanged."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            show(describe_run(self.trainer, state.max_steps))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        values = {name: value for name, value in logs.items() if "loss" in name and name != "train_loss"}
        if not values:
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.2e}")
        if "samples_per_second" in logs:
            parts.append(f"{logs['samples_per_second']:.3g} samples/s")
        done = state.global_step - self.first_step if self.trainer.is_in_train else 0
        if done and state.global_step < state.max_steps:
            seconds = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
            parts.append(f"{duration(seconds)} left")
        show("  ".join(parts))


def follow(trainer: Trainer) -> None:
    """Replace the raw dictionaries that `Trainer` prints by lines, and its bar where there is no terminal."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if sys.stderr.isatty() and not trainer.args.disable_tqdm:
        trainer.add_callback(StepBar)
    trainer.add_callback(StepLines(trainer))


def describe_run(trainer: Trainer, steps: int) -> str:
    """Return what a run will do, and how it is made shorter."""
    args = trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    parts = [f"{steps:,} step{'s' if steps > 1 else ''}"]
    if isinstance(trainer.train_dataset, Sized):
        total = len(trainer.train_dataset)
        each = min(rows, total)
        parts.append(f"{each} rows each, {steps * each / total:.3g} x the {total:,} rows of the data")
    else:
        parts.append(f"{rows} rows each")
    text = (
        f"Training: {', '.join(parts)}, the first {args.get_warmup_steps(steps)} warm-up. --max_steps N takes fewer; "
    )
    text += "Ctrl-C stops, and the same command goes on from the last checkpoint."
    if steps < FEW_STEPS and args.max_steps <= 0:
        text += (
            f"\nSo few steps teach little: set global_batch_size lower than {rows}, or num_train_epochs higher than "
            f"{args.num_train_epochs:g}."
        )
    return text


def duration(seconds: float) -> str:
    """Return `40 s`, `12 min` or `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show(text: str) -> None:
    """Print above the bar, at once also into a file."""
    tqdm.write(text)
    sys.stdout.flush()
