"""The neighbours themselves in the prompt: captions in lines, alone and with visual tokens, in training and after."""

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
# Of how many neighbours the pictures stand in the prompt, by system; captions stand there of all.
SYSTEMS = {"lines_in_prompt": 0, "pictures_in_prompt": TOP_K, "nearest_picture_in_prompt": 1}


def show_neighbours(messages: list[dict], captions: list[str], pictures: int) -> list[dict]:
    """Put the caption of each neighbour, and the pictures of the first, before the question and its own picture."""
    first, *later = messages
    shown = []
    for place, caption in enumerate(captions):
        if place < pictures:
            shown.append({"type": "image"})
        shown.append({"type": "text", "text": f"{caption}\n"})
    return [{**first, "content": [*shown, *first["content"]]}, *later]


def pictures_of(demo: Demo, bank: str, pictures: int) -> list[list[int]]:
    """Return which drawings the first neighbours of each query show, as rows of `demo.features["noto"]`."""
    return demo.concepts[bank][demo.found[bank][1][:, :pictures]].tolist()


def trained(demo: Demo, name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Train a system on the demo's rows, in as many steps as the others, with its neighbours in each prompt."""
    train = demo.pairs.train
    chats = systems.chats(demo.labels(train), demo.keywords(train))["messages"]
    captions, pictures = demo.training_captions(), SYSTEMS[name]
    messages = [show_neighbours(chat, said, pictures) for chat, said in zip(chats, captions, strict=True)]
    own, concepts = len(demo.features["noto"]) + np.arange(len(train)), demo.concepts["without"]
    near = [concepts[ids[:pictures]].tolist() for ids in demo.training_neighbours()]
    indices = [[*shown, int(row)] for shown, row in zip(near, own, strict=True)]
    rows = datasets.Dataset.from_dict({"messages": messages, "feature_index": indices})
    features = np.concatenate([demo.features["noto"], demo.features["train"]])
    view = replace(demo, features=demo.features | {"train": features})
    return systems.train_system(view, name, rows=rows, memory_top_k=0)


def evaluate(demo: Demo, name: str, model: tuple[PreTrainedModel, ProcessorMixin], bank: str) -> Result:
    """Return what a system answers to the queries with the neighbours of a bank, kept in a file."""
    path = demo.out / "evaluation" / f"{name}_{bank}.json"
    if path.exists():
        return systems.read_result(path)
    features = np.concatenate([demo.features["noto"], demo.features["queries"]])
    pictures = SYSTEMS[name]
    near, captions, first = pictures_of(demo, bank, pictures), demo.captions(bank), len(demo.features["noto"])

    def ask(prompt: str, rows: Sequence[int]) -> datasets.Dataset:
        messages = [show_neighbours(to_messages(prompt, "-")[:1], captions[row], pictures) for row in rows]
        indices = [[*near[row], first + int(row)] for row in rows]
        return datasets.Dataset.from_dict({"messages": messages, "feature_index": indices})

    settings = {"vision_features": features, "batch_size": systems.BATCH_SIZE, "desc": name}
    with bfloat16_language_model(model[0], enabled=bfloat16_is_fast(use_cpu=not torch.cuda.is_available())):
        result = systems.score_system(demo, *model, ask, **settings)
    result.tokens = systems.prompt_tokens(model[1], ask(PROMPT, demo.answered))
    write_json(path, asdict(result))
    return result


def compare(study: Study) -> None:
    """Add the systems to the results of the demos."""
    for seed in study.of(SEEDS):
        demo = study.demo(seed)
        for name in SYSTEMS:
            model = trained(demo, name)
            demo.results[name] = {bank: evaluate(demo, name, model, bank) for bank in BANKS}
