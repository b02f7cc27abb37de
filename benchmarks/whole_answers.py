"""Milliseconds of a whole answer with and without a memory bank, for benchmarks/bank.py."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinyalign_vlm import MemoryBank, TinyAlignConfig, TinyAlignForConditionalGeneration

TOP_K = 4


def measure_answers(folder: Path, repeats: str) -> dict:
    """Milliseconds of a whole answer with and without a memory bank, and of the retrieval in it."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    settings = {"vision_config": vision, "text_config": text, "image_token_id": 151_935, "image_seq_length": 27**2}
    model = TinyAlignForConditionalGeneration(TinyAlignConfig(**settings, memory_top_k=TOP_K)).eval()
    with torch.device("meta"):
        baseline = TinyAlignForConditionalGeneration(TinyAlignConfig(**settings, memory_top_k=0)).eval()
    for part in ("vision_tower", "language_model", "connector"):
        setattr(baseline.model, part, getattr(model.model, part))
    baseline.lm_head = model.lm_head
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    model.attach_memory_bank(MemoryBank.from_pretrained(folder), tokenizer=tokenizer, check_probes=False)
    bank = model.memory_bank
    pixels = torch.randn(1, 3, 384, 384)
    question = torch.arange(100, 130)[None]

    def answer(asked: TinyAlignForConditionalGeneration, memory_tokens: int):
        image = torch.full((1, 27**2 + memory_tokens), 151_935)
        input_ids = torch.cat([question[:, :10], image, question[:, 10:]], dim=1)
        asked.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixels,
            min_new_tokens=20,
            max_new_tokens=20,
            do_sample=False,
        )

    features = torch.randn(1, 27**2, 1152)
    works = {
        "baseline": lambda: answer(baseline, 0),
        "memory": lambda: answer(model, 32),
        "retrieval": lambda: bank.gather(bank.search(bank.encode_queries(features), TOP_K)[1]),
    }
    from bank import in_turns

    with torch.no_grad():
        return in_turns(works, int(repeats))
