"""Memory tokens against text in the prompt (paper, Table 5): seconds, memory and score by the captions' length."""

import json
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from real_captions import cut
from study import Study, evaluate, tag
from transformers import AutoModelForCausalLM, Qwen2Config

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.demo import systems
from tinyalign_vlm.training.demo.state import Demo, Result, write_json

SEEDS = (0, 1, 2)  # of the scores
WORDS, NEIGHBOURS = (3, 15, 60), (1, 5, 10)
# Captions to be asked with, by their title; names alone have 2.2 words.
WRITTEN = {"15 words": (15, False), "60 words": (60, False), "15 words, the name last": (15, True)}
VISUAL_TOKENS, QUESTION_TOKENS, MEMORY_TOKENS, ANSWER_TOKENS = 729, 60, 32, 20
TOKENS_A_WORD = 1.3  # of English in a vocabulary of 50,000
REPEATS = 3
# Qwen2-0.5B, a language model of the paper's, with random weights: seconds do not depend on them.
SHAPE = Qwen2Config(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
TITLES = {"tinyalign": "TinyAlign", "text_cut": "text, cut", "text_rag": "text, whole"}
BEFORE, AFTER = "a picture of", "which was drawn by hand in a plain and friendly style with few colours on white"


def prompt_lengths() -> dict[str, int]:
    """Return the tokens of a prompt by what stands in it."""
    alone = VISUAL_TOKENS + QUESTION_TOKENS
    lengths = {"no memory": alone, "TinyAlign": alone + MEMORY_TOKENS}
    for words in WORDS:
        for count in NEIGHBOURS:
            lengths[f"text, {count} x {words} words"] = alone + round(count * (words * TOKENS_A_WORD + 1))
    return lengths


@torch.no_grad()
def seconds_of_answers(study: Study) -> dict[str, float]:
    """Return the least seconds of an answer of 20 tokens after each prompt, measured in turns; bfloat16; kept."""
    path = study.out / f"seconds_{tag(SHAPE.to_dict(), prompt_lengths(), ANSWER_TOKENS, REPEATS)}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).eval()
    found = dict.fromkeys(prompt_lengths(), np.inf)
    for _ in range(REPEATS):
        for name, length in prompt_lengths().items():
            ids = torch.randint(SHAPE.vocab_size, (1, length))
            started = time.perf_counter()
            model.generate(ids, min_new_tokens=ANSWER_TOKENS, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            found[name] = min(found[name], time.perf_counter() - started)
    write_json(path, found)
    return found


def cache_megabytes(length: int) -> float:
    """Return the size of the keys and values that the language model keeps of a prompt, in 2**20 bytes of bfloat16."""
    head = SHAPE.hidden_size // SHAPE.num_attention_heads
    return 2 * SHAPE.num_hidden_layers * SHAPE.num_key_value_heads * head * 2 * length / 2**20


def in_words(count: int, last: bool = False) -> Callable[[str], str]:
    """Return what makes of a name a caption of so many words, in which it stands after the first three, or `last`."""

    def write(name: str) -> str:
        missing = max(0, count - len(f"{BEFORE} {name}".split()))
        filler = (AFTER.split() * (1 + missing // len(AFTER.split())))[:missing]
        return " ".join([BEFORE, *filler, name] if last else [BEFORE, name, *filler])

    return write


def recaptioned(bank: MemoryBank, write: Callable[[str], str]) -> MemoryBank:
    """Return a bank of the same rows with other captions."""

    def batches():
        for batch in bank.batches():
            captions = pa.array([write(caption) for caption in batch["caption"].to_pylist()])
            yield batch.set_column(batch.schema.get_field_index("caption"), "caption", captions)

    return bank.with_rows(batches())


def scores(demo: Demo) -> dict[str, dict[str, Result]]:
    """Return what TinyAlign and text-only RAG, whole and cut at as many tokens, answer with captions of each kind."""
    ours = systems.train_system(demo, "tinyalign", "without")
    text = systems.train_system(demo, "text_rag", in_text=True, memory_top_k=0)
    found = {name: {"names alone": demo.results[name]["with"]} for name in ("tinyalign", "text_cut", "text_rag")}
    for title, (words, last) in WRITTEN.items():
        write, name = in_words(words, last), f"words_{tag(words, last, BEFORE, AFTER)}"
        demo.banks[name] = recaptioned(demo.banks["with"], write)
        demo.found[name] = demo.found["with"]
        found["tinyalign"][title] = evaluate(demo, "tinyalign", ours, name)
        whole = [[write(caption) for caption in row] for row in demo.captions("with")]
        for system, captions in (("text_cut", cut(text[1].tokenizer, whole)), ("text_rag", whole)):
            found[system][title] = systems.evaluate_system(
                demo, f"{system}_{name}", *text, captions=captions, answer=False
            )
    return found


def measure(study: Study) -> dict[int, dict[str, dict[str, Result]]]:
    """Return the scores by seed."""
    return {seed: scores(study.demo(seed)) for seed in study.of(SEEDS)}
