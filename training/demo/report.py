"""The demo's report: tables, the loss curves, and what was retrieved."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ...hub_cards.markdown import table as markdown_table
from ...modeling_tinyalign.outputs import probabilities
from ..bank.calibration import measure, plot_reliability, share_found
from ..evaluation.bootstrap import DRAWS, Interval
from ..hub.run_facts import hardware, mark_whole_steps, read_records, versions
from .state import BANKS, KEYWORDS_PROMPT, PROMPT, TOP_K, Demo

# In the order of the tables.
SYSTEMS = {
    "no_image": "Baseline, the average picture for each",
    "baseline": "Baseline (no memory)",
    "wider_connector": "Baseline, wider connector",
    "copy": "Copy the nearest name, no language model",
    "rule": "Best rule from the names, no training",
    "answer_key": "Nearest row's keywords (reads what no bank says)",
    "random_bank": "TinyAlign, random bank",
    "latents": "Latents alone (the paper's way)",
    "tinyalign": "**TinyAlign**",
    "text_cut": "Text-only RAG, cut at 32 tokens",
    "text_rag": "Text-only RAG, whole",
    "true_name": "Text-only RAG given the true name",
}
# Systems that are trained: the colours of their curves.
COLORS = {
    "baseline": "tab:gray",
    "wider_connector": "tab:olive",
    "latents": "tab:green",
    "text_rag": "tab:orange",
    "tinyalign": "tab:blue",
}
METRICS = {
    "choice": "keywords: right one of four",
    "keyword_loss": "keywords: loss per token",
    "exact_match": "name: exact match",
    "name_loss": "name: loss per token",
}
BANK_TITLES = {
    "with": "all held-out concepts",
    "half": "half of them",
    "without": "none of them",
    "off": 'memory="off"',
    "other": "none, other pictures: characters of a font",
    "random": "all of them, under wrong keys",
}
TEMPLATE = Path(__file__).with_name("report.md")


def interval_cell(found: Interval | None, sign: str = "") -> str:
    """Return an interval as a cell of a table, a dash for what was not measured."""
    return "-" if found is None else f"{found:{sign}.3f}"


def measured(demo: Demo, system: str, bank: str) -> dict[str, list[float]]:
    """Return a system's metrics with one bank, each as value, low and high; none that were not measured."""
    scores = {metric: demo.score(system, bank, metric) for metric in METRICS}
    return {metric: list(score) for metric, score in scores.items() if score is not None}


def question_table(demo: Demo, metrics: tuple[str, str], titles: tuple[str, str]) -> str:
    """Return the table of one question: two metrics with both banks, and what TinyAlign has more."""
    has_it, lacks_it = BANKS
    header = [""]
    for title in titles:
        header += [f"{title}, has it", "lacks it"]
    header += [f"TinyAlign minus this, has it: {title}" for title in titles]
    rows = []
    for system, name in SYSTEMS.items():
        if system not in demo.results or all(demo.score(system, has_it, metric) is None for metric in metrics):
            continue
        row = [name]
        for metric in metrics:
            row += [interval_cell(demo.score(system, bank, metric)) for bank in (has_it, lacks_it)]
        others = () if system == "tinyalign" else metrics
        row += [interval_cell(demo.difference("tinyalign", has_it, metric, minus=system), "+") for metric in others]
        row += [""] * (len(header) - len(row))
        rows.append(row)
    return markdown_table(header, rows)


def bank_table(demo: Demo) -> str:
    """Return TinyAlign's scores with all banks."""
    rows = []
    for bank, title in BANK_TITLES.items():
        if bank in demo.results["tinyalign"]:
            rows.append([title, *(interval_cell(demo.score("tinyalign", bank, metric)) for metric in METRICS)])
    return markdown_table(["the bank has", *METRICS.values()], rows)


def cost_table(demo: Demo) -> str:
    """Return tokens and seconds of an answer, and the seconds of training."""
    rows = []
    for system, name in SYSTEMS.items():
        result = demo.results.get(system, {}).get("with")
        if result is None or result.seconds is None:
            continue
        records = read_records(demo.out / system / "model")
        trained = f"{sum(record.seconds for record in records):.0f}" if records else "-"
        rows.append([name, f"{result.tokens:.0f}", f"{result.seconds:.3f}", trained])
    return markdown_table(["", "tokens", "s per answer", "s of training"], rows)


