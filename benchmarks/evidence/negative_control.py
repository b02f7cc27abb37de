"""Pictures that say all (easy-vqa): a shape in a colour. Memory has nothing to add, and must cost nothing."""

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
import torch
from study import Study, tag
from transformers import PreTrainedModel, ProcessorMixin

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.arguments.stage import bfloat16_is_fast
from tinyalign_vlm.training.data.chats import to_messages
from tinyalign_vlm.training.data.features import cache_vision_features
from tinyalign_vlm.training.data.neighbours import find_neighbours
from tinyalign_vlm.training.demo import systems
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.state import TOP_K, Clock, Demo, DemoConfig, write_json
from tinyalign_vlm.training.evaluation.bootstrap import Interval, bootstrap_interval
from tinyalign_vlm.training.evaluation.choices import score_answers
from tinyalign_vlm.training.stages.precision import bfloat16_language_model

SEEDS = (0,)  # 15 minutes each
INSTALL = "pip install easy-vqa==1.0"
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("shape", "color", "yes/no")
BANKS = ("own", "foreign", "off")
PUBLISHED_BLIND = 0.667  # of all test questions, answered from their words
# Chosen on validation questions. `split="validation"` asks them again.
CONFIG = DemoConfig(stage1_steps=20, stage2_steps=150, batch_size=4, split="test")
NUM_TRAIN, NUM_BANK, NUM_ASKED = 400, 300, 100  # pictures
YES_NO_A_CHAT = 3  # in training, before a question for the colour and one for the shape
QUESTIONS_A_PICTURE = 2  # when it is asked
# One visual token, and memory tokens for four captions of the longest kind, "a teal rectangle".
BASELINE = {"vision_pool_size": 1, "memory_top_k": 0}
TINYALIGN = {"vision_pool_size": 1, "memory_tokens": 24}


@dataclass
class Drawings:
    """Pictures with their questions and answers.

    Attributes:
        paths: of the pictures.
        questions: `(question, answer)` of each picture, as many as it has.
    """

    paths: list[str]
    questions: list[list[tuple[str, str]]]

    def select(self, rows: Sequence[int]) -> "Drawings":
        return Drawings([self.paths[row] for row in rows], [self.questions[row] for row in rows])


@dataclass
class Data:
    """The parts of easy-vqa that are used.

    Attributes:
        train, bank, asked: pictures to train on, for the bank, and to ask about.
        lessons: the questions and answers of one chat about each picture of `train`.
        questions: number of the picture in `asked`, question and answer, for all that is asked.
        blind: the most frequent answer to each of these questions, whatever the picture.
    """

    train: Drawings
    bank: Drawings
    asked: Drawings
    lessons: list[list[tuple[str, str]]]
    questions: list[tuple[int, str, str]]
    blind: list[str]


def is_installed() -> bool:
    return importlib.util.find_spec("easy_vqa") is not None


def read_drawings(part: str) -> Drawings:
    """Read the pictures of a part, `"train"` or `"test"`, from the installed package."""
    package = importlib.import_module("easy_vqa")
    reader = {
        "train": (package.get_train_image_paths, package.get_train_questions),
        "test": (package.get_test_image_paths, package.get_test_questions),
    }
    paths, asked = (read() for read in reader[part])
    questions = {number: [] for number in sorted(paths)}
    for question, answer, number in zip(*asked, strict=True):
        questions[number].append((question, answer))
    return Drawings([paths[number] for number in questions], list(questions.values()))


def load_data(config: DemoConfig) -> Data:
    """Draw the parts at random. Validation questions are about training pictures that nothing else is made of."""
    rng = np.random.default_rng(config.seed)
    known = read_drawings("train")
    captioned = [row for row, questions in enumerate(known.questions) if caption_of(questions) is not None]
    order = rng.permutation(captioned)
    train, bank, validation = np.split(order, [NUM_TRAIN, NUM_TRAIN + NUM_BANK])
    if config.split == "validation":
        asked = known.select(validation[:NUM_ASKED])
    else:
        test = read_drawings("test")
        asked = test.select(rng.permutation(len(test.paths))[:NUM_ASKED])
    questions = [
        (number, *pairs[row])
        for number, pairs in enumerate(asked.questions)
        for row in rng.permutation(len(pairs))[:QUESTIONS_A_PICTURE]
    ]
    blind = blind_answers(known, [question for _, question, _ in questions])
    train = known.select(train)
    lessons = [lesson_about(pairs, rng) for pairs in train.questions]
    return Data(train, known.select(bank), asked, lessons, questions, blind)


