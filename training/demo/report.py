"""The demo's report: a table, the loss curves, and what was retrieved."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ...hub_cards.markdown import table as markdown_table
from ..evaluation.answers import Evaluation
from ..evaluation.bootstrap import interval
from ..hub.run_facts import hardware, read_records, versions
from .state import Demo

SYSTEMS = {
    "baseline": "Baseline (no memory)",
    "random_bank": "TinyAlign, random bank",
    "tinyalign": "**TinyAlign**",
    "text_rag": "Text-only RAG (ceiling)",
}
METRICS = {
    "loss_per_token": "loss per token",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "seconds_per_answer": "s per answer",
}
REPORT = """# TinyAlign demo{quick}

{queries} Twemoji drawings of concepts that were never trained on are to be named. The bank holds Noto drawings
with their labels. All systems had the same seed ({config.seed}), {config.stage1_steps} steps of stage 1 and
{config.stage2_steps} of stage 2, {config.batch_size} drawings a step. Brackets are 95% bootstrap intervals over
the queries; it is one training run each. Answers come in batches of 32, from cached visual features and neighbours
looked up beforehand; their seconds are without those two.

## The bank has the held-out concepts' Noto drawings, added after training

{tables[with]}

TinyAlign has {recovered:.0%} of text-only RAG's gain in loss over the baseline.

## The bank lacks the held-out concepts

{tables[without]}

## Training loss

![Training loss](loss.png)

## Eight queries, drawn at random

![Queries, neighbours, answers](neighbours.png)

## How it was run

Command: `{command}`. Machine: {machine};
peak memory of the process {memory:.1f} GB; {packages}.

A new process without the package answered "{answer}" to the first query above, a drawing of
"{label}".

| step | seconds |
|---|---|
{steps}
| together | {seconds:.0f} |
"""
COLORS = {"baseline": "tab:gray", "text_rag": "tab:orange", "tinyalign": "tab:blue"}


def table(results: dict[str, Evaluation], nearest: list[list[str]]) -> str:
    """Return one bank's rows, in Markdown; values with their 95% bootstrap intervals."""
    rows = []
    for system, title in SYSTEMS.items():
        summary = results[system].summary()
        rows.append([title, *(_cell(*summary[metric]) for metric in METRICS)])
    exact_match = _cell(*copied(results["baseline"].references, nearest))
    rows.append(["Copy the nearest label, no LM", "-", "-", exact_match, "-"])
    return markdown_table(["", *METRICS.values()], rows)


def copied(references: list[str], nearest: list[list[str]]) -> tuple[float, float, float]:
    """Return the exact match of the nearest row's caption, without a language model, and its interval."""
    right = np.array([row[0] == reference for row, reference in zip(nearest, references, strict=True)])
    return interval(right)


def recovered(results: dict[str, Evaluation]) -> float:
    """Return the share of text-only RAG's gain in loss over the baseline that TinyAlign has too."""
    loss = {name: result.losses.sum() / result.num_tokens.sum() for name, result in results.items()}
    return (loss["baseline"] - loss["tinyalign"]) / (loss["baseline"] - loss["text_rag"])


def plot_losses(out: Path):
    """Plot the training losses of the three systems in both stages, as loss.png."""
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


def plot_neighbours(demo: Demo) -> None:
    """Plot some queries with their three nearest bank rows and both models' answers, as neighbours.png."""
    bank, queries, (_, ids), rows = demo.banks["with"], demo.queries, demo.found["with"], demo.shown
    results = {system: demo.results[system]["with"] for system in ("baseline", "tinyalign")}
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
        answers = {"baseline": results["baseline"].answers[row], "TinyAlign": results["tinyalign"].answers[row]}
        line[4].text(0, 0.8, f"true label: {truth[:44]}", color="black", fontsize=9, va="center")
        for height, (title, answer) in zip((0.45, 0.1), answers.items(), strict=True):
            color = "tab:green" if answer == truth else "tab:red"
            line[4].text(0, height, f"{title}: {answer[:44]}", color=color, fontsize=9, va="center")
    figure.tight_layout()
    figure.savefig(demo.out / "neighbours.png", dpi=110)


def write_report(demo: Demo, answer: str, label: str) -> None:
    """Write `report.md`, `results.json`, `loss.png` and `neighbours.png`.

    Args:
        answer: to the first query shown, whose true name is the label, in a new process.
    """
    by_bank = {name: {system: banks[name] for system, banks in demo.results.items()} for name in ("without", "with")}
    plot_losses(demo.out)
    plot_neighbours(demo)
    summaries = {
        name: {system: result.summary() for system, result in systems.items()} for name, systems in by_bank.items()
    }
    record = {"config": asdict(demo.config), "summaries": summaries, "seconds": demo.clock.seconds}
    (demo.out / "results.json").write_text(json.dumps(record, indent=1))
    tables = {name: table(results, demo.nearest[name]) for name, results in by_bank.items()}
    text = REPORT.format(
        quick=" (quick run: too short to mean anything)" if demo.quick else "",
        queries=len(demo.queries),
        config=demo.config,
        tables=tables,
        recovered=recovered(by_bank["with"]),
        command=demo.command,
        machine=hardware(),
        memory=demo.clock.peak_memory_gb,
        packages=", ".join(f"{name} {version}" for name, version in versions().items()),
        answer=answer,
        label=label,
        steps="\n".join(f"| {step} | {value:.0f} |" for step, value in demo.clock.seconds.items()),
        seconds=sum(demo.clock.seconds.values()),
    )
    (demo.out / "report.md").write_text(text)


def _cell(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
