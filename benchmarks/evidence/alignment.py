"""Training losses at equal steps and equal seconds (paper, Fig. 2a), and how near pictures come to words (Fig. 2b)."""

from dataclasses import dataclass

import numpy as np
import torch
from study import Study
from torch.nn import functional as F

from tinyalign_vlm.training.demo import systems
from tinyalign_vlm.training.demo.state import TOP_K, Demo
from tinyalign_vlm.training.evaluation.bootstrap import Interval, interval_of
from tinyalign_vlm.training.hub.run_facts import read_records

DRAWS = 200  # each measures all distances
LAST = 0.3  # share of a stage's steps whose mean loss is compared
SYSTEMS = ("baseline", "tinyalign", "latents", "text_rag")


@dataclass
class LossCurve:
    """The training loss of a system in a stage.

    Attributes:
        steps, losses: of each record of the log.
        seconds: of the whole stage.
    """

    steps: np.ndarray
    losses: np.ndarray
    seconds: float

    def end(self, seconds: float | None = None) -> float:
        """Return the mean loss of the last steps that fit into so many seconds; None: of all."""
        last = self.steps[-1] if seconds is None else min(1.0, seconds / self.seconds) * self.steps[-1]
        counted = (self.steps <= last) & (self.steps > (1 - LAST) * last)
        if not counted.any():  # slow, and nothing was recorded so early
            counted = self.steps == self.steps[0]
        return float(self.losses[counted].mean())


def loss_curves(demo: Demo) -> dict[str, list[LossCurve]]:
    """Return the curves of both stages by system."""
    found = {}
    for system in SYSTEMS:
        records = read_records(demo.out / system / "model")
        found[system] = [LossCurve(*np.array(record.losses).T, record.seconds) for record in records]
    return found


@dataclass
class Clouds:
    """Vectors of pictures and of their names, unit length.

    Attributes:
        pictures: `(n, width)`, the mean of what the language model reads of each picture.
        names: `(n, width)`, the mean of the embeddings of its name's tokens.
        kinds: `(n,)`, what kind of emoji each is.
    """

    pictures: np.ndarray
    names: np.ndarray
    kinds: np.ndarray

    @property
    def gap(self) -> float:
        """The distance of the two clouds' centres (modality gap)."""
        return float(np.linalg.norm(self.pictures.mean(0) - self.names.mean(0)))

    @property
    def spread(self) -> float:
        """Mean distance of two pictures of one kind over that of two kinds: smaller is tighter."""
        pictures = self.pictures.astype(float)
        distance = np.sqrt((2 - 2 * pictures @ pictures.T).clip(0))
        same = self.kinds[:, None] == self.kinds[None]
        others = distance > 1e-3  # than the picture itself, whose distance is a rounding error
        return float(distance[same & others].mean() / distance[~same].mean())

    def drawn(self, rows: np.ndarray) -> "Clouds":
        """Return the clouds of some of the concepts."""
        return Clouds(self.pictures[rows], self.names[rows], self.kinds[rows])

    @property
    def own_name(self) -> float:
        """The share of pictures to which their own name is the nearest of all."""
        centred = [part - part.mean(0) for part in (self.pictures, self.names)]
        near = (F.normalize(torch.tensor(centred[0])) @ F.normalize(torch.tensor(centred[1])).T).argmax(1)
        return float((near.numpy() == np.arange(len(self.names))).mean())


@torch.no_grad()
def clouds(demo: Demo, system: str, bank: str | None = None, visual_only: bool = False) -> Clouds:
    """Return the clouds of a trained system; `visual_only` leaves out what memory adds."""
    settings = {} if bank else {"memory_top_k": 0}
    model, processor = systems.train_system(demo, system, "without" if bank else None, **settings)
    features = torch.from_numpy(np.array(demo.features["queries"]))
    read = {}
    if bank is not None:
        model.attach_memory_bank(demo.banks[bank], tokenizer=processor.tokenizer)
        read = {"memory_ids": torch.from_numpy(demo.found[bank][1][:, :TOP_K])}
        read["memory_scores"] = torch.from_numpy(demo.found[bank][0][:, :TOP_K])
    tokens = model.get_image_features(vision_features=features, **read).pooler_output
    count = model.config.image_seq_length
    pictures = torch.stack([row[:count].mean(0) if visual_only else row.mean(0) for row in tokens])
    table = model.get_input_embeddings().weight
    ids = [
        processor.tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in demo.labels(demo.queried)
    ]
    names = torch.stack([table[row].mean(0) for row in ids])
    vectors = (F.normalize(part.float()).numpy() for part in (pictures, names))
    return Clouds(*vectors, np.array(demo.pairs.noto["group"])[demo.queried])


def difference(found: dict[int, dict[str, Clouds]], measure: str) -> Interval:
    """Return by how much a measure of TinyAlign's visual tokens is above the baseline's, mean of the seeds.

    The interval is of `DRAWS` draws of each seed's concepts, the same ones for both.
    """
    rng, differences = np.random.default_rng(0), []
    for draw in range(1 + DRAWS):
        of_seeds = []
        for seed in found.values():
            count = len(seed["baseline"].kinds)
            rows = rng.integers(0, count, count) if draw else np.arange(count)
            ours, base = (
                getattr(seed[name].drawn(rows), measure) for name in ("TinyAlign, visual tokens", "baseline")
            )
            of_seeds.append(ours - base)
        differences.append(np.mean(of_seeds))
    return interval_of(np.array(differences))


def measure(study: Study) -> dict[int, dict[str, Clouds]]:
    """Return the clouds of baseline and TinyAlign by seed."""
    found = {}
    for seed in study.seeds:
        demo = study.demo(seed)
        found[seed] = {
            "baseline": clouds(demo, "baseline"),
            "TinyAlign, visual tokens": clouds(demo, "tinyalign", "with", visual_only=True),
            "TinyAlign, with memory": clouds(demo, "tinyalign", "with"),
        }
    return found