def probability_table(demo: Demo) -> str:
    """Return how well the bank knows what it knows, and plot it as reliability.png."""
    bank, found = demo.banks["with"], demo.found["with"]
    calibration = bank.config.calibration
    if calibration is None:
        return "(none were fitted)"
    right = demo.is_right(demo.concepts["with"], found, demo.queried)
    numbers, curves = measure(calibration, found[0], right)
    plot_reliability(demo.out / "reliability.png", curves)
    queries = bank.encode_queries(torch.from_numpy(demo.features["other"]))
    none = [
        probabilities(calibration, scores)[1].numpy()
        for scores in (torch.from_numpy(found[0][:, :TOP_K]), bank.search(queries, TOP_K)[0])
    ]
    has_right = right[:, :TOP_K].any(axis=1)
    numbers["pictures of another kind: found at 5% false alarms"] = share_found(none[0][has_right], none[1])
    return markdown_table(["", ""], [[name, f"{number:.3f}"] for name, number in numbers.items()])


def plot_losses(demo: Demo) -> None:
    """Plot the training losses of the systems in both stages, as loss.png."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for system, color in COLORS.items():
        for axis, record in zip(axes, read_records(demo.out / system / "model"), strict=False):
            steps, values = np.array(record.losses).T
            width = 2.5 if system == "tinyalign" else 1.2
            axis.plot(steps, values, color=color, linewidth=width, label=SYSTEMS[system].strip("*"))
            axis.set(title=record.name, xlabel=f"step (a point is the mean of {steps[0]:.0f})")
    for axis in axes:
        mark_whole_steps(axis)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training loss per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(demo.out / "loss.png", dpi=110)


def plot_neighbours(demo: Demo) -> None:
    """Plot eight queries with their three nearest bank rows and two models' answers, as neighbours.png."""
    bank, queries, (scores, ids) = demo.banks["with"], demo.queries, demo.found["with"]
    answers = {"baseline": demo.results["baseline"], "TinyAlign": demo.results["tinyalign"]}
    rows = demo.answered[:8].tolist()
    figure = Figure(figsize=(11, 1.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 5, width_ratios=[1, 1, 1, 1, 2.6], squeeze=False)
    for number, (line, row) in enumerate(zip(axes, rows, strict=True)):
        truth = queries[row]["label"]
        line[0].imshow(queries[row]["image"])
        line[0].set_title("asked about", fontsize=8)
        for axis, index, similarity in zip(line[1:4], ids[row], scores[row], strict=False):
            name = bank.rows([int(index)])[0]["caption"]
            shown = name if len(name) < 26 else name[:24] + "…"
            axis.imshow(bank.thumbnail(int(index)))
            axis.set_title(f"{shown}\nsimilarity {similarity:.2f}", fontsize=8)
        for axis in line:
            axis.axis("off")
        line[4].text(0, 0.8, f"true name: {truth[:44]}", color="black", fontsize=9, va="center")
        for height, (title, results) in zip((0.45, 0.1), answers.items(), strict=True):
            answer = results["with"].answers[number]
            color, sign = ("tab:green", "✓") if answer == truth else ("tab:red", "✗")
            line[4].text(0, height, f"{title}: {answer[:44]} {sign}", color=color, fontsize=9, va="center")
    figure.savefig(demo.out / "neighbours.png", dpi=110)


def write_demo_report(demo: Demo, answer: str, label: str) -> None:
    """Write `report.md`, `results.json`, `loss.png` and `neighbours.png`.

    Args:
        answer: to the first query shown, whose true name is the label, in a new process.
    """
    plot_losses(demo)
    plot_neighbours(demo)
    summaries = {}
    for system, banks in demo.results.items():
        summaries[system] = {bank: measured(demo, system, bank) for bank in banks}
    record = {"config": asdict(demo.config), "summaries": summaries, "seconds": demo.clock.seconds}
    (demo.out / "results.json").write_text(json.dumps(record, indent=1))
    tables = {
        "keywords": question_table(demo, ("choice", "keyword_loss"), ("right one of four", "loss per token")),
        "names": question_table(demo, ("exact_match", "name_loss"), ("exact match", "loss per token")),
        "banks": bank_table(demo),
        "cost": cost_table(demo),
        "probabilities": probability_table(demo),
    }
    text = TEMPLATE.read_text(encoding="utf-8").format(
        quick=" (quick run: too short to compare systems)" if demo.quick else "",
        queries=len(demo.queried),
        asked=len(demo.asked),
        known=len(demo.pairs.known),
        train=len(demo.pairs.train),
        validation=len(demo.pairs.validation),
        prompts=(KEYWORDS_PROMPT, PROMPT),
        draws=DRAWS,
        config=demo.config,
        tables=tables,
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
