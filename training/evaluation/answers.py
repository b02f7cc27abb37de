"""Greedy answers to the chats of a data set, and what the data say."""

import time
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.outputs import IMAGE_INPUTS
from ..data.chats import encode_chat
from ..data.collator import TrainingCollator
from ..data.memory_dropout import MemoryDropout
from ..data.training_rows import training_rows


@dataclass
class GreedyAnswers:
    """Results of [`evaluate_answers`], one entry a row. Losses of answers: [`score_answers`].

    Attributes:
        answers, references: the greedy answer and the one in the data.
        seconds: `(n,)` float64, time of the answer's batch divided by the batch's size.
    """

    answers: list[str]
    references: list[str]
    seconds: np.ndarray

    @property
    def exact_match(self) -> np.ndarray:
        """`(n,)` bool, spaces around an answer aside."""
        pairs = zip(self.answers, self.references, strict=True)
        return np.array([answer.strip() == reference.strip() for answer, reference in pairs])


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
) -> GreedyAnswers:
    """Return the model's own greedy answers beside those in the data.

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
    answers, references, seconds = [], [], []
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc, unit="batch"):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        references += [reference_of(row["messages"]) for row in batch]
        inputs = send_to_device(collator(batch), model.device)
        started = time.perf_counter()
        chats = [collator.messages(row)[:-1] for row in batch]
        answers += greedy_answers(model, processor, chats, inputs, max_new_tokens)[0]
        seconds += [(time.perf_counter() - started) / len(batch)] * len(batch)
    return GreedyAnswers(answers, references, np.array(seconds))


def reference_of(messages: list[dict]) -> str:
    """Return the text of the last turn; `ValueError` if that is not the assistant's."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f"A chat ends with a turn of {last['role']!r}, expected 'assistant': {str(messages)[:200]}")
    content = last["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def greedy_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chats: list[list[dict]],
    batch: dict[str, torch.Tensor],
    max_new_tokens: int,
) -> tuple[list[str], torch.LongTensor | None, torch.Tensor | None]:
    """Return greedy answers to chats that end with a question, the rows of the bank `(images, top_k)` that were read
    for them, -1 in slots that are off, and their similarities, as far as these are known.

    Args:
        batch: What the collator made of the chats; read is what it says of their images.
    """
    prompts = [encode_chat(processor, messages, add_generation_prompt=True)[0] for messages in chats]
    inputs = processor.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        **{name: batch[name] for name in IMAGE_INPUTS if name in batch},
        do_sample=False,
        **dict.fromkeys(("temperature", "top_p", "top_k")),  # of a model that samples by default
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
    )
    texts = processor.tokenizer.batch_decode(output.sequences[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts], output.get("memory_ids"), output.get("memory_scores")
