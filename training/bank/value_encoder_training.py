"""Training the value encoder, before a bank is built and frozen with it."""

import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign import ValueEncoder, ValueEncoderConfig
from ...modeling_tinyalign.connectors import pool_grid
from ...modeling_tinyalign.key_encoder import evaluating
from ...modeling_tinyalign.row_encoder import BadRow, BankRow
from ..data.features import feature_batches
from ..data.images import StoredImages
from ..data.progress import Progress
from ..disk import save_file

NUM_IMAGES = 1024  # the rows of a data set that a new value encoder is trained on
SAVE_STEPS = 50


@dataclass
class ValueEncoderTrainingConfig:
    """Settings of `train_value_encoder`."""

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3  # the peak of the one-cycle schedule
    seed: int = 0


def picture_cells(images: torch.Tensor, num_latents: int) -> torch.Tensor:
    """Return vision features `(n, T, C)` pooled to a square grid of at most `num_latents` cells `(n, cells, C)`."""
    side = math.isqrt(images.shape[1])
    if side**2 != images.shape[1]:  # no square grid of tokens: the mean of all
        return images.mean(1, keepdim=True)
    return pool_grid(images, min(math.isqrt(num_latents), side))


def train_value_encoder(
    encoder: ValueEncoder,
    images: Sequence,
    captions: Sequence[str],
    config: ValueEncoderTrainingConfig,
    checkpoint: Path | None = None,
) -> list[dict]:
    """Train the value encoder, in place, to say what the picture shows: latent i, read by a linear layer, is cell i of
    a grid of the vision tower's features, less the mean of all pictures. Captions are read as text: latents need not
    say them. No language model takes part.

    Args:
        encoder: with new weights; left frozen and in evaluation mode.
        images: vision features `(n, T, C)`.
        checkpoint: a file, written every 50 steps, from which the same training goes on.

    Returns:
        every 50 steps `step`, and `loss`, 1 less the mean cosine of what is read and what is to be said.
    """
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.as_tensor(images)
    cells = [picture_cells(part.float(), encoder.config.num_latents) for part in images.split(64)]
    mean = torch.cat(cells).mean(0).to(encoder.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        look = nn.Linear(encoder.config.latent_dim, encoder.config.vision_feature_size).to(encoder.device)
    parameters = [*encoder.train().requires_grad_(True).parameters(), *look.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.1)
    parts = {"encoder": encoder, "look": look, "optimizer": optimizer, "schedule": schedule}
    done, history = restore(checkpoint, parts, generator)
    progress = Progress(range(done + 1, config.steps + 1), desc="Value encoder", initial=done, total=config.steps)
    step = done
    try:
        for step in progress:
            rows = torch.randint(len(images), (config.batch_size,), generator=generator)
            batch = images[rows].to(encoder.device, torch.float32)
            latents = encoder.encode(batch, [captions[row] for row in rows.tolist()])
            cells = picture_cells(batch, encoder.config.num_latents)
            loss = 1 - F.cosine_similarity(look(latents[:, : cells.shape[1]]), cells - mean, dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % SAVE_STEPS == 0 or step == config.steps:
                history.append({"step": step, "loss": loss.item()})
                save_progress(checkpoint, history, parts, generator)
                progress.set_postfix(loss=f"{loss.item():.3f}")
                progress.say(f"step {step} of {config.steps}, loss {loss.item():.3f}")
    except KeyboardInterrupt as interrupt:
        kept = history[-1]["step"] if history and checkpoint is not None else 0
        raise KeyboardInterrupt(
            f"stopped at step {step} of {config.steps} of the value encoder; the same command goes on from step {kept}"
        ) from interrupt
    encoder.requires_grad_(False).eval()
    return history


def save_progress(checkpoint: Path | None, history: list[dict], parts: dict, generator: torch.Generator) -> None:
    """Write all that the next step depends on, unless no file is named for it."""
    if checkpoint is None:
        return
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "generator": generator.get_state()}
    content = io.BytesIO()
    torch.save(state, content)
    save_file(checkpoint, content.getvalue())


def restore(checkpoint: Path | None, parts: dict, generator: torch.Generator) -> tuple[int, list[dict]]:
    """Read what `save_progress` wrote, if it did. Return the steps that are done, and their history."""
    if checkpoint is None or not checkpoint.is_file():
        return 0, []
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    done = state["history"][-1]["step"]
    print(f"The value encoder goes on from step {done}.", flush=True)
    return done, state["history"]


def train_new_value_encoder(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    source: StoredImages,
    config: ValueEncoderTrainingConfig | None = None,
    batch_size: int = 32,
    vision_features: torch.Tensor | np.ndarray | None = None,
    checkpoint: Path | None = None,
) -> ValueEncoder:
    """Return a value encoder for a model that reads latents, trained on the first rows of a data set.

    `vision_features` `(rows of the data set, tokens, width)` save the work of the tower; `checkpoint` is that of
    `train_value_encoder`. Raises `ValueError` if no row is usable.
    """
    config = config or ValueEncoderTrainingConfig()
    rows, captions, parts = sample_rows(source), [], []
    with evaluating(model):
        while batch := list(islice(rows, batch_size)):  # never all pictures at once
            captions += [row.caption for row in batch]
            if vision_features is not None:
                parts.append(np.stack([np.asarray(vision_features[row.number]) for row in batch]))
                continue
            images = [row.image for row in batch]
            ((_, part),) = feature_batches(model, processor, images, range(len(images)), batch_size)
            parts.append(part.half().cpu().numpy())
    features = np.concatenate(parts)
    heads = math.gcd(8, model.config.latent_dim)  # attention takes only a number that divides the width
    settings = ValueEncoderConfig(
        num_latents=model.config.memory_tokens,
        latent_dim=model.config.latent_dim,
        num_self_attention_heads=heads,
        num_cross_attention_heads=heads,
        num_vision_tokens=features.shape[1],
        vision_feature_size=features.shape[2],
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        encoder = ValueEncoder(settings).to(model.device)
    if config.steps:
        print(f"Training a value encoder on {len(captions):,} images, {config.steps:,} steps.", flush=True)
        began = time.perf_counter()
        train_value_encoder(encoder, features, captions, config, checkpoint)
        print(f"The value encoder took {time.perf_counter() - began:.0f} seconds.")
    return encoder.requires_grad_(False).eval()


def sample_rows(source: StoredImages) -> Iterator[BankRow]:
    """Yield the first usable rows; raises `ValueError` if there are none."""
    count, problem = 0, None
    for number, stored in islice(source, 2 * NUM_IMAGES):
        try:
            yield source.read(number, stored)
            count += 1
        except BadRow as error:
            problem = problem or f"row {number}: {error}"
        if count == NUM_IMAGES:
            return
    if not count:
        raise ValueError(
            f"The data set has no usable row to train a value encoder on ({problem or 'it is empty'}), expected at "
            "least one image with a caption."
        )
