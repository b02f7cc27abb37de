"""Memory dropout: neighbours taken away in training, so that a model meets banks that do not know, and none."""

import zlib

import numpy as np
import torch
from transformers import TrainerCallback

OFF_SHARE = 1 / 6


class MemoryDropout(TrainerCallback):
    """Take neighbours away from a share of the images, in one of two ways:

    - five in six lose the nearest one to `top_k` of them, whose places the next ones take: the bank lacks what was
      asked for. Without it, a model learns to trust whatever it is given.
    - one in six loses all of them: the bank is off.

    What happens to an image depends on the seed, the epoch, its chat and its number in it, and on nothing else. The
    epoch is known where it is a callback of the trainer.

    Args:
        rate: the share of images, 0 to 1.
        top_k: neighbours of an image that the model gets; those behind them in a row are the spare ones.
    """

    def __init__(self, rate: float, top_k: int, seed: int = 0):
        if not 0 <= rate <= 1:
            raise ValueError(f"memory_dropout is {rate}, expected a share of the images, 0 to 1.")
        self.rate, self.top_k, self.seed = rate, top_k, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes see it change

    def __call__(self, ids: np.ndarray, scores: np.ndarray, text: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and scores `(top_k,)` of the neighbours that are left; -1 and -inf where a slot is off.

        Args:
            ids, scores: `(depth,)` of one image, best first; `depth` is at least `top_k`.
            text, number: chat and names of the images of the row, and which of its images this is.
        """
        rng = np.random.default_rng([self.seed, int(self.epoch), zlib.crc32(text.encode()), number])
        draw = rng.random()
        if draw < self.rate * OFF_SHARE:
            ids = np.full(len(ids), -1)
        elif draw < self.rate:
            missing = rng.integers(1, self.top_k + 1)
            ids = np.concatenate([ids[missing:], np.full(self.top_k, -1)])
            scores = np.concatenate([scores[missing:], np.full(self.top_k, -np.inf)])
        off = ids < 0
        return np.where(off, -1, ids)[: self.top_k], np.where(off, -np.inf, scores)[: self.top_k]

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch.fill_(int(state.epoch + 1e-6))  # a sum of fractions: it may be 0.999...
