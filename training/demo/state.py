"""The state of a demo: its settings, folder and data, and what was found so far, which report and cards tell."""

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from ...modeling_tinyalign import MemoryBank
from ..disk import save_file
from ..evaluation.answers import Evaluation
from .pairs import Pairs

BANKS = ("without", "with")  # the drawings of the held-out concepts
PROMPT = "What is this?"
TOP_K = 4


@dataclass
class DemoConfig:
    """Size of the demo's training and evaluation; the defaults are the full run."""

    concepts: int | None = None
    stage1_steps: int = 100
    stage2_steps: int = 120
    stage2_learning_rate: float = 1e-4  # more than the default 2e-5: these are few steps
    memory_dropout: float = 0.0
    memory_scores: bool = False
    batch_size: int = 10
    seed: int = 0


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
    features: dict[str, np.ndarray] = field(default_factory=dict)  # of the query drawings, "train" and "heldout"
    banks: dict[str, MemoryBank] = field(default_factory=dict)
    shuffled: dict[str, MemoryBank] = field(default_factory=dict)  # with keys that lead to other rows
    # Scores and ids of neighbours, (queries, k): of the held-out queries by bank ("with", "shuffled_with", ...), and
    # "train" in the bank without the held-out concepts.
    found: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    results: dict[str, dict[str, Evaluation]] = field(default_factory=dict)  # by system and bank

    @property
    def command(self) -> str:
        return f"tinyalign demo{' --quick' if self.quick else ''}"

    @property
    def queries(self) -> datasets.Dataset:
        """The held-out drawings."""
        return self.pairs.twemoji.select(self.pairs.heldout).cast_column("image", datasets.Image())

    @property
    def shown(self) -> list[int]:
        """Eight queries, drawn at random."""
        count = len(self.pairs.heldout)
        return np.random.default_rng(self.config.seed).choice(count, min(8, count), replace=False).tolist()

    @property
    def nearest(self) -> dict[str, list[list[str]]]:
        """Captions of the held-out queries' neighbours, by bank."""
        return {name: self.captions(name, name) for name in BANKS}

    def labels(self, rows: np.ndarray) -> list[str]:
        return np.array(self.pairs.labels)[rows].tolist()

    def captions(self, bank: str, queries: str) -> list[list[str]]:
        """Return the captions of the neighbours that were found for these queries in a bank."""
        _, ids = self.found[queries]
        return [[row["caption"] for row in rows] for rows in self.banks[bank].rows(ids[:, :TOP_K])]
