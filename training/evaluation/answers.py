"""Evaluation of answers: loss, tokens, greedy answers."""

import time
from dataclasses import dataclass

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.memory_bank import MemoryBank
from ..data.collator import TrainingCollator
from ..data.memory_dropout import MemoryDropout
from ..data.training_rows import training_rows
from .generation import greedy_answers, reference_of


class ExactMatch(evaluate.Metric):
    """Share of the predictions that equal their reference, spaces around them aside."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"exact_match": float(np.mean(exact_matches(predictions, references)))}


def exact_matches(predictions: list[str], references: list[str]) -> np.ndarray:
    """Return `(n,)` bool, True where a prediction equals its reference, spaces around them aside."""
    pairs = zip(predictions, references, strict=True)
    return np.array([prediction.strip() == reference.strip() for prediction, reference in pairs])


@dataclass
class Evaluation:
    """
    Results of [`evaluate_answers`], one entry a row.

    Attributes:
        losses: `(n,)` float64, the loss summed over the answer's tokens, its end among them.
        num_tokens, correct_tokens: `(n,)` int64, those tokens, and those that were the most likely one.
        answers, references: the greedy answer and the one in the data.
        seconds: `(n,)` float64, time of the answer's batch divided by the batch's size.
    """

    losses: np.ndarray
    num_tokens: np.ndarray
    correct_tokens: np.ndarray
    answers: list[str]
    references: list[str]
    seconds: np.ndarray

    @property
    def exact_match(self) -> np.ndarray:
        """`(n,)` bool."""
        return exact_matches(self.answers, self.references)


@torch.no_grad()
def evaluate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: datasets.Dataset,
    bank: MemoryBank | None = None,
    vision_features: np.ndarray | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    desc: str = "Evaluation",
) -> Evaluation:
    """
    The loss of the answers in the data, and the model's own greedy ones.

    Args:
        dataset: Rows as for training; the last turn of `messages` is the answer.
        bank, vision_features: As for training; `memory_ids` are rows of this bank.

    Raises:
        ValueError: As training; or a chat does not end with an assistant turn.
    """
    rows = training_rows(model, dataset, bank, vision_features)
    neighbours, captions = model.config.num_neighbours, model.config.prompt_captions
    dropout = MemoryDropout(0.0, neighbours) if neighbours else None
    collator = TrainingCollator(processor, vision_features, bank, dropout=dropout, prompt_captions=captions)
    losses, num_tokens, correct_tokens, answers, references, seconds = [], [], [], [], [], []
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc, unit="batch"):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        inputs = send_to_device(collator(batch), model.device)
        references += [reference_of(row["messages"]) for row in batch]
        loss, correct, counts = _score_inputs(model, inputs)
        for row_loss, row_correct in zip(loss.split(counts), correct.split(counts), strict=True):
            losses.append(row_loss.sum().item())
            correct_tokens.append(row_correct.sum().item())
        num_tokens += counts
        started = time.perf_counter()
        chats = [collator.messages(row)[:-1] for row in batch]
        answers += greedy_answers(model, processor, chats, inputs, max_new_tokens)[0]
        seconds += [(time.perf_counter() - started) / len(batch)] * len(batch)
    return Evaluation(
        np.array(losses), np.array(num_tokens), np.array(correct_tokens), answers, references, np.array(seconds)
    )


def _score_inputs(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Loss and whether the token was the likeliest, of the supervised tokens row by row; and their number a row."""
    logits = model(**inputs, supervised_logits_only=True, use_cache=False).logits.float()
    labels = inputs["labels"][:, 1:]
    supervised = labels != -100
    targets = labels[supervised]
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses, logits.argmax(-1) == targets, supervised.sum(1).tolist()
