"""The report's plots."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from alignment import SYSTEMS, Clouds, LossCurve
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from pooling import result_of, score

from tinyalign_vlm.training.demo.report import COLORS, METRICS
from tinyalign_vlm.training.demo.state import Demo

MARKERS = {"baseline": "s", "tinyalign": "o"}  # colours alone do not print
LINES = {"baseline": "--", "tinyalign": "-", "text_rag": ":"}
SHOWN_KINDS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects")


def loss_curves(curves: dict[int, dict[str, list[LossCurve]]], path: Path) -> None:
    """Plot the training losses of both stages: the mean of the seeds, and from the lowest to the highest."""
    figure = Figure(figsize=(11, 3.6))
    for axis, stage in zip(figure.subplots(1, 2, sharey=True), range(2), strict=True):
        for system in SYSTEMS:
            found = [seed[system][stage] for seed in curves.values()]
            losses = np.array([curve.losses for curve in found])
            axis.plot(found[0].steps, losses.mean(0), LINES[system], color=COLORS[system], label=system)
            axis.fill_between(found[0].steps, losses.min(0), losses.max(0), color=COLORS[system], alpha=0.15)
        axis.set(title=f"Stage {stage + 1}", xlabel="step", ylabel="training loss per token")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    title = f"mean of {len(curves)} seeds,\nband: all seeds" if len(curves) > 1 else "one seed"
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), title=title)
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
            axis.scatter(*pictures[chosen].T, s=12, color=f"C{number}", label=f"pictures: {kind}")
        axis.scatter(*pictures[~np.isin(both.kinds, SHOWN_KINDS)].T, s=6, color="lightgray", label="pictures: others")
        axis.set(title=title, xticks=[], yticks=[], xlabel=f"gap {both.gap:.2f}, spread {both.spread:.2f}")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def data_efficiency(demos: Sequence[Demo], names: dict[tuple[str, float, str], str], path: Path) -> None:
    """Plot the four metrics by the share of the training data, with 95% intervals."""
    figure = Figure(figsize=(15, 6.5))
    grid = figure.subplots(2, len(METRICS), sharex=True)
    for line, plan in zip(grid, sorted({plan for plan, _, _ in names}), strict=True):
        for axis, (metric, title) in zip(line, METRICS.items(), strict=True):
            for system, marker in MARKERS.items():
                shares = [share for plan_, share, system_ in names if (plan_, system_) == (plan, system)]
                found = [score(demos, result_of(names[plan, share, system], "with"), metric) for share in shares]
                values = np.array(found)
                errors = np.abs(values[:, 1:] - values[:, :1]).T
                style = {"marker": marker, "color": COLORS[system], "linestyle": LINES[system], "capsize": 2}
                axis.errorbar(shares, values[:, 0], errors, label=system, **style)
            axis.set(title=f"{title}, equal {'epochs' if plan == 'epoch' else 'steps'}")
            axis.xaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(alpha=0.3)
    for axis in grid[-1]:
        axis.set_xlabel("share of the training concepts")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
