"""Facts that a run records for its card: stages, losses, time, memory, machine."""

import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import Trainer, TrainerCallback

from ...hub_cards.cards import usage_snippet
from ...hub_cards.facts import ModelFacts
from ..disk import save_file

try:
    import resource
except ImportError:  # Windows
    resource = None

RECORD_NAME = "training_record.json"
RUN_NAME = "run.json"
CURVES_NAME = "training_curves.png"
TRAINING_PACKAGES = ("torch", "transformers", "trl", "datasets", "faiss-cpu")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in what getrusage counts memory in


@dataclass
class StageRecord:
    """A stage that was trained; names as a reader should see them."""

    name: str
    hyperparameters: dict[str, str | int | float]
    losses: list[list[float]]  # `[step, value]` each, as in the other two curves
    eval_losses: list[list[float]]
    seconds: float  # of training, with those before an interruption
    peak_memory_gb: float | None
    learning_rates: list[list[float]] = field(default_factory=list)
    saved_step: int | None = None  # of the saved weights, where it is not the last one (`load_best_model_at_end`)


class RunClock(TrainerCallback):
    """Log the seconds of training, with those before an interruption, and the loss of the last step, for the card."""

    started: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic() - logged_seconds(state.log_history)

    def on_log(self, args, state, control, **kwargs):
        if self.started is not None:
            state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 3)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps

    def on_train_end(self, args, state, control, **kwargs):
        self.started = None


def logged_seconds(log_history: list[dict]) -> float:
    return max((entry.get("seconds", 0.0) for entry in log_history), default=0.0)


def stage_record(name: str, trainer: Trainer) -> StageRecord:
    """Return the record of the stage that a trainer has trained to its end."""
    args, state, config = trainer.args, trainer.state, trainer.model.config
    rows = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else None  # streamed, not counted
    best = None
    if args.load_best_model_at_end and state.best_model_checkpoint:  # the best step may lie between two checkpoints
        best = int(state.best_model_checkpoint.rpartition("-")[2])
    settings = {
        "learning rate": args.learning_rate,
        **_trained_parts(trainer),
        "schedule": args.lr_scheduler_type.value,
        "warm-up": args.warmup_steps,
        "optimiser": args.optim.value,
        "weight decay": args.weight_decay,
        "gradient clipping": args.max_grad_norm,
        "rows": rows,
        "passes over the rows": None if rows is None else round(state.epoch or 0, 3),
        "rows a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": state.global_step,
        "weights of the best step": best,
        "precision": {args.bf16: "bfloat16", args.fp16: "float16"}.get(True, "float32"),
        "seed": args.seed,
        "trained parameters": f"{sum(part.trained for part in trainer.parts):,}",
        "visual tokens an image": config.image_seq_length,
        "neighbours an image": config.memory_top_k or None,
        "memory input": config.memory_input if config.memory_top_k > 0 else None,
        "memory tokens an image": config.num_memory_tokens if config.memory_top_k > 0 else None,
    }
    return StageRecord(
        name=name,
        hyperparameters={setting: value for setting, value in settings.items() if value is not None},
        **curves_of(state.log_history),
        seconds=logged_seconds(state.log_history),
        peak_memory_gb=peak_memory_gb(),
        saved_step=best,
    )


def _trained_parts(trainer: Trainer) -> dict[str, str | float]:
    rates, policies = {}, {}
    for part in trainer.parts:
        name = part.name.replace("_", " ")
        if part.trained:
            policies[f"trains the {name}"] = part.policy
        if part.trained and part.learning_rate != trainer.args.learning_rate:
            rates[f"learning rate of the {name}"] = part.learning_rate
    return rates | policies


def curves_of(log_history: list[dict]) -> dict[str, list[list[float]]]:
    """Return `[step, value]` of all that is plotted, by its name in `StageRecord`."""
    curves = {}
    for curve, name in (("losses", "loss"), ("eval_losses", "eval_loss"), ("learning_rates", "learning_rate")):
        curves[curve] = [[entry["step"], entry[name]] for entry in log_history if name in entry]
    return curves


