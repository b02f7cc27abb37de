"""Teach it with one picture: is this X, which one is it, and none of these, as personalised models are judged."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from study import Study, tag
from transformers import PreTrainedModel, ProcessorMixin

from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration
from tinyalign_vlm.modeling_tinyalign.outputs import probabilities
from tinyalign_vlm.training.bank.calibration import auroc, share_found
from tinyalign_vlm.training.data.chats import encode_chat, to_messages
from tinyalign_vlm.training.data.features import cache_vision_features
from tinyalign_vlm.training.data.neighbours import find_neighbours
from tinyalign_vlm.training.demo import systems
from tinyalign_vlm.training.demo.state import PROMPT, TOP_K, Demo, write_json
from tinyalign_vlm.training.evaluation.choices import score_answers
from tinyalign_vlm.training.hub.run_facts import RECORD_NAME, read_records, write_records

NUM_CONCEPTS = 100  # that are taught
NUM_ASKED = 40  # of them, and of pictures of nothing that was taught; all would take an hour more
OPTIONS = (5, 20, 100)
IS_THIS = "Is this {}?"
YES_NO = ["yes", "no"]
SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "or", "ix")]
FINE_TUNING_STEPS = 80  # of five rows, on two questions about each of the reference pictures: two epochs
EVALUATION_BATCH = 4


@dataclass
class Lesson:
    """A lesson, taught and asked, from a folder with lesson.json and its pictures.

    Attributes:
        concepts: reference picture by name.
        questions: dicts of `picture`, `question`, `options`, `answer` and `concept`; an answer of None is about a
            picture of nothing that was taught.
        features: vision features by picture.
    """

    concepts: dict[str, str]
    questions: list[dict]
    features: dict[str, np.ndarray]
    folder: Path

    @property
    def digest(self) -> str:
        """A name for what was found with this lesson and no other."""
        return hashlib.sha256((self.folder / "lesson.json").read_bytes()).hexdigest()[:8]

    @property
    def names(self) -> list[str]:
        return list(self.concepts)


def made_up_names(count: int, rng: np.random.Generator) -> list[str]:
    """Return different names that no model knows."""
    names = set()
    while len(names) < count:
        names.add("".join(rng.choice(SYLLABLES, rng.integers(2, 4))))
    return sorted(names)


def write_lesson(demo: Demo, folder: Path) -> None:
    """Write lesson.json and its pictures: held-out concepts under made-up names, drawings of concepts never taught."""
    if (folder / "lesson.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(demo.config.seed)
    taught = np.sort(rng.permutation(demo.pairs.heldout)[:NUM_CONCEPTS])
    unknown = np.sort(rng.permutation(np.setdiff1d(demo.pairs.heldout, taught))[:NUM_ASKED])
    names = rng.permutation(made_up_names(len(taught), rng)).tolist()
    for style, rows in (("noto", taught), ("twemoji", taught), ("twemoji", unknown)):
        for row, image in zip(rows, getattr(demo.pairs, style).select(rows)["image"], strict=True):
            (folder / f"{style}-{row}.webp").write_bytes(image["bytes"])
    queries = demo.features["twemoji"][taught].mean(1, dtype=np.float32)
    near = queries @ demo.features["noto"][taught].mean(1, dtype=np.float32).T
    np.fill_diagonal(near, -np.inf)
    questions = []
    for index in np.sort(rng.permutation(len(taught))[:NUM_ASKED]):
        row, name = taught[index], names[index]
        about = {"picture": f"twemoji-{row}.webp", "concept": name}
        for other, answer in ((name, "yes"), (names[near[index].argmax()], "no")):
            questions.append({**about, "question": IS_THIS.format(other), "options": YES_NO, "answer": answer})
        for count in OPTIONS:
            wrong = rng.permutation([other for other in names if other != name])[: count - 1].tolist()
            questions.append({**about, "question": PROMPT, "options": [name, *wrong], "answer": name})
    for row in unknown:
        about = {"picture": f"twemoji-{row}.webp", "concept": None}
        questions.append({**about, "question": PROMPT, "options": names, "answer": None})
    concepts = {name: f"noto-{row}.webp" for name, row in zip(names, taught, strict=True)}
    write_json(folder / "lesson.json", {"concepts": concepts, "questions": questions})


def read_lesson(demo: Demo, folder: Path) -> Lesson:
    """Read a lesson and look at its pictures."""
    content = json.loads((folder / "lesson.json").read_text())
    pictures = sorted({*content["concepts"].values(), *(question["picture"] for question in content["questions"])})
    model, processor = systems.compose_demo(demo.weights, demo.config, memory_top_k=0)
    paths = [str(folder / picture) for picture in pictures]
    features = cache_vision_features(model, processor, paths, demo.out / "features" / "lesson", desc="lesson")
    return Lesson(**content, features=dict(zip(pictures, features, strict=True)), folder=folder)


def chats_to_learn_from(demo: Demo) -> datasets.Dataset:
    """Return a chat about each training drawing: is this X (as often it is what looks like it), and what is it."""
    rng = np.random.default_rng(demo.config.seed)
    labels = demo.labels(demo.pairs.train)
    rows = []
    for label, near in zip(labels, demo.captions("train", "without"), strict=True):
        is_it = rng.random() < 0.5
        others = [name for name in near if name != label]
        claim = label if is_it or not others else others[0]
        rows.append(two_questions(claim, label))
    return datasets.Dataset.from_dict({"messages": rows})


def two_questions(claim: str, label: str) -> list[dict]:
    asked, said = to_messages(PROMPT, label)
    asked = {**asked, "content": asked["content"][1:]}
    return [*to_messages(IS_THIS.format(claim), YES_NO[claim != label]), asked, said]


def taught_bank(demo: Demo, lesson: Lesson) -> tuple[MemoryBank, dict[str, float]]:
    """Return the demo's bank with one picture of each concept added, and the seconds to teach and to forget one."""
    parts = systems.compose_demo(demo.weights, demo.config, memory_top_k=TOP_K)
    bank = demo.banks["without"]
    images = [Image.open(lesson.folder / picture) for picture in lesson.concepts.values()]
    taught = bank.add(images, *parts, captions=lesson.names, keep_duplicates=True)
    asked = next(question for question in lesson.questions if question["concept"] is not None)
    image = images[lesson.names.index(asked["concept"])]
    started = time.perf_counter()
    one = bank.add([image], *parts, captions=[asked["concept"]], keep_duplicates=True)
    seconds = {"teach": time.perf_counter() - started}
    started = time.perf_counter()
    forgotten = one.remove(len(one) - 1)
    seconds["forget"] = time.perf_counter() - started
    before, with_it, after = (
        logits(demo, found, lesson.features[asked["picture"]]) for found in (bank, one, forgotten)
    )
    differences = {"taught": with_it - before, "changed": after - before}
    return taught, seconds | {name: float(found.abs().max()) for name, found in differences.items()}


