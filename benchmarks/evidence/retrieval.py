"""Changes of what TinyAlign retrieves at inference: more and fewer rows, neighbours, another tower, other pictures."""

from io import BytesIO

import numpy as np
import torch
from openclipart import NUM_DISTRACTORS, ClipArt, art_tag, bank_of_clip_art, bank_with_clip_art
from PIL import Image
from study import Study, add_bank, evaluate, tag
from transformers import PreTrainedModel, ProcessorMixin

from tinyalign_vlm.training.demo import run, systems
from tinyalign_vlm.training.demo.state import PROMPT, TOP_K, Demo

SEEDS = (0, 1, 2)
BANK_SHARES = (0.1, 0.25, 0.5, 1.0)
PIXELS = 12  # side of the pictures that are compared as another, weak tower's features


def trained(demo: Demo) -> tuple[PreTrainedModel, ProcessorMixin]:
    return systems.train_system(demo, "tinyalign", "without")


def recall(demo: Demo, bank: str) -> float:
    """Return the share of queries that have a right row among their neighbours."""
    concepts, found = demo.concepts[bank], demo.found[bank]
    is_right = demo.is_right(concepts, found, demo.queried) & (concepts[found[1]] >= 0)
    return float(is_right[:, :TOP_K].any(1).mean())


def bank_sizes(demo: Demo) -> dict[str, float]:
    """Evaluate with a part of the bank's rows, and with all rows and others; return recall by the bank's name."""
    model, (bank, concepts) = trained(demo), (demo.banks["with"], demo.concepts["with"])
    order = np.random.default_rng(demo.config.seed).permutation(len(bank))
    found = {}
    for share in BANK_SHARES[:-1]:
        rows = np.sort(order[: round(share * len(bank))])
        part = bank.remove(np.setdiff1d(order, rows).tolist())
        found[f"size_{share:.0%}"] = part, concepts[rows]
    found["size_distractors"] = with_distractors(demo)
    recalls = {"with": recall(demo, "with")}
    for name, (part, shown) in found.items():
        add_bank(demo, name, part, shown)
        recalls[name] = recall(demo, name)
        demo.results["tinyalign"][name] = evaluate(demo, "tinyalign", model, name)
    return recalls


def with_distractors(demo: Demo):
    """Return the bank with the validation concepts added, which no query asks for, and its rows' concepts."""
    concepts = demo.pairs.validation
    parts = systems.compose_demo(demo.weights, demo.config, memory_top_k=TOP_K)
    rows, features = demo.pairs.noto.select(concepts), demo.features["noto"][concepts]
    bank = demo.banks["with"].add(rows, *parts, caption_column="label", keep_duplicates=True, vision_features=features)
    return bank, np.concatenate([demo.concepts["with"], concepts])


def clip_art_distractors(study: Study, art: ClipArt) -> dict[int, float]:
    """Evaluate with clip art added to the bank, for all seeds, and return recalls."""
    recalls = {}
    for seed in study.of(SEEDS):
        demo, name = study.demo(seed), f"size_openclipart_{tag(NUM_DISTRACTORS, art_tag(study))}"
        add_bank(demo, name, *bank_with_clip_art(demo, art))
        recalls[seed] = recall(demo, name)
        demo.results["tinyalign"]["size_openclipart"] = evaluate(demo, "tinyalign", trained(demo), name)
    return recalls


def clip_art_alone(study: Study, art: ClipArt) -> None:
    """Evaluate with a bank of clip art alone, for all seeds."""
    bank, name = bank_of_clip_art(study, art), f"openclipart_{art_tag(study)}"
    for demo in map(study.demo, study.seeds):
        add_bank(demo, name, bank, np.full(len(bank), -1))
        demo.results["tinyalign"]["openclipart"] = evaluate(demo, "tinyalign", trained(demo), name)


def fewer_neighbours(demo: Demo) -> None:
    """Evaluate with fewer neighbours than the model was trained with."""
    scores, ids = demo.found["with"]
    for top_k in range(1, TOP_K):
        name = f"top_{top_k}"
        used = np.arange(ids.shape[1]) < top_k
        demo.banks[name], demo.concepts[name] = demo.banks["with"], demo.concepts["with"]
        demo.found[name] = np.where(used, scores, -np.inf).astype(np.float32), np.where(used, ids, -1)
        demo.results["tinyalign"][name] = evaluate(demo, "tinyalign", trained(demo), name)


def other_tower(demo: Demo) -> float:
    """Evaluate with neighbours that a weak tower finds, the small picture itself; return their recall."""
    bank = demo.banks["with"]
    keys = small_pictures(demo.pairs.noto[row]["image"] for row in demo.concepts["with"])
    queries = small_pictures(demo.pairs.twemoji[row]["image"] for row in demo.queried)
    scores = queries @ keys.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :32]
    name = f"other_tower_{PIXELS}"
    demo.banks[name], demo.concepts[name] = bank, demo.concepts["with"]
    demo.found[name] = np.take_along_axis(scores, ids, 1).astype(np.float32), ids
    demo.results["tinyalign"]["other_tower"] = evaluate(demo, "tinyalign", trained(demo), name)
    return recall(demo, name)


def language_queries(study: Study) -> dict[int, dict[str, float]]:
    """Evaluate with keys in the language model's space, the question in the query and not; return recalls.

    Keys and queries go through the baseline's trained connector; a key has its row's caption in it (paper, eq. 4).
    The model is TinyAlign as trained, and reads the captions of the rows that are found.
    """
    recalls = {}
    for seed in study.of(SEEDS):
        demo = study.demo(seed)
        baseline, _ = systems.train_system(demo, "baseline", memory_top_k=0)
        model, processor = systems.compose_demo(demo.weights, demo.config, key_space="language")
        model.model.connector.load_state_dict(baseline.model.connector.state_dict())
        drawings, concepts = demo.pairs.noto, demo.concepts["with"]
        settings = {"whiten_dim": run.key_settings(concepts)["whiten_dim"]}
        bank = run.make_bank(model, processor, drawings, demo.features["noto"], concepts, **settings)
        pictures = torch.from_numpy(np.array(demo.features["queries"]))
        questions = {"image": {}, "question": processor.query_inputs([PROMPT] * len(pictures))}
        recalls[seed] = {"with": recall(demo, "with")}
        for name, question in questions.items():
            scores, ids = bank.search(bank.encode_queries(pictures, **question), run.SEARCHED)
            name = f"query_{name}"
            demo.banks[name], demo.concepts[name] = demo.banks["with"], concepts
            demo.found[name] = scores.numpy(), ids.numpy()
            demo.results["tinyalign"][name] = evaluate(demo, "tinyalign", trained(demo), name)
            recalls[seed][name] = recall(demo, name)
    return recalls


def small_pictures(images) -> np.ndarray:
    """Return `(n, 12 * 12 * 3)`, unit length: stored images made small, their mean taken away."""
    rows = []
    for image in images:
        small = Image.open(BytesIO(image["bytes"])).convert("RGB").resize((PIXELS, PIXELS))
        rows.append(np.asarray(small, float).ravel())
    rows = np.array(rows)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-6)


def all_changes(study: Study) -> dict[int, dict[str, float]]:
    """Evaluate everything above for all seeds, once, and return recalls; results go into the demos' tables."""
    for seed in study.of(SEEDS):
        if seed not in study.recalls:
            demo = study.demo(seed)
            demo.results["tinyalign"] = dict(demo.results["tinyalign"])
            study.recalls[seed] = bank_sizes(demo)
            fewer_neighbours(demo)
            study.recalls[seed]["other_tower"] = other_tower(demo)
    return study.recalls
