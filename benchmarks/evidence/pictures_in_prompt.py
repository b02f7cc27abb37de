"""The neighbours themselves in the prompt: their visual tokens and their captions, in training and after."""

from collections.abc import Sequence
from dataclasses import asdict, replace

import datasets
import numpy as np
import torch
from study import Study
from transformers import PreTrainedModel, ProcessorMixin

from tinyalign_vlm.training.arguments.stage import bfloat16_is_fast
from tinyalign_vlm.training.data.chats import to_messages
from tinyalign_vlm.training.demo import systems
from tinyalign_vlm.training.demo.state import BANKS, PROMPT, TOP_K, Demo, Result, write_json
from tinyalign_vlm.training.stages.precision import bfloat16_language_model

SEEDS = (0, 1, 2)  # 3 minutes each
NAME = "pictures_in_prompt"


def show_neighbours(messages: list[dict], captions: list[str]) -> list[dict]:
    """Put a picture and its caption for each neighbour before the question and its own picture."""
    first, *later = messages
    shown = []
    for caption in captions:
        shown += [{"type": "image"}, {"type": "text", "text": f"{caption}\n"}]
    return [{**first, "content": [*shown, *first["content"]]}, *later]


def pictures_of(demo: Demo, bank: str) -> list[list[int]]:
    """Return which drawings the neighbours of each query show, as rows of `demo.features["noto"]`."""
    return demo.concepts[bank][demo.found[bank][1][:, :TOP_K]].tolist()


def trained(demo: Demo) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Train the system on the demo's rows, in as many steps as the others, with its neighbours in each prompt."""
    train = demo.pairs.train
    chats = systems.chats(demo.labels(train), demo.keywords(train))["messages"]
    messages = map(show_neighbours, chats, demo.training_captions())
    own, concepts = len(demo.features["noto"]) + np.arange(len(train)), demo.concepts["without"]
    near = [concepts[ids].tolist() for ids in demo.training_neighbours()]
    indices = [[*shown, int(row)] for shown, row in zip(near, own, strict=True)]
    rows = datasets.Dataset.from_dict({"messages": list(messages), "feature_index": indices})
    features = np.concatenate([demo.features["noto"], demo.features["train"]])
    view = replace(demo, features=demo.features | {"train": features})
    return systems.train_system(view, NAME, rows=rows, memory_top_k=0)


def evaluate(demo: Demo, model: PreTrainedModel, processor: ProcessorMixin, bank: str) -> Result:
    """Return what the system answers to the queries with the neighbours of a bank, kept in a file."""
    path = demo.out / "evaluation" / f"{NAME}_{bank}.json"
    if path.exists():
        return systems.read_result(path)
    features = np.concatenate([demo.features["noto"], demo.features["queries"]])
    near, captions, first = pictures_of(demo, bank), demo.captions(bank), len(demo.features["noto"])

    def ask(prompt: str, rows: Sequence[int]) -> datasets.Dataset:
        messages = [show_neighbours(to_messages(prompt, "-")[:1], captions[row]) for row in rows]
        indices = [[*near[row], first + int(row)] for row in rows]
        return datasets.Dataset.from_dict({"messages": messages, "feature_index": indices})

    settings = {"vision_features": features, "batch_size": systems.BATCH_SIZE, "desc": NAME}
    with bfloat16_language_model(model, enabled=bfloat16_is_fast(use_cpu=not torch.cuda.is_available())):
        result = systems.score_system(demo, model, processor, ask, **settings)
    result.tokens = systems.prompt_tokens(processor, ask(PROMPT, demo.answered))
    write_json(path, asdict(result))
    return result


def compare(study: Study) -> None:
    """Add the system to the results of the demos."""
    for seed in study.of(SEEDS):
        demo = study.demo(seed)
        model = trained(demo)
        demo.results[NAME] = {bank: evaluate(demo, *model, bank) for bank in BANKS}