@torch.no_grad()
def logits(demo: Demo, bank: MemoryBank, features: np.ndarray) -> torch.Tensor:
    """Return the logits of "What is this?" about a picture, as the teacher has them with a bank."""
    model, processor = systems.train_system(demo, "teacher", "without")
    model.attach_memory_bank(bank, tokenizer=processor.tokenizer)
    prompt = encode_chat(processor, to_messages(PROMPT, "-")[:1], add_generation_prompt=True)[0]
    features = torch.from_numpy(np.array(features))[None]
    return model(input_ids=torch.tensor([prompt]), vision_features=features).logits


def fine_tuned(demo: Demo, lesson: Lesson) -> tuple[tuple[PreTrainedModel, ProcessorMixin], float]:
    """Return the baseline after training on the same pictures, and the seconds a concept."""
    _, processor = systems.compose_demo(demo.weights, demo.config, memory_top_k=0)
    final = demo.out / f"teacher_lora_{lesson.digest}_{FINE_TUNING_STEPS}" / "model"
    if (final / RECORD_NAME).exists():
        seconds = read_records(final)[0].seconds
        return (TinyAlignForConditionalGeneration.from_pretrained(final).eval(), processor), seconds / len(
            lesson.names
        )
    model = TinyAlignForConditionalGeneration.from_pretrained(demo.out / "teacher_baseline" / "model")
    rng = np.random.default_rng(demo.config.seed)
    rows, features = [], []
    for _ in range(2):
        for name in rng.permutation(lesson.names).tolist():
            claim = name if rng.random() < 0.5 else rng.choice([other for other in lesson.names if other != name])
            rows.append(two_questions(str(claim), name))
            features.append(lesson.features[lesson.concepts[name]])
    rows = datasets.Dataset.from_dict({"messages": rows})
    settings = systems.stage2_settings(demo.config) | {"max_steps": FINE_TUNING_STEPS}
    parts = {"processing_class": processor, "vision_features": np.stack(features)}
    record = systems.train_stage(demo, final.parent.name, 2, model, rows, settings, **parts)
    model.save_pretrained(final)
    write_records(final, [record])
    return (model, processor), record.seconds / len(lesson.names)


