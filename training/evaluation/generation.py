"""Greedy answers to the chats of a data set."""

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign.outputs import IMAGE_INPUTS
from ..data.chats import encode_chat


def reference_of(messages: list[dict]) -> str:
    """The text of the last turn. Raises `ValueError` when that is not the assistant's."""
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
    """
    Greedy answers to chats that end with a question, and `(images, top_k)` rows of the bank that were read for them,
    -1 in slots that are off, with their similarities, as far as these are known.

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
