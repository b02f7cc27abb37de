"""A section of the report, and the tables and comparisons that sections are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from pooling import Pick, is_less, is_more, score
from study import Study

from tinyalign_vlm.hub_cards.markdown import table
from tinyalign_vlm.training.demo.report import METRICS, interval_cell
from tinyalign_vlm.training.demo.state import Demo

HOLDS, FAILS, UNTESTED = "holds", "does not hold", "cannot be tested here"
LOSSES = ("keyword_loss", "name_loss")  # fewer is better


@dataclass
class Section:
    """A section of the report.

    Attributes:
        claim: of the paper, with its figure.
        verdict: `HOLDS`, `FAILS` or `UNTESTED`, and why.
    """

    title: str
    claim: str
    body: str
    verdict: str


def scores_table(demos: Sequence[Demo], rows: dict[str, Pick], against: Pick | None = None) -> str:
    """Return a table of the four metrics, and of the differences to one row."""
    header = ["", *METRICS.values()]
    if against is not None:
        header += [f"minus the first row: {title}" for title in METRICS.values()]
    lines = []
    for name, pick in rows.items():
        line = [name, *(interval_cell(score(demos, pick, metric)) for metric in METRICS)]
        if against is not None:
            differences = (score(demos, pick, metric, minus=against) for metric in METRICS)
            line += [""] * len(METRICS) if pick is against else [interval_cell(found, "+") for found in differences]
        lines.append(line)
    return table(header, lines)


def better(demos: Sequence[Demo], pick: Pick, than: Pick) -> list[str]:
    """Return the metrics in which one is better than another, with an interval off 0."""
    found = []
    for metric, title in METRICS.items():
        difference = score(demos, pick, metric, minus=than)
        if is_less(difference) if metric in LOSSES else is_more(difference):
            found.append(title)
    return found


def said(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def demos_of(study: Study, seeds: Sequence[int]) -> list[Demo]:
    return [study.demo(seed) for seed in study.of(seeds)]
