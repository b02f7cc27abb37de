"""Training the value encoder, before a bank is built and frozen with it."""

import io
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign import ValueEncoder, ValueEncoderConfig
from ...modeling_tinyalign.key_encoder import evaluating
from ...modeling_tinyalign.row_encoder import BadRow, BankRow
from ...modeling_tinyalign.value_encoder import PADDING_BYTE
from ..data.images import StoredImages
from ..disk import save_file

# The rows of a data set that a new value encoder is trained on.
NUM_IMAGES, NUM_CAPTIONS = 256, 10_000
SAVE_STEPS = 50
SECONDS_BETWEEN_LINES = 30  # where there is no terminal for a progress bar


@dataclass
class ValueEncoderTrainingConfig:
    """Settings of `train_value_encoder`.

    Attributes:
        learning_rate: peak of the one-cycle schedule.
        invented_share: share of words in made-up captions that are random letters, so that words never seen can be
            spelled.
        vision_weight: weight of predicting the mean visual feature (cosine) from the mean latent; without effect if
            the encoder reads pixels.
        seed: of the data.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    invented_share: float = 0.5
    vision_weight: float = 0.1
    seed: int = 0


class CaptionSampler:
    """Captions to practise reading on: half are `captions`, half are made up of known and other words.

    Raises:
        ValueError: a caption is no text, or all are blank.
    """

    def __init__(self, captions: Sequence[str], invented_share: float, seed: int):
        for number, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(
                    f"Caption {number} (the first is 0) is {caption!r}, expected text: fill it in or leave it out."
                )
        self.captions = [caption for caption in captions if caption.strip()]
        if not self.captions:
            raise ValueError(
                f"Found {len(captions)} captions and none with a word in it, expected at least one: pass the captions "
                "of the training images."
            )
        self.words = sorted({word for caption in self.captions for word in caption.split()})
        self.invented_share, self.rng = invented_share, random.Random(seed)

    def other_word(self) -> str:
        """Return a word that may be in no caption: random letters."""
        return "".join(self.rng.choices("abcdefghijklmnopqrstuvwxyz", k=self.rng.randint(2, 12)))

    def sample(self, n: int, max_words: int) -> list[str]:
        """Return `n` captions; the made-up ones have up to `max_words` words."""
        samples = []
        for _ in range(n):
            if self.rng.random() < 0.5:
                samples.append(self.rng.choice(self.captions))
                continue
            length = self.rng.randint(1, max_words)
            is_other = [self.rng.random() < self.invented_share for _ in range(length)]
            samples.append(" ".join(self.other_word() if other else self.rng.choice(self.words) for other in is_other))
        return samples


def spelling_loss(encoder: ValueEncoder, latents: torch.Tensor, caption_bytes: torch.Tensor) -> tuple:
    """Return the mean cross-entropy of the bytes, and the share of words that are spelled without a fault.

    Latents `(n, L, D)` whose word in `caption_bytes` `(n, words, bytes_per_patch)` is none have to spell nothing, and
    weigh a tenth.
    """
    config = encoder.config
    missing = config.max_words - caption_bytes.shape[1]
    targets = F.pad(caption_bytes, (0, 0, 0, missing), value=PADDING_BYTE)
    targets = targets.repeat_interleave(config.latents_per_word, dim=1)
    logits = encoder.spell(latents[:, : targets.shape[1]])
    error = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape).mean(-1)
    is_word = (targets != PADDING_BYTE).any(-1)
    weight = torch.where(is_word, 1.0, 0.1)
    correct = (logits.argmax(-1) == targets).all(-1)[is_word].float().mean()
    return (error * weight).sum() / weight.sum(), correct


def train_value_encoder(
    encoder: ValueEncoder,
    images: Sequence,
    captions: Sequence[str],
    config: ValueEncoderTrainingConfig | None = None,
    checkpoint: Path | None = None,
) -> list[dict]:
    """Train the value encoder, in place, to spell: a linear layer reads word i out of latents 2i and 2i + 1.

    No language model takes part: a language model's memory connector gets a lexicon of its own (`lexicon`).

    Args:
        encoder: with new weights; left frozen and in evaluation mode.
        images: vision features `(n, T, C)`, or pixels, as an array or tensor: what `encoder` reads.
        captions: those of the training images. They may be fewer or more than the images.
        checkpoint: a file, written every 50 steps, from which the same training goes on if it is there.

    Returns:
        a row every 50 steps: `step`, `loss` (nats a byte) and `words_right` (share of words spelled without a fault).

    Raises:
        ValueError: there is no image, no caption with a word in it, or a caption is no text (its number is named).
    """
    config = config or ValueEncoderTrainingConfig()
    if len(images) == 0:
        raise ValueError("Found 0 images, expected at least one: pass the training images' features or pixels.")
    sampler = CaptionSampler(captions, config.invented_share, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        look = nn.Linear(encoder.config.latent_dim, encoder.config.vision_feature_size).to(encoder.device)
    parameters = [*encoder.train().requires_grad_(True).parameters(), *look.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.1)
    parts = {"encoder": encoder, "look": look, "optimizer": optimizer, "schedule": schedule}
    done, history = restore(checkpoint, parts, generator, sampler)
    progress = tqdm(range(done + 1, config.steps + 1), desc="Value encoder", initial=done, total=config.steps)
    step, said = done, time.monotonic()
    try:
        for step in progress:
            caption_bytes = encoder.tokenize(sampler.sample(config.batch_size, encoder.config.max_words))
            rows = torch.randint(len(images), (config.batch_size,), generator=generator)
            batch = torch.as_tensor(images[rows.numpy()]).to(encoder.device, torch.float32)
            loss, words_right = take_step(encoder, look, batch, caption_bytes, optimizer, config.vision_weight)
            schedule.step()
            if step % SAVE_STEPS == 0 or step == config.steps:
                history.append({"step": step, "loss": loss.item(), "words_right": words_right.item()})
                if checkpoint is not None:
                    save_progress(checkpoint, history, parts, generator, sampler)
                progress.set_postfix(loss=f"{loss.item():.3f}", words_right=f"{words_right.item():.1%}")
                if progress.disable and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    print(f"  step {step} of {config.steps}, loss {loss.item():.3f}", flush=True)
    except KeyboardInterrupt as interrupt:
        kept = history[-1]["step"] if history and checkpoint is not None else 0
        raise KeyboardInterrupt(
            f"stopped at step {step} of {config.steps} of the value encoder; the same command goes on from step {kept}"
        ) from interrupt
    encoder.requires_grad_(False).eval()
    return history


def take_step(
    encoder: ValueEncoder,
    look: nn.Linear,
    batch: torch.Tensor,
    caption_bytes: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    vision_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a step of training on images and captions; return the loss of spelling and the share of words right."""
    caption_bytes = caption_bytes.to(encoder.device)
    latents = encoder(batch, caption_bytes)
    loss, words_right = spelling_loss(encoder, latents, caption_bytes)
    total = loss
    if vision_weight and encoder.config.image_input == "features":
        seen = F.cosine_similarity(look(latents.mean(1)), batch.mean(1)).mean()
        total = loss + vision_weight * (1 - seen)
    optimizer.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return loss, words_right


