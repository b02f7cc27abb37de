"""The study's runs: one demo a seed, whose systems and evaluations are kept, and views of it that ask other things."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, ProcessorMixin

from tinyalign_vlm.modeling_tinyalign import MemoryBank
from tinyalign_vlm.training.data.neighbours import find_neighbours
from tinyalign_vlm.training.demo import run, systems
from tinyalign_vlm.training.demo.pairs import load_pairs, options_of
from tinyalign_vlm.training.demo.state import BANKS, TOP_K, Clock, Demo, DemoConfig, Result

SEEDS = (0, 1, 2)
NUM_OTHERS = 100  # concepts that no bank has and nothing was trained on
# What a finished demo has that a study's seed 0 would make again.
MADE = ("baseline", "wider_connector", "text_rag", "latents", "tinyalign")
MADE_BANKS = ("bank_with_heldout", "bank_without_heldout", "bank_half", "bank_latents_with", "bank_latents_without")


@dataclass
class Study:
    """All runs of a study in one folder. What is finished there is not run again.

    Attributes:
        out: the folder.
        finished: folder of a finished `tinyalign demo`, whose weights are used; it is seed 0, too.
        seeds: concept splits, connectors and orders of data.
        lesson: folder of another lesson.json to teach and ask; None for the one that is made of the drawings.
        openclipart: folder of Debian's openclipart packages, which may be missing.
    """

    out: Path
    finished: Path
    seeds: Sequence[int] = SEEDS
    lesson: Path | None = None
    openclipart: Path = Path("/usr/share/openclipart")
    demos: dict[int, Demo] = field(default_factory=dict)
    recalls: dict[int, dict[str, float]] = field(default_factory=dict)  # by seed and bank, for three sections

    @property
    def weights(self) -> dict[str, Path]:
        """The checkpoints of the vision tower and the language model."""
        folder = self.finished / "weights"
        return {"vision": folder / "efficientnet-lite0", "text": folder / "smollm2-135m-instruct"}

    def of(self, seeds: Sequence[int]) -> list[int]:
        """Return those of these seeds that are asked for, or else the first that is."""
        return [seed for seed in seeds if seed in self.seeds] or list(self.seeds[:1])

    def demo(self, seed: int) -> Demo:
        """Return the demo of a seed with all rows of its table, trained and evaluated."""
        if seed not in self.demos:
            demo = self.prepared(seed)
            run.run_without_memory(demo)
            run.run_with_memory(demo)
            self.demos[seed] = demo
        return self.demos[seed]

    def prepared(self, seed: int) -> Demo:
        """Return the demo of a seed with features, banks, neighbours and rules without training."""
        config, folder = DemoConfig(seed=seed), self.out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        shared = self.out.resolve() / "features"  # the pictures are the same for all seeds
        shared.mkdir(exist_ok=True)
        if not (folder / "features").is_symlink():
            (folder / "features").symlink_to(shared)
        run.check_settings(folder / "config.json", config)
        if config == DemoConfig() and not (folder / "evaluation").exists():
            take_over(self.finished, folder)
        demo = Demo(folder, False, config, load_pairs(seed), self.weights, Clock(folder / "clock.json"))
        run.prepare_demo(demo)
        return demo


def tag(*constants) -> str:
    """Return a short name of constants, for results that are kept: with other constants they are found anew."""
    return hashlib.sha256(repr(constants).encode()).hexdigest()[:6]


def take_over(finished: Path, folder: Path) -> None:
    """Take what a finished demo has for its seed: systems and banks are linked, evaluations copied."""
    run.check_settings(finished / "config.json", DemoConfig())
    for name in (*MADE, *MADE_BANKS):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to((finished / name).resolve())
    partial = folder / "evaluation.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(finished / "evaluation", partial)
    partial.rename(folder / "evaluation")


def asking_about(demo: Demo, concepts: np.ndarray, name: str) -> Demo:
    """Return a view of a demo that asks about the first drawings of other concepts, with the same banks."""
    config = replace(demo.config, queries=NUM_OTHERS)
    view = replace(
        demo,
        out=demo.out / f"{name}_{NUM_OTHERS}",
        config=config,
        pairs=replace(demo.pairs, heldout=concepts),
        features=dict(demo.features),
        banks=dict(demo.banks),
        found=dict(demo.found),
        results={},
    )
    view.features["queries"] = demo.features["twemoji"][view.queried]
    for bank in ("with", "without"):
        add_bank(view, bank, demo.banks[bank], demo.concepts[bank])
    rng = np.random.default_rng(config.seed)
    near = view.concepts["without"][view.found["without"][1]]
    view.options = [options_of(view.pairs, *query, rng) for query in zip(view.queried, near, strict=True)]
    return view


def add_bank(demo: Demo, name: str, bank: MemoryBank, concepts: np.ndarray, top_k: int = run.SEARCHED) -> None:
    """Let a demo's queries be answered with another bank; `concepts` are its rows' (-1: of no emoji)."""
    model, _ = systems.compose_demo(demo.weights, demo.config, memory_top_k=TOP_K)
    demo.banks[name], demo.concepts[name] = bank, concepts
    demo.found[name] = find_neighbours(bank, model, demo.features["queries"], min(top_k, len(bank)))


def training_on(demo: Demo, rows: np.ndarray, **config) -> Demo:
    """Return a view of a demo that trains on some of its training drawings, with other settings of training."""
    scores, ids = demo.found["train"]
    return replace(
        demo,
        config=replace(demo.config, **config),
        pairs=replace(demo.pairs, train=demo.pairs.train[rows]),
        features=demo.features | {"train": demo.features["train"][rows]},
        found=demo.found | {"train": (scores[rows], ids[rows])},
        results={},
    )


def run_system(demo: Demo, name: str, memory: bool) -> dict[str, Result]:
    """Train and evaluate the baseline or TinyAlign in a demo's way, and return the results by bank."""
    if not memory:
        model = systems.train_system(demo, name, memory_top_k=0)
        return dict.fromkeys(BANKS, systems.evaluate_system(demo, name, *model, answer=False))
    model = systems.train_system(demo, name, "without")
    return {bank: evaluate(demo, name, model, bank) for bank in BANKS}


def evaluate(demo: Demo, name: str, model: tuple[PreTrainedModel, ProcessorMixin], bank: str) -> Result:
    """Return what a model that reads memory answers with a bank."""
    return systems.evaluate_system(demo, f"{name}_{bank}", *model, bank=bank, answer=False)