def likelihoods(
    demo: Demo, lesson: Lesson, system: str, model: tuple[PreTrainedModel, ProcessorMixin], bank: MemoryBank | None
) -> list[list[float]]:
    """Return the likelihood of each option of each question, kept in a file of the system's name."""
    path = demo.out / "lesson" / f"{lesson.digest}_{FINE_TUNING_STEPS}" / f"{system}.json"
    if path.exists():
        return json.loads(path.read_text())
    found: list[list[float]] = [[] for _ in lesson.questions]
    for count in sorted({len(question["options"]) for question in lesson.questions}):
        chosen = [index for index, question in enumerate(lesson.questions) if len(question["options"]) == count]
        asked = [lesson.questions[index] for index in chosen]
        features = np.stack([lesson.features[question["picture"]] for question in asked])
        messages = [to_messages(question["question"], "-")[:1] for question in asked]
        rows = datasets.Dataset.from_dict({"messages": messages})
        if bank is not None:
            model[0].attach_memory_bank(bank, tokenizer=model[1].tokenizer)
            rows = systems.add_neighbours(rows, find_neighbours(bank, model[0], features, TOP_K))
        options = [question["options"] for question in asked]
        scores = score_answers(*model, rows, options, bank, features, EVALUATION_BATCH, desc=f"{system}, {count}")
        for index, row in zip(chosen, scores.likelihoods, strict=True):
            found[index] = row.tolist()
    write_json(path, found)
    return found


def copied(lesson: Lesson, similarities: np.ndarray, pictures: list[str]) -> list[list[float]]:
    """Return what a rule without a language model says: similarity of each option's picture, yes if X is nearest."""
    near = dict(zip(pictures, similarities, strict=True))
    column = {name: index for index, name in enumerate(lesson.names)}
    found = []
    for question in lesson.questions:
        row = near[question["picture"]]
        if question["options"] == YES_NO:
            claim = question["question"].removeprefix("Is this ").removesuffix("?")
            found.append([float(row[column[claim]] >= row.max()), 0.5])
        else:
            found.append([float(row[column[name]]) for name in question["options"]])
    return found


def measures(lesson: Lesson, scores: list[list[float]], none: dict[str, float] | None = None) -> dict[str, np.ndarray]:
    """
    Return right or wrong of each question by kind: "positive", "negative", "5", "20", "100"; and the scores that a
    picture shows nothing that was taught: "known" and "unknown".

    Args:
        none: by picture. Without it, how unlikely the best name of all is.
    """
    found: dict[str, list[float]] = {}
    for question, row in zip(lesson.questions, scores, strict=True):
        best = question["options"][int(np.argmax(row))]
        doubt = -max(row) if none is None else none[question["picture"]]
        if question["options"] == YES_NO:
            kind = "positive" if question["answer"] == "yes" else "negative"
        else:
            kind = str(len(question["options"]))
        if question["answer"] is None:
            found.setdefault("unknown", []).append(doubt)
            continue
        found.setdefault(kind, []).append(float(best == question["answer"]))
        if kind == str(len(lesson.names)):
            found.setdefault("known", []).append(doubt)
    return {kind: np.array(values) for kind, values in found.items()}


def teach(study: Study) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Teach and ask all systems, and return measures by system, and seconds."""
    (seed,) = study.of((0,))
    demo, data = study.demo(seed), study.lesson
    if data is None:
        data = study.out / f"lesson_{tag(NUM_CONCEPTS, NUM_ASKED, OPTIONS, SYLLABLES)}"
        write_lesson(demo, data)
    lesson, rows = read_lesson(demo, data), chats_to_learn_from(demo)
    ours = systems.train_system(demo, "teacher", "without", rows=rows)
    baseline = systems.train_system(demo, "teacher_baseline", rows=rows, memory_top_k=0)
    bank, seconds = taught_bank(demo, lesson)
    lora, seconds["lora"] = fine_tuned(demo, lesson)
    pictures = sorted({question["picture"] for question in lesson.questions})
    features = np.stack([lesson.features[picture] for picture in pictures])
    only_taught = bank.remove(list(range(len(bank) - len(lesson.names))))
    near, ids = find_neighbours(only_taught, ours[0], features, len(lesson.names))
    similarities = np.take_along_axis(near, ids.argsort(1), 1)
    scores = find_neighbours(bank, ours[0], features, TOP_K)[0]
    none = probabilities(demo.banks["without"].config.calibration, torch.from_numpy(scores))[1].numpy()
    none = dict(zip(pictures, none.tolist(), strict=True))
    found = {
        "ours": measures(lesson, likelihoods(demo, lesson, "ours", ours, bank), none),
        "lora": measures(lesson, likelihoods(demo, lesson, "lora", lora, None)),
        "copy": measures(lesson, copied(lesson, similarities, pictures)),
        "baseline": measures(lesson, likelihoods(demo, lesson, "baseline", baseline, None)),
    }
    return found, seconds


def none_of_these(found: dict[str, np.ndarray]) -> tuple[float, float] | None:
    """Return how well pictures never taught are told apart: AUROC, and the share found at 5% false alarms.

    None for a lesson without such pictures, or without a question that has all names as options.
    """
    if not {"known", "unknown"} <= found.keys():
        return None
    return auroc(found["unknown"], found["known"]), share_found(found["known"], found["unknown"])