def save_progress(
    checkpoint: Path, history: list[dict], parts: dict, generator: torch.Generator, sampler: CaptionSampler
) -> None:
    """Write all that the next step depends on."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "generator": generator.get_state(), "sampler": sampler.rng.getstate()}
    content = io.BytesIO()
    torch.save(state, content)
    save_file(checkpoint, content.getvalue())


def restore(
    checkpoint: Path | None, parts: dict, generator: torch.Generator, sampler: CaptionSampler
) -> tuple[int, list[dict]]:
    """Read what `save_progress` wrote, if it did. Return the steps that are done, and their history."""
    if checkpoint is None or not checkpoint.is_file():
        return 0, []
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    sampler.rng.setstate(state["sampler"])
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
    """Return a value encoder for a model, trained on the first rows of a data set. Say what is done.

    `vision_features` `(rows of the data set, tokens, width)` save the work of the tower; `checkpoint` is that of
    `train_value_encoder`. Raises `ValueError` if no row is usable.
    """
    config = config or ValueEncoderTrainingConfig()
    images, captions = sample_rows(source)
    if vision_features is None:
        features = encode_images(model, processor, images, batch_size)
    else:
        features = np.stack([np.asarray(vision_features[row.number]) for row in images])
    encoder = new_value_encoder(model, features.shape[1:], config.seed)
    if config.steps:
        print(
            f"Training a value encoder on {len(captions):,} captions and {len(images)} images, {config.steps:,} "
            "steps. Fewer are faster and spell worse.",
            flush=True,
        )
        began = time.perf_counter()
        train_value_encoder(encoder, features, captions, config, checkpoint)
        print(f"The value encoder took {time.perf_counter() - began:.0f} seconds.")
    return encoder.requires_grad_(False).eval()


def new_value_encoder(model: PreTrainedModel, features_shape: tuple[int, int], seed: int) -> ValueEncoder:
    """Return an untrained value encoder whose latents a model reads, for features `(tokens, width)`."""
    heads = math.gcd(8, model.config.latent_dim)
    config = ValueEncoderConfig(
        num_latents=model.config.num_latents,
        latent_dim=model.config.latent_dim,
        latents_per_word=model.config.latents_per_word,
        num_self_attention_heads=heads,
        num_cross_attention_heads=heads,
        num_vision_tokens=features_shape[0],
        vision_feature_size=features_shape[1],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ValueEncoder(config).to(model.device)


def sample_rows(source: StoredImages) -> tuple[list[BankRow], list[str]]:
    """Return the first usable images, and more captions; raises `ValueError` if there are none."""
    images, captions, problem = [], [], None
    for number, stored in islice(source, 2 * NUM_CAPTIONS):
        try:
            if len(images) < NUM_IMAGES:
                images.append(source.read(number, stored))
            captions.append(source.caption(stored))
        except BadRow as error:
            problem = problem or f"row {number}: {error}"
        if len(captions) == NUM_CAPTIONS:
            break
    if not images:
        raise ValueError(
            f"The data set has no usable row to train a value encoder on ({problem or 'it is empty'}), expected at "
            "least one image with a caption."
        )
    return images, captions


def encode_images(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[BankRow], batch_size: int
) -> np.ndarray:
    """Return vision features `(rows, tokens, width)`, float16."""
    features = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            images = [row.image for row in rows[start : start + batch_size]]
            pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            features.append(model.get_vision_features(pixels).half().cpu())
    return torch.cat(features).numpy()
