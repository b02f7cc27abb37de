"""The state of a demo: its settings, folder and data, and what was found so far, which report and cards tell."""

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from ...modeling_tinyalign import MemoryBank
from ..data.memory_dropout import MemoryDropout
from ..disk import save_file
from ..evaluation.bootstrap import Interval, bootstrap_interval
from .pairs import NUM_KEYWORDS, Pairs

BANKS = ("with", "without")  # the drawings of the held-out concepts
OTHER_BANKS = ("off", "half", "other", "random")  # "off" is none: what memory="off" reads
KEYWORDS_PROMPT = "Which words go with it?"
PROMPT = "What is this?"
TOP_K = 4
NUM_ANSWERED = 32  # queries that are answered in full, to time it


@dataclass
class DemoConfig:
    """Size of the demo's training and evaluation; the defaults are the full run."""

    concepts: int | None = None
    split: str = "test"  # "validation" to choose settings with
    queries: int = 200  # of the held-out concepts
    stage1_steps: int = 20
    stage2_steps: int = 60
    stage2_learning_rate: float = 1e-3  # of adapters
    value_encoder_steps: int = 150
    memory_dropout: float = 0.3  # the default of `tinyalign train`; the bank also lacks 30% of what is trained on
    batch_size: int = 5
    every_row: bool = True  # train more than the baseline and TinyAlign
    seed: int = 0