def kind_of(answer: str) -> str:
    """Return the kind of the question that has this answer."""
    if answer in SHAPES:
        return "shape"
    return "color" if answer in COLORS else "yes/no"


def caption_of(questions: Sequence[tuple[str, str]]) -> str | None:
    """Return what the picture shows, "a red circle", or None where its questions do not tell."""
    shown = set()
    for question, answer in questions:
        words = question.rstrip("?").split()
        is_denied = "not" in words or "no" in words
        if kind_of(answer) != "yes/no":
            shown |= {*words, answer}
        elif (answer == "yes") != is_denied:
            shown |= set(words)
    color, shape = shown & set(COLORS), shown & set(SHAPES)
    if not (color and shape):
        return None
    return f"a {min(color)} {min(shape)}"


def blind_answers(known: Drawings, questions: Sequence[str]) -> list[str]:
    """Return the most frequent answer to each question, whatever the picture."""
    counts: dict[str, Counter] = {}
    for asked in known.questions:
        for question, answer in asked:
            counts.setdefault(question, Counter())[answer] += 1
    return [counts[question].most_common(1)[0][0] for question in questions]


def lesson_about(questions: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return the questions of one training chat: yes or no comes first, for it says least about later answers."""
    by_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for row in rng.permutation(len(questions)):
        by_kind[kind_of(questions[row][1])].append(questions[row])
    return by_kind["yes/no"][:YES_NO_A_CHAT] + by_kind["color"][:1] + by_kind["shape"][:1]


def to_chat(questions: Sequence[tuple[str, str]]) -> list[dict]:
    """Return a chat about one picture, which stands in the first turn."""
    messages = []
    for question, answer in questions:
        asked, said = to_messages(question, answer)
        if messages:
            asked = {**asked, "content": asked["content"][1:]}
        messages += [asked, said]
    return messages


def prepare(study: Study, seed: int) -> tuple[Demo, Data]:
    """Return a demo about easy-vqa with features, banks and neighbours, and its data, without training.

    Banks: `"own"` has other training pictures and says what they show; `"foreign"` is that of the emoji; `"off"` is
    none.
    """
    config = replace(CONFIG, seed=seed)
    kept = tag(CONFIG, NUM_TRAIN, NUM_BANK, NUM_ASKED, YES_NO_A_CHAT, QUESTIONS_A_PICTURE, BASELINE, TINYALIGN)
    folder = study.out / f"seed{seed}" / f"easy_vqa_{kept}"
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(folder, False, config, load_pairs(seed), study.weights, Clock(folder / "clock.json"))
    data = load_data(config)
    model, processor = systems.compose_demo(demo.weights, config, **TINYALIGN)
    for name in ("train", "bank", "asked"):
        paths = vars(data)[name].paths
        demo.features[name] = cache_vision_features(model, processor, paths, folder / "features" / name, desc=name)
    captions = [caption_of(questions) for questions in data.bank.questions]
    rows = datasets.Dataset.from_dict({"image": data.bank.paths, "caption": captions})
    rows = rows.cast_column("image", datasets.Image())
    demo.banks["own"] = MemoryBank.build(
        rows, model, processor, keep_duplicates=True, vision_features=demo.features["bank"]
    )
    demo.banks["foreign"] = MemoryBank.from_pretrained(study.finished / "bank_with_heldout")
    demo.found["train"] = find_neighbours(demo.banks["own"], model, demo.features["train"], 2 * TOP_K)
    for name in ("own", "foreign"):
        demo.found[name] = find_neighbours(demo.banks[name], model, demo.features["asked"], TOP_K)
    scores, ids = demo.found["own"]
    demo.banks["off"] = demo.banks["own"]
    demo.found["off"] = np.full_like(scores, -np.inf), np.full_like(ids, -1)
    demo.clock("features, banks and neighbours")
    return demo, data


def right_answers(
    demo: Demo, data: Data, name: str, model: tuple[PreTrainedModel, ProcessorMixin], bank: str | None
) -> np.ndarray:
    """Return 1 for each question whose right answer is what the model says, else 0; kept in a file of this name."""
    path = demo.out / "evaluation" / f"{name}.json"
    if path.exists():
        return np.array(json.loads(path.read_text()))
    pictures, questions, answers = zip(*data.questions, strict=True)
    messages = [to_messages(question, "-")[:1] for question in questions]
    rows, read = datasets.Dataset.from_dict({"messages": messages, "feature_index": pictures}), None
    if bank is not None:
        read = demo.banks[bank]
        model[0].attach_memory_bank(read, tokenizer=model[1].tokenizer)
        rows = systems.add_neighbours(rows, [part[list(pictures)] for part in demo.found[bank]])
    with bfloat16_language_model(model[0], enabled=bfloat16_is_fast(use_cpu=not torch.cuda.is_available())):
        scores = score_answers(
            *model, rows, [[answer] for answer in answers], read, demo.features["asked"], systems.BATCH_SIZE, desc=name
        )
    right = scores.is_greedy[:, 0].astype(float)
    write_json(path, right)
    demo.clock(f"{name} evaluated")
    return right


@dataclass
class Answers:
    """Right answers to the questions that were asked.

    Attributes:
        right: by system, 1 or 0 for each question: `"blind"`, `"baseline"`, and TinyAlign by bank.
        kinds, pictures: of the questions, one of `KINDS` and the path of the picture.
        recall: share of the pictures whose nearest neighbour in the own bank shows the same.
    """

    right: dict[str, np.ndarray]
    kinds: np.ndarray
    pictures: np.ndarray
    recall: float

    def score(self, system: str, kind: str | None = None, minus: str | None = None) -> Interval:
        """Return the accuracy of a system, in questions of one kind or all, or by how much it is above another's."""
        values = self.right[system] - (0 if minus is None else self.right[minus])
        chosen = np.full(len(values), True) if kind is None else self.kinds == kind
        return bootstrap_interval(values[chosen], self.pictures[chosen])


def compare(study: Study) -> Answers:
    """Train the baseline and TinyAlign, and ask them with each bank; the answers of all seeds are put together."""
    found = [compare_one(study, seed) for seed in study.of(SEEDS)]
    return Answers(
        {system: np.concatenate([answers.right[system] for answers in found]) for system in found[0].right},
        np.concatenate([answers.kinds for answers in found]),
        np.concatenate([answers.pictures for answers in found]),
        float(np.mean([answers.recall for answers in found])),
    )


def compare_one(study: Study, seed: int) -> Answers:
    """Return the answers of one seed."""
    demo, data = prepare(study, seed)
    rows = datasets.Dataset.from_dict({"messages": [to_chat(lesson) for lesson in data.lessons]})
    numbers, _, answers = zip(*data.questions, strict=True)
    right = {"blind": (np.array(data.blind) == np.array(answers)).astype(float)}
    baseline = systems.train_system(demo, "baseline", rows=rows, **BASELINE)
    right["baseline"] = right_answers(demo, data, "baseline", baseline, None)
    ours = systems.train_system(demo, "tinyalign", "own", rows=rows, **TINYALIGN)
    for bank in BANKS:
        right[bank] = right_answers(demo, data, f"tinyalign_{bank}", ours, bank)
    kinds = [kind_of(answer) for answer in answers]
    pictures = [data.asked.paths[number] for number in numbers]
    return Answers(right, np.array(kinds), np.array(pictures), recall(demo, data))


def recall(demo: Demo, data: Data) -> float:
    """Return the share of pictures whose nearest neighbour in the own bank shows the same."""
    nearest = [rows[0]["caption"] for rows in demo.banks["own"].rows(demo.found["own"][1][:, :1])]
    is_same = []
    for near, questions in zip(nearest, data.asked.questions, strict=True):
        shown = caption_of(questions)
        if shown is not None:
            is_same.append(near == shown)
    return float(np.mean(is_same))
