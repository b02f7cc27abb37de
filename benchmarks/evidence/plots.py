"""The report's plots."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from alignment import SYSTEMS, Clouds, LossCurve
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from pooling import Pick, result_of, score

from tinyalign_vlm.training.demo.report import COLORS, METRICS
from tinyalign_vlm.training.demo.state import Demo

TITLES = {
    "baseline": "baseline",
    "tinyalign": "TinyAlign",
    "latents": "latents alone, the paper's way",
    "text_rag": "text-only RAG",
}
MARKERS = {"baseline": "s", "tinyalign": "o"}  # colours alone do not print
LINES = {"baseline": "--", "tinyalign": "-", "latents": "-.", "text_rag": ":"}
KIND_MARKERS = "os^D"
SHOWN_KINDS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects")


def loss_curves(curves: dict[int, dict[str, list[LossCurve]]], path: Path) -> None:
    """Plot the training losses of both stages: the mean of the seeds, and from the lowest to the highest."""
    figure = Figure(figsize=(11, 6.6))
    for line, unit in zip(figure.subplots(2, 2, sharey="col"), ("step", "seconds, mean of the seeds"), strict=True):
        for stage, axis in enumerate(line):
            for system in SYSTEMS:
                found = [seed[system][stage] for seed in curves.values()]
                losses, steps = np.array([curve.losses for curve in found]), found[0].steps
                seconds = np.mean([curve.seconds for curve in found])
                places = steps if unit == "step" else steps / steps[-1] * seconds
                axis.plot(places, losses.mean(0), LINES[system], color=COLORS[system], label=TITLES[system])
                axis.fill_between(places, losses.min(0), losses.max(0), color=COLORS[system], alpha=0.15)
            title = f"Stage {stage + 1}, a point is the mean of {steps[1] - steps[0]:.0f} steps"
            axis.set(title=title, xlabel=unit, ylabel="training loss per token")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
    title = f"mean of {len(curves)} seeds,\nband: all seeds" if len(curves) > 1 else "one seed"
    line[-1].legend(loc="lower left", bbox_to_anchor=(1.02, 0.5), title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def clouds(found: dict[str, Clouds], path: Path) -> None:
    """Plot pictures and names by UMAP, one system beside the other."""
    from umap import UMAP  # of umap-learn, which no other section needs

    figure = Figure(figsize=(4 * len(found), 4))
    for axis, (title, both) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        vectors = np.concatenate([both.pictures, both.names])
        pictures, names = np.split(UMAP(metric="cosine", random_state=0).fit_transform(vectors), 2)
        axis.scatter(*names.T, s=10, marker="x", color="black", linewidth=0.7, label="names")
        for number, kind in enumerate(SHOWN_KINDS):
            chosen = both.kinds == kind
            marks = {"marker": KIND_MARKERS[number], "color": f"C{number}"}  # colours alone do not print
            axis.scatter(*pictures[chosen].T, s=12, **marks, label=f"pictures: {kind}")
        axis.scatter(*pictures[~np.isin(both.kinds, SHOWN_KINDS)].T, s=6, color="lightgray", label="pictures: others")
        axis.set(title=title, xticks=[], yticks=[], xlabel=f"gap {both.gap:.2f}, spread {both.spread:.2f}")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), title="one seed, distances between\ngroups mean little")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def bank_sizes(
    demos: Sequence[Demo], banks: dict[float, str], recalls: dict[str, float], scores: dict[str, Pick], path: Path
) -> None:
    """Plot right answers and recall by the share of the bank's rows that are left, with 95% intervals."""
    figure = Figure(figsize=(6.5, 3.6))
    axis = figure.subplots()
    shares = list(banks)
    axis.plot(
        shares, [recalls[name] for name in banks.values()], "k:", marker="x", label="recall among four neighbours"
    )
    for metric, marker in (("exact_match", "o"), ("choice", "s")):
        values = np.array([score(demos, scores[name], metric) for name in banks.values()])
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        axis.errorbar(shares, values[:, 0], errors, marker=marker, capsize=2, label=METRICS[metric])
    axis.set(xlabel="share of the bank's rows", ylabel="share of the questions", ylim=(0, 1))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def data_efficiency(demos: Sequence[Demo], names: dict[tuple[str, float, str], str], path: Path) -> None:
    """Plot the four metrics by the share of the training data, with 95% intervals."""
    plans = sorted({plan for plan, _, _ in names})
    figure = Figure(figsize=(16, 3.4 * len(plans)))
    grid = figure.subplots(len(plans), len(METRICS), sharex=True, squeeze=False)
    for line, plan in zip(grid, plans, strict=True):
        for axis, (metric, title) in zip(line, METRICS.items(), strict=True):
            for aside, (system, marker) in enumerate(MARKERS.items()):  # or one's bars hide the other's
                shares = [share for plan_, share, system_ in names if (plan_, system_) == (plan, system)]
                found = [score(demos, result_of(names[plan, share, system], "with"), metric) for share in shares]
                values = np.array(found)
                errors = np.abs(values[:, 1:] - values[:, :1]).T
                style = {"marker": marker, "color": COLORS[system], "linestyle": LINES[system], "capsize": 2}
                axis.errorbar(np.array(shares) + aside / 100, values[:, 0], errors, label=TITLES[system], **style)
            axis.set(title=f"{title}\nequal {'epochs' if plan == 'epoch' else 'steps'}", ylabel=title.split(": ")[1])
            axis.xaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(alpha=0.3)
    for axis in grid[-1]:
        axis.set_xlabel("share of the training concepts")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