@dataclass
class Result:
    """Answers of one system with one bank, by question; None where it was not asked or has none.

    Attributes:
        choice: of the questions for keywords, 1 where the right one of four is the likeliest; ties count in part.
        exact_match: of the questions for names, 1 where the answer is the name.
        keyword_losses, keyword_tokens, name_losses, name_tokens: loss of the right answers summed over their tokens,
            and how many they have.
        answers: of the first queries, drawn at random.
        seconds, tokens: of one of these answers, and of its prompt, pictures and memory included.
    """

    choice: np.ndarray | None = None
    exact_match: np.ndarray | None = None
    keyword_losses: np.ndarray | None = None
    keyword_tokens: np.ndarray | None = None
    name_losses: np.ndarray | None = None
    name_tokens: np.ndarray | None = None
    answers: list[str] | None = None
    seconds: float | None = None
    tokens: float | None = None

    def column(self, metric: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return values and weights of `"choice"`, `"keyword_loss"`, `"exact_match"` or `"name_loss"`."""
        columns = {
            "choice": (self.choice, None),
            "keyword_loss": (self.keyword_losses, self.keyword_tokens),
            "exact_match": (self.exact_match, None),
            "name_loss": (self.name_losses, self.name_tokens),
        }
        return columns[metric]


def write_json(path: Path, content) -> None:
    """Write a file whole or not at all: what is there is taken for finished by the next run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(path, f"{json.dumps(content, indent=1, default=np.ndarray.tolist)}\n".encode())


class Clock:
    """Print how long each step took, and add it in `path` to what earlier, interrupted runs took."""

    def __init__(self, path: Path):
        self.path, self.started, self.last = path, time.time(), time.time()
        self.seconds, self.peak_memory_gb = {}, 0.0
        if path.exists():
            vars(self).update(json.loads(path.read_text()))

    def __call__(self, step: str, note: str = ""):
        now = time.time()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self.last
        # Linux counts kilobytes; of all runs so far, an interrupted one may have needed more
        self.peak_memory_gb = max(self.peak_memory_gb, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        self.last = now
        write_json(self.path, {"seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb})
        print(f"[{now - self.started:5.0f} s] {step}{note and ': '}{note}", flush=True)


@dataclass
class Demo:
    """A run of the demo."""

    out: Path  # the folder of all results
    quick: bool
    config: DemoConfig
    pairs: Pairs
    weights: dict[str, Path]
    clock: Clock
    # Of the drawings: "train", "queries", all in each style "noto" and "twemoji", and "other" pictures.
    features: dict[str, np.ndarray] = field(default_factory=dict)
    banks: dict[str, MemoryBank] = field(default_factory=dict)
    concepts: dict[str, np.ndarray] = field(default_factory=dict)  # of a bank's rows: rows of `pairs`
    # Scores and ids of neighbours, (queries, k): of the queries by bank, and of the training drawings, "train",
    # in the bank without the held-out concepts.
    found: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    options: list[list[str] | None] = field(default_factory=list)  # keywords of each query, the right one first
    results: dict[str, dict[str, Result]] = field(default_factory=dict)  # by system and bank

    @property
    def command(self) -> str:
        """The command that makes the results."""
        return f"tinyalign demo{' --quick' if self.quick else ''}"

    @property
    def queried(self) -> np.ndarray:
        """Rows of the held-out concepts that are asked for, drawn at random."""
        return np.sort(np.random.default_rng(self.config.seed).permutation(self.pairs.heldout)[: self.config.queries])

    @property
    def queries(self) -> datasets.Dataset:
        """The drawings that are asked about."""
        return self.pairs.twemoji.select(self.queried).cast_column("image", datasets.Image())

    @property
    def asked(self) -> np.ndarray:
        """The queries that are asked for keywords."""
        return np.flatnonzero([options is not None for options in self.options])

    @property
    def answered(self) -> np.ndarray:
        """The queries that are answered in full, drawn at random."""
        count = len(self.queried)
        return np.random.default_rng(self.config.seed).choice(count, min(NUM_ANSWERED, count), replace=False)

    def labels(self, rows: np.ndarray) -> list[str]:
        return np.array(self.pairs.labels)[rows].tolist()

    def keywords(self, rows: np.ndarray) -> list[str]:
        """Return the answers to the question for keywords; blank where a concept has none."""
        return [", ".join(self.pairs.keywords[row][:NUM_KEYWORDS]) for row in rows]

    def captions(self, queries: str, bank: str | None = None) -> list[list[str]]:
        """Return the names of the neighbours that were found for these queries, in the bank of that name."""
        _, ids = self.found[queries]
        return [[row["caption"] for row in rows] for rows in self.banks[bank or queries].rows(ids[:, :TOP_K])]

    def training_neighbours(self) -> list[np.ndarray]:
        """Return the rows of each training drawing's neighbours that memory dropout leaves, in the bank "without"."""
        dropout = MemoryDropout(self.config.memory_dropout, TOP_K, self.config.seed)
        found = []
        for number, (scores, ids) in enumerate(zip(*self.found["train"], strict=True)):
            left, _ = dropout(ids, scores, str(number), 0)
            found.append(left[left >= 0])
        return found

    def training_captions(self) -> list[list[str]]:
        """Return the names of `training_neighbours`."""
        labels = np.array(self.pairs.labels)[self.concepts["without"]]
        return [labels[ids].tolist() for ids in self.training_neighbours()]

    def is_right(self, concepts: np.ndarray, found: tuple[np.ndarray, np.ndarray], queried: np.ndarray) -> np.ndarray:
        """Return which neighbours show the concept that is asked for, `(queries, k)`; `concepts` are the bank's."""
        return self.pairs.group[concepts[found[1]]] == self.pairs.group[queried][:, None]

    def groups(self, metric: str) -> np.ndarray:
        """Return numbers of the concepts that the questions of a metric are about."""
        group = self.pairs.group[self.queried]
        return group[self.asked] if metric in ("choice", "keyword_loss") else group

    def score(self, system: str, bank: str, metric: str) -> Interval | None:
        """Return a metric with its interval, or None where it was not measured."""
        values, weights = self.results[system].get(bank, Result()).column(metric)
        return None if values is None else bootstrap_interval(values, self.groups(metric), weights)

    def difference(self, system: str, bank: str, metric: str, minus: str) -> Interval | None:
        """Return how much more a system has than another one, on the same questions, with its paired interval. It is
        narrower than what two intervals side by side show, because hard questions are hard for both.
        """
        first, weights = self.results[system][bank].column(metric)
        second, _ = self.results[minus][bank].column(metric)
        if first is None or second is None:
            return None
        return bootstrap_interval(np.subtract(first, second, dtype=np.float64), self.groups(metric), weights)
