"""Likelihood of given answers: the right one of several, their loss, and whether the model would say them."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from ..data.chats import encode_chat
from .answers import question_batches


@dataclass
class AnswerScores:
    """Scores of answers to questions.

    Attributes:
        losses, num_tokens: `(questions, answers)`, the loss summed over an answer's tokens and its end, and how many.
        likelihoods: `(questions, answers)`, mean log-probability of the answer's tokens, without its end.
        is_greedy: `(questions, answers)` bool, the model would say this answer: each token and the end are the most
            likely ones.
    """

    losses: np.ndarray
    num_tokens: np.ndarray
    likelihoods: np.ndarray
    is_greedy: np.ndarray


@torch.no_grad()
def score_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: datasets.Dataset,
    answers: Sequence[Sequence[str]],
    *args,
    **kwargs,
) -> AnswerScores:
    """Score answers to questions. What stands before the answers is read once for all answers to a question.

    Args:
        answers: `(questions, answers)` texts, as many for each question.

    Other arguments are those of [`question_batches`].
    """
    parts, answers = [], iter(answers)
    for chats, images in question_batches(model, processor, questions, *args, **kwargs):
        prompts, endings = [], []
        for chat in chats:
            prompts.append(encode_chat(processor, chat, add_generation_prompt=True)[0])
            endings += [_ending(processor, chat, text) for text in next(answers)]
        parts.append(_score_batch(model, processor, prompts, endings, images))
    return AnswerScores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _ending(processor: ProcessorMixin, messages: list[dict], answer: str) -> torch.LongTensor:
    """Return the tokens of an answer and its end."""
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    # the last answer's tokens alone are spoken: earlier turns are part of the prompt
    silent = [{**message, "train": False} if message["role"] == "assistant" else message for message in messages]
    ids, is_spoken = encode_chat(processor, [*silent, said])
    return torch.tensor([token for token, spoken in zip(ids, is_spoken, strict=True) if spoken])


def _score_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: list[list[int]],
    endings: list[torch.LongTensor],
    images: dict[str, torch.Tensor],
) -> tuple[np.ndarray, ...]:
    """Return the columns of `AnswerScores` for a batch; `endings` are those of the first question first."""
    count = len(endings) // len(prompts)
    prompt = processor.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    positions = _positions(prompt["attention_mask"])
    outputs = model(**prompt, **images, position_ids=positions, use_cache=True, logits_to_keep=1)
    first = outputs.logits.repeat_interleave(count, dim=0)
    name = "cache" if "cache" in outputs else "past_key_values"  # before transformers 5.24
    outputs[name].batch_repeat_interleave(count)
    targets = pad_sequence(endings, True, -100).to(model.device)
    before = prompt["attention_mask"].repeat_interleave(count, dim=0)
    mask = torch.cat([before, (targets >= 0).long()], dim=1)[:, :-1]  # the end is nobody's input
    outputs = model(
        input_ids=targets.clamp(min=0)[:, :-1],
        attention_mask=mask,
        position_ids=_positions(mask)[:, before.shape[1] :],
        **{name: outputs[name]},
        use_cache=True,
    )
    is_target = targets >= 0
    logits = torch.cat([first, outputs.logits], dim=1)[is_target].float()
    losses, is_wrong = torch.zeros(targets.shape, device=model.device), torch.zeros_like(is_target)
    losses[is_target] = F.cross_entropy(logits, targets[is_target], reduction="none")
    is_wrong[is_target] = logits.argmax(-1) != targets[is_target]
    num_tokens = is_target.sum(1)
    is_end = F.one_hot(num_tokens - 1, targets.shape[1])
    likelihoods = -(losses * (1 - is_end)).sum(1) / (num_tokens - 1)
    columns = losses.sum(1), num_tokens, likelihoods, ~is_wrong.any(1)
    return tuple(column.view(-1, count).cpu().numpy() for column in columns)


def _positions(attention_mask: torch.Tensor) -> torch.LongTensor:
    return (attention_mask.cumsum(1) - 1).clamp(min=0)
