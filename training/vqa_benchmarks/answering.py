"""Answers to chats with images, in batches, generated as a benchmark asks for."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..data.chats import with_captions
from ..models import context_length

MAX_NEW_TOKENS = 128  # where a benchmark does not say
SETTINGS = ("max_new_tokens", "num_beams", "temperature", "top_p", "top_k")


def generation_settings(asked: dict) -> dict:
    """Return arguments of `generate`: greedy and 128 tokens unless a benchmark asks for something else."""
    settings = {"max_new_tokens": MAX_NEW_TOKENS} | {name: asked[name] for name in SETTINGS if name in asked}
    settings["do_sample"] = bool(asked.get("do_sample"))
    if not settings["do_sample"]:
        settings |= dict.fromkeys(("temperature", "top_p", "top_k"))  # of a model that samples by default
    return settings


def stops_of(asked: dict) -> list[str]:
    """Return the texts before which an answer ends; as `stop_strings`, `generate` would find them in prompts, too."""
    stops = asked.get("until") or []
    return [stops] if isinstance(stops, str) else list(stops)


@torch.no_grad()
def answer_chats(
    model: PreTrainedModel, processor: ProcessorMixin, chats: Sequence[list[dict]], asked: dict, memory: str = "on"
) -> tuple[list[str], list[list[dict[str, Any]]], list[bool]]:
    """Return the answers to a batch of chats, each as it would be answered alone, the neighbours that each rests on,
    and for each whether its prompt leaves no room in the model's context.

    Args:
        chats: messages with their images, as the processor's chat template takes them.
        asked: how to generate, in lmms-eval's words: `max_new_tokens`, `until`, `do_sample`, `temperature`, ...
        memory: `"off"` answers without retrieval.
    """
    sources = []
    if model.config.prompt_captions and memory == "on":
        chats, sources = zip(*(_with_captions(model, processor, chat) for chat in chats), strict=True)
    inputs = processor.apply_chat_template(
        list(chats), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    ).to(model.device)
    if model.config.memory_top_k > 0:
        inputs |= {"memory": memory, "sources": sources}
    output = model.generate(**inputs, **generation_settings(asked))
    texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for stop in stops_of(asked):
        texts = [text.partition(stop)[0] for text in texts]
    too_long = inputs["attention_mask"].sum(1) >= (context_length(model) or math.inf)
    return texts, list(sources) or [[] for _ in texts], too_long.tolist()


def _with_captions(
    model: PreTrainedModel, processor: ProcessorMixin, chat: list[dict]
) -> tuple[list[dict], list[dict[str, Any]]]:
    """Return the chat as text-only retrieval asks it, with its images' neighbours in words, and the neighbours."""
    images = [part["image"] for turn in chat for part in turn["content"] if part["type"] == "image"]
    if not images:
        return chat, []
    found, neighbours = model.retrieve(images), []
    for image, rows in enumerate(model.memory_bank.rows(found.ids)):
        scored = zip(rows, found.scores[image].tolist(), strict=True)
        neighbours += [{"image": image, "score": score, **row} for row, score in scored if row is not None]
    return with_captions(processor, model.memory_bank, chat, found.ids.tolist()), neighbours


def batches_by_length(lengths: Sequence[int], asked: Sequence[dict], batch_size: int) -> Iterator[list[int]]:
    """Yield numbers of questions to answer together: of the same settings and about the same length."""
    groups = {}
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        groups.setdefault(str(asked[number]), []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]
