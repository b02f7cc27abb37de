"""A section of the report, and the tables and comparisons that sections are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from pooling import Pick, is_less, is_more, mean, score
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
        ahead: controls that are better than TinyAlign, and in what.
    """

    title: str
    claim: str
    body: str
    verdict: str
    ahead: str = ""


def cell(demos: Sequence[Demo], pick: Pick, metric: str, minus: Pick | None = None) -> str:
    """Return a metric or a difference with its interval and, of several seeds, the lowest and the highest."""
    sign = "" if minus is None else "+"
    found = score(demos, pick, metric, minus)
    if found is None or len(demos) == 1:
        return interval_cell(found, sign)
    values = [mean(demo, pick, metric, minus) for demo in demos]
    return f"{interval_cell(found, sign)} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


def scores_table(demos: Sequence[Demo], rows: dict[str, Pick], against: Pick | None = None) -> str:
    """Return a table of the four metrics, of the differences to one row, and which seeds it is of."""
    header = ["", *METRICS.values()]
    if against is not None:
        header += [f"minus the first row: {title}" for title in METRICS.values()]
    lines = []
    for name, pick in rows.items():
        line = [name, *(cell(demos, pick, metric) for metric in METRICS)]
        if against is not None:
            line += ["" if pick is against else cell(demos, pick, metric, against) for metric in METRICS]
        lines.append(line)
    return f"{table(header, lines)}\n\nSeeds: {', '.join(str(demo.config.seed) for demo in demos)}."


def better(demos: Sequence[Demo], pick: Pick, than: Pick) -> dict[str, bool]:
    """Return the metrics in which one is better than another, with an interval off 0, and True if in every seed."""
    found = {}
    for metric, title in METRICS.items():
        difference = score(demos, pick, metric, minus=than)
        is_better, sign = (is_less, -1) if metric in LOSSES else (is_more, 1)
        if is_better(difference):
            found[title] = all(sign * mean(demo, pick, metric, than) > 0 for demo in demos)
    return found


def beats(demos: Sequence[Demo], pick: Pick, than: Pick) -> bool:
    """Tell whether one is better than another in something, in every seed, and worse in nothing, in the mean."""
    return any(better(demos, pick, than).values()) and not better(demos, than, pick)


def versus(demos: Sequence[Demo], pick: Pick, than: Pick) -> str:
    """Say in what one is better than another, and in what worse."""
    return f"better in {said(better(demos, pick, than))}, worse in {said(better(demos, than, pick))}"


def ahead_of(demos: Sequence[Demo], ours: Pick, rivals: dict[str, Pick]) -> str:
    """Say which rivals are better than ours, and in what; nothing where none is."""
    found = {title: better(demos, pick, ours) for title, pick in rivals.items()}
    return "; ".join(f"{title} in {said(names)}" for title, names in found.items() if names)


def said(found: dict[str, bool]) -> str:
    """Name the metrics that `better` found."""
    told = [title if always else f"{title} (not in every seed)" for title, always in found.items()]
    return ", ".join(told) or "nothing"


def demos_of(study: Study, seeds: Sequence[int]) -> list[Demo]:
    return [study.demo(seed) for seed in study.of(seeds)]
