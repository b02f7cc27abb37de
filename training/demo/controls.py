"""Controls without training: rules that copy a name, compare words, or read more than a bank says."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .pairs import stems
from .state import BANKS, TOP_K, Demo, Result

# A number for an option and what a bank says of the neighbours, nearest first; the option with the most is chosen.
Rule = Callable[[str, Sequence], float]


def run_controls(demo: Demo, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the results of the rules into the demo: "copy", "rule" and "answer_key"."""
    rules = caption_rules(model, tokenizer)
    demo.results |= {"copy": {}, "rule": {}, "answer_key": {}}
    labels = demo.labels(demo.queried)
    for bank in BANKS:
        captions = demo.captions(bank)
        copied = [names[0] == label for names, label in zip(captions, labels, strict=True)]
        demo.results["copy"][bank] = Result(exact_match=np.array(copied, float))
        choices = [choices_by(rule, demo, captions) for rule in rules]
        best = max(choices, key=np.mean)
        demo.results["rule"][bank] = Result(choice=best)
        concepts = demo.concepts[bank][demo.found[bank][1][:, :TOP_K]]
        keys = [[demo.pairs.keywords[concept] for concept in row] for row in concepts]
        of_nearest = choices_by(lambda option, near: option in near[0], demo, keys)
        demo.results["answer_key"][bank] = Result(choice=of_nearest, exact_match=np.array(copied, float))


def choices_by(rule: Rule, demo: Demo, neighbours: Sequence[Sequence]) -> np.ndarray:
    """Return for each question 1 where a rule takes the right option, and its share where several are equally good."""
    chosen = []
    for query in demo.asked:
        scores = np.array([rule(option, neighbours[query]) for option in demo.options[query]], float)
        best = np.isclose(scores, scores.max())
        chosen.append(best[0] / best.sum())
    return np.array(chosen)


def caption_rules(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Rule]:
    """Return rules that read names alone: words in common, and how near the language model's embeddings are."""
    table = model.get_input_embeddings().weight.detach().float()
    table = table - table.mean(0)  # what all embeddings have in common says nothing
    known: dict[str, torch.Tensor] = {}

    def embed(text: str) -> torch.Tensor:
        if text not in known:
            ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            known[text] = F.normalize(table[ids].mean(0), dim=0)
        return known[text]

    return [
        lambda option, names: len(stems(option) & stems(names[0])),
        lambda option, names: sum(len(stems(option) & stems(name)) for name in names),
        lambda option, names: float(embed(option) @ embed(names[0])),
        lambda option, names: sum(float(embed(option) @ embed(name)) for name in names),
    ]