class Curves(TrainerCallback):
    """Plot training_curves.png in `output_dir` at each evaluation and at the end."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            record = StageRecord("training", {}, seconds=0.0, peak_memory_gb=0.0, **curves_of(state.log_history))
            plot_curves(Path(args.output_dir, CURVES_NAME), [record])

    on_train_end = on_evaluate


def hyperparameters(records: list[StageRecord]) -> dict[str, dict[str, str | int | float]]:
    """Return the settings of each stage by its name, for a model's card, with its minutes and memory."""
    stages = {}
    for record in records:
        stages[record.name] = {**record.hyperparameters, "minutes": f"{record.seconds / 60:.1f}"}
        if record.peak_memory_gb is not None:
            stages[record.name]["peak memory, GB"] = f"{record.peak_memory_gb:.3g}"
    return stages


def write_records(folder: str | os.PathLike, records: list[StageRecord]) -> None:
    """Write the records as training_record.json, and their losses as training_curves.png, beside a checkpoint."""
    plot_curves(Path(folder, CURVES_NAME), records)
    content = json.dumps([asdict(record) for record in records], indent=1)
    save_file(Path(folder, RECORD_NAME), f"{content}\n".encode())


def read_records(folder: str | os.PathLike) -> list[StageRecord]:
    """Return the records of a checkpoint's stages, none if there is no file; ValueError if it holds something else."""
    path = Path(folder, RECORD_NAME)
    if not path.is_file():
        return []
    try:
        return [StageRecord(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of training ({error}). Delete it to do without.") from error


def plot_curves(path: Path, records: list[StageRecord]) -> None:
    """Plot training and evaluation losses, and below them the learning rate, by step; one picture for all stages."""
    figure = Figure(figsize=(5 * len(records) + 1, 5), layout="constrained")
    axes = figure.subplots(2, len(records), squeeze=False, sharex="col", height_ratios=(3, 1))
    named = {}
    for (losses, rates), record in zip(axes.T, records, strict=True):
        for axis, curve, label, color in (
            (losses, record.losses, "training loss", "tab:blue"),
            (losses, record.eval_losses, "evaluation loss", "tab:orange"),
            (rates, record.learning_rates, "learning rate", "tab:gray"),
        ):
            if curve:
                marker = "." if len(curve) < 10 else None
                (named[label],) = axis.plot(*zip(*curve, strict=True), color=color, marker=marker)
            axis.grid(True, alpha=0.3)
        losses.set(title=record.name, ylabel="loss per token")
        rates.set(xlabel="step", ylabel="learning rate")
        mark_whole_steps(rates)
    figure.legend(named.values(), named.keys(), loc="outside right upper")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    save_file(path, picture.getvalue())


def mark_whole_steps(axis: Axes) -> None:
    """Put ticks at whole, round numbers of steps."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def peak_memory_gb() -> float | None:
    """Return the most memory so far, in GB: of the GPU where one is used, else of the process (Linux, macOS)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def hardware(processes: int = 1, use_cpu: bool = False) -> str:
    """Return the names of the accelerators that were used, one a process, or the processor's cores."""
    if torch.cuda.is_available() and not use_cpu:
        return f"{processes} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"{os.cpu_count()} cores of {(names or [platform.machine()])[0].strip()}"


def versions(packages: Sequence[str] = TRAINING_PACKAGES) -> dict[str, str]:
    """Return the versions of the packages that decide what a run does."""
    return {name: importlib.metadata.version(name) for name in packages}


def run_snippet(folder: str | os.PathLike, facts: ModelFacts) -> str:
    """Return what the card's snippet prints in the checkpoint's folder, in a process that can't import this package.

    Raises `RuntimeError`, with the end of its traceback, if it fails.
    """
    script = f'import sys\nsys.modules["tinyalign_vlm"] = None\n{usage_snippet(facts)}'
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"The checkpoint in {folder} does not load without the package:\n{done.stderr[-3000:]}")
    return done.stdout.rstrip()
