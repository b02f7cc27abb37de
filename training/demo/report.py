"""The demo's report: a table, the loss curves, and what was retrieved."""

import json
from pathlib import Path

import datasets
import numpy as np
from matplotlib.figure import Figure

from ...modeling_tinyalign.memory_bank import MemoryBank
from ..evaluation.answers import Evaluation, bootstrap_interval
from ..hub.run_facts import hardware, read_records, versions

SYSTEMS = {
    "baseline": "Baseline (no memory)",
    "random_bank": "TinyAlign, random bank",
    "tinyalign": "**TinyAlign**",
    "text_rag": "Text-only RAG (ceiling)",
}
METRICS = {
    "loss_per_token": ("loss per token", "{:.3f}"),
    "token_accuracy": ("token accuracy", "{:.3f}"),
    "exact_match": ("exact match", "{:.3f}"),
    "seconds_per_answer": ("s per answer", "{:.3f}"),
}
COLORS = {"baseline": "tab:gray", "text_rag": "tab:orange", "tinyalign": "tab:blue"}


def table(results: dict[str, Evaluation], nearest: list[list[str]]) -> str:
    """One bank's rows, in Markdown; values with their 95% bootstrap intervals."""
    lines = ["| | " + " | ".join(name for name, _ in METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for system, title in SYSTEMS.items():
        summary = results[system].summary()
        cells = [
            form.format(summary[metric][0]) + _interval(form, summary[metric]) for metric, (_, form) in METRICS.items()
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    summary = copied(results["baseline"].references, nearest)
    lines.append(f"| Copy the nearest label, no LM | - | - | {summary[0]:.3f}{_interval('{:.3f}', summary)} | - |")
    return "\n".join(lines)


def copied(references: list[str], nearest: list[list[str]]) -> tuple[float, float, float]:
    """Exact match of the nearest row's caption, without a language model, and its interval."""
    right = np.array([row[0] == reference for row, reference in zip(nearest, references, strict=True)])
    return (right.mean(), *bootstrap_interval(right))


def recovered(results: dict[str, Evaluation]) -> float:
    """Share of text-only RAG's gain in loss over the baseline that TinyAlign has too."""
    loss = {name: result.losses.sum() / result.num_tokens.sum() for name, result in results.items()}
    return (loss["baseline"] - loss["tinyalign"]) / (loss["baseline"] - loss["text_rag"])


def plot_losses(out: Path):
    """Training losses of the three systems in both stages, to loss.png."""
    figure = Figure(figsize=(10, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    records = {system: read_records(out / system / "model") for system in COLORS}
    for stage, axis in enumerate(axes):
        for system, color in COLORS.items():
            steps, values = np.array(records[system][stage].losses).T
            axis.plot(steps, values, color=color, alpha=0.25)
            width = min(5, len(values))
            smooth = np.convolve(np.pad(values, (width - 1, 0), "edge"), np.ones(width) / width, "valid")
            axis.plot(steps, smooth, color=color, label=SYSTEMS[system].strip("*"))
        axis.set(title=records[system][stage].name, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training loss per token")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)


def plot_neighbours(
    out: Path,
    bank: MemoryBank,
    ids: np.ndarray,
    queries: datasets.Dataset,
    results: dict[str, Evaluation],
    rows: list[int],
):
    """Queries with their three nearest bank rows and both models' answers, to neighbours.png."""
    figure = Figure(figsize=(11, 1.35 * len(rows)))
    axes = figure.subplots(len(rows), 5, width_ratios=[1, 1, 1, 1, 2.6])
    for line, row in zip(axes, rows, strict=True):
        pictures = [queries[row]["image"], *(bank.thumbnail(int(index)) for index in ids[row][:3])]
        names = ["query", *(bank.rows([int(index)])[0]["caption"] for index in ids[row][:3])]
        for axis, picture, name in zip(line, pictures, names, strict=False):
            axis.imshow(picture)
            axis.set_title(name if len(name) < 26 else name[:24] + "…", fontsize=7)
            axis.axis("off")
        line[4].axis("off")
        truth = results["baseline"].references[row]
        for height, title, answer in (
            (0.8, "true label", truth),
            (0.45, "baseline", results["baseline"].answers[row]),
            (0.1, "TinyAlign", results["tinyalign"].answers[row]),
        ):
            color = "black" if title == "true label" else "tab:green" if answer == truth else "tab:red"
            line[4].text(0, height, f"{title}: {answer[:44]}", color=color, fontsize=9, va="center")
    figure.tight_layout()
    figure.savefig(out / "neighbours.png", dpi=110)


def write_report(
    out: Path,
    config: dict,
    quick: bool,
    results: dict[str, dict[str, Evaluation]],
    nearest: dict[str, list[list[str]]],
    neighbour_ids: np.ndarray,
    bank: MemoryBank,
    queries: datasets.Dataset,
    shown: list[int],
    seconds: dict[str, float],
    peak_memory_gb: float,
    fresh_process: tuple[str, str],
):
    """Writes `report.md`, `results.json`, `loss.png` and `neighbours.png` into `out`."""
    by_bank = {name: {system: banks[name] for system, banks in results.items()} for name in ("without", "with")}
    plot_losses(out)
    plot_neighbours(out, bank, neighbour_ids, queries, by_bank["with"], shown)
    summaries = {
        name: {system: result.summary() for system, result in systems.items()} for name, systems in by_bank.items()
    }
    record = {"config": config, "summaries": summaries, "seconds": seconds}
    (out / "results.json").write_text(json.dumps(record, indent=1))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    steps = "\n".join(f"| {step} | {value:.0f} |" for step, value in seconds.items())
    text = f"""# TinyAlign demo{" (quick run: too short to mean anything)" if quick else ""}

{len(queries)} Twemoji drawings of concepts that were never trained on are to be named. The bank holds Noto drawings
with their labels. All systems had the same seed ({config["seed"]}), {config["stage1_steps"]} steps of stage 1 and
{config["stage2_steps"]} of stage 2, {config["batch_size"]} drawings a step. Brackets are 95% bootstrap intervals over
the queries; it is one training run each. Answers come in batches of 32, from cached visual features and neighbours
looked up beforehand; their seconds are without those two.

## The bank has the held-out concepts' Noto drawings, added after training

{table(by_bank["with"], nearest["with"])}

TinyAlign has {recovered(by_bank["with"]):.0%} of text-only RAG's gain in loss over the baseline.

## The bank lacks the held-out concepts

{table(by_bank["without"], nearest["without"])}

## Training loss

![Training loss](loss.png)

## Eight queries, drawn at random

![Queries, neighbours, answers](neighbours.png)

## How it was run

Command: `tinyalign demo{" --quick" if quick else ""}`. Machine: {hardware()};
peak memory of the process {peak_memory_gb:.1f} GB; {packages}.

A new process without the package answered "{fresh_process[0]}" to the first query above, a drawing of
"{fresh_process[1]}".

| step | seconds |
|---|---|
{steps}
| together | {sum(seconds.values()):.0f} |
"""
    (out / "report.md").write_text(text)


def _interval(form: str, summary: tuple[float, float, float]) -> str:
    return f" [{form.format(summary[1])}, {form.format(summary[2])}]"
