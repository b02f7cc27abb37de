"""Questions about images in batches, and a model's greedy answers to them."""

import time
from collections.abc import Iterator

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.outputs import IMAGE_INPUTS
from ..data.chats import count_images, encode_chat
from ..data.collator import TrainingCollator
from ..data.memory_dropout import MemoryDropout
from ..data.training_rows import training_rows


def question_batches(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: datasets.Dataset,
    bank: MemoryBank | None = None,
    vision_features: np.ndarray | None = None,
    batch_size: int = 16,
    desc: str = "Evaluation",
) -> Iterator[tuple[list[list[dict]], dict[str, torch.Tensor]]]:
    """Yield batches of questions: their chats, and the inputs of their images.

    Args:
        questions: rows as for training, but `messages` ends with a turn of the user.
        bank, vision_features: as for training; `memory_ids` are rows of this bank.
    """
    rows = training_rows(model, questions, bank, vision_features)
    neighbours = model.config.memory_top_k
    dropout = MemoryDropout(0.0, neighbours) if neighbours else None
    collator = TrainingCollator(processor, vision_features, bank, dropout=dropout)
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc, unit="batch"):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        chats = [row["messages"] for row in batch]
        yield chats, send_to_device(collator.image_inputs(batch, list(map(count_images, chats))), model.device)


@torch.no_grad()
def evaluate_answers(
    model: PreTrainedModel, processor: ProcessorMixin, questions: datasets.Dataset, max_new_tokens: int, **kwargs
) -> tuple[list[str], float]:
    """Return the model's own greedy answers, and the mean seconds of one.

    Other arguments are those of [`question_batches`].
    """
    answers, seconds = [], 0.0
    for chats, images in question_batches(model, processor, questions, **kwargs):
        started = time.perf_counter()
        answers += greedy_answers(model, processor, chats, images, max_new_tokens)[0]
        seconds += time.perf_counter() - started
    return answers, seconds / len(answers)


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
