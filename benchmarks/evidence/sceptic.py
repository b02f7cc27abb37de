"""Rivals of today: text in the prompt, fine-tuning on the bank's own rows, and rules without a language model."""

import time
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from study import Study, asking_about, tag
from transformers import PreTrainedModel, ProcessorMixin

from tinyalign_vlm import TinyAlignForConditionalGeneration
from tinyalign_vlm.modeling_tinyalign.outputs import probabilities
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.training_rows import training_rows
from tinyalign_vlm.training.demo import systems
from tinyalign_vlm.training.demo.state import BANKS, PROMPT, TOP_K, Demo, Result, write_json
from tinyalign_vlm.training.evaluation.answers import greedy_answers
from tinyalign_vlm.training.evaluation.choices import score_answers
from tinyalign_vlm.training.hub.run_facts import RECORD_NAME, read_records, write_records

SEEDS = (0, 1, 2)  # 12 minutes each
TAUGHT = 100  # concepts whose teaching is timed
NONE_RIGHT = 0.5  # above this probability that no neighbour is right, the rule says nothing of the bank
# With the baseline's training more seconds than TinyAlign's and adding all rows to its bank, on 2 cores with AVX-512.
STEPS, FULL_STEPS = 180, 148
FULL_LEARNING_RATE = 5e-5
# Fine-tuned systems: is the whole language model trained, and do rows of training concepts come between?
FINE_TUNED = {
    "lora": (False, False),
    "lora_negatives": (False, True),
    "full": (True, False),
    "full_negatives": (True, True),
}


def folder_of(name: str) -> str:
    """Return the name under which a fine-tuned system and its answers are kept."""
    return f"fine_tuned_{name}_{tag(STEPS, FULL_STEPS, FULL_LEARNING_RATE)}"


def fine_tuned(demo: Demo, name: str, full: bool, negatives: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return the baseline after training on the bank's drawings of the concepts that are asked about."""
    _, processor = systems.compose_demo(demo.weights, demo.config, memory_top_k=0)
    final = demo.out / folder_of(name) / "model"
    if (final / RECORD_NAME).exists():
        return TinyAlignForConditionalGeneration.from_pretrained(final).eval(), processor
    model = TinyAlignForConditionalGeneration.from_pretrained(demo.out / "baseline" / "model")
    rng = np.random.default_rng(demo.config.seed)
    taught = rng.permutation(demo.pairs.heldout)
    labels, features = demo.labels(taught), demo.features["noto"][taught]
    if negatives:  # one of each, in turn, drawn in the same style: it must not tell them apart
        others = rng.permutation(demo.pairs.train)[: len(taught)]
        labels = [name for pair in zip(labels, demo.labels(others), strict=True) for name in pair]
        features = np.stack([features, demo.features["noto"][others]], 1).reshape(-1, *features.shape[1:])
    settings = systems.stage2_settings(demo.config) | {"max_steps": STEPS}
    if full:
        settings |= {"tune_language_model": "full", "max_steps": FULL_STEPS, "learning_rate": FULL_LEARNING_RATE}
        del settings["lora_r"], settings["lora_dropout"]
    rows = systems.chats(labels)
    record = systems.train_stage(
        demo, final.parent.name, 2, model, rows, settings, processing_class=processor, vision_features=features
    )
    model.save_pretrained(final)
    write_records(final, [record])
    return model, processor


def num_taught(demo: Demo, name: str) -> int:
    """Return how many of the bank's concepts a fine-tuned system has seen."""
    full, negatives = FINE_TUNED[name]
    rows = (FULL_STEPS if full else STEPS) * demo.config.batch_size // (1 + negatives)
    return min(rows, len(demo.pairs.heldout))


def answers_of(demo: Demo, model: PreTrainedModel, processor: ProcessorMixin, name: str, **read) -> list[str]:
    """Return greedy answers to "What is this?" about all queries; `read` is as of `questions`."""
    path = demo.out / "answers" / f"{name}.json"
    if path.exists():
        return datasets.load_dataset("json", data_files=str(path), split="train")["answer"]
    bank = read.get("bank")
    if bank is not None:
        model.attach_memory_bank(demo.banks[bank], tokenizer=processor.tokenizer)
    rows = systems.questions(demo, PROMPT, range(len(demo.queried)), bank, read.get("captions"))
    features, attached = demo.features["queries"], demo.banks[bank] if bank else None
    rows = training_rows(model, rows, attached, features)
    collator = TrainingCollator(processor, features, attached)
    answers = []
    for start in range(0, len(rows), systems.BATCH_SIZE):
        batch = [rows[index] for index in range(start, min(start + systems.BATCH_SIZE, len(rows)))]
        images = collator.image_inputs(batch, [1] * len(batch))
        chats = [row["messages"] for row in batch]
        answers += greedy_answers(model, processor, chats, images, systems.ANSWER_TOKENS)[0]
    write_json(path, [{"answer": answer} for answer in answers])
    return answers


def share_of_taught(demo: Demo, answers: Sequence[str]) -> float:
    """Return the share of answers that are the name of a taught concept."""
    taught = set(demo.labels(demo.pairs.heldout))
    return float(np.mean([answer in taught for answer in answers]))


def chosen_by_likelihood(
    demo: Demo, model: PreTrainedModel, processor: ProcessorMixin, bank: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the retrieved name that the untouched baseline finds the likeliest, right or wrong for each query, and
    whether it says one at all: not where most likely none of them is right.
    """
    names = demo.captions(bank)
    questions = systems.questions(demo, PROMPT, range(len(names)), None, None)
    scores = score_answers(
        model, processor, questions, names, vision_features=demo.features["queries"], batch_size=systems.BATCH_SIZE
    )
    taken = np.array(names)[np.arange(len(names)), scores.likelihoods.argmax(1)]
    calibration = demo.banks["with"].config.calibration
    none = probabilities(calibration, torch.from_numpy(demo.found[bank][0][:, :TOP_K]))[1].numpy()
    speaks = none <= NONE_RIGHT
    return taken, speaks


def mixed_with_neighbours(demo: Demo, baseline: Result, bank: str) -> Result:
    """
    Return kNN over the keys mixed with the baseline, each neighbour's name by the probability that it is right: a
    gated Tip-Adapter, for which nothing is trained but the keys and the baseline.
    """
    calibration = demo.banks["with"].config.calibration
    right, none = probabilities(calibration, torch.from_numpy(demo.found[bank][0][:, :TOP_K]))
    share = (right / right.sum(1, keepdim=True) * (1 - none[:, None])).numpy()
    labels = np.array(demo.labels(demo.queried))
    names = np.array(demo.captions(bank))
    copied = (share * (names == labels[:, None])).sum(1)
    total = copied + none.numpy() * np.exp(-baseline.name_losses)
    votes = (share[:, :, None] * (names[:, :, None] == names[:, None])).sum(1)  # of each neighbour's name
    best = names[np.arange(len(names)), votes.argmax(1)]
    return Result(
        exact_match=(best == labels).astype(float),
        name_losses=-np.log(np.maximum(total, np.finfo(float).tiny)),
        name_tokens=baseline.name_tokens,
    )


def seconds_of_bank(demo: Demo) -> dict[str, float]:
    """Return the seconds to teach a bank 100 pictures, tower included, and to forget one row."""
    model, processor = systems.compose_demo(demo.weights, demo.config, memory_top_k=TOP_K)
    rows = demo.pairs.noto.select(demo.pairs.heldout[:TAUGHT])
    bank = demo.banks["without"]
    started = time.perf_counter()
    taught = bank.add(rows, model, processor, caption_column="label", keep_duplicates=True)
    teach = time.perf_counter() - started
    started = time.perf_counter()
    taught.remove(len(taught) - 1)
    return {"teach": teach, "forget": time.perf_counter() - started}


def compare(study: Study) -> tuple[dict, dict, dict[str, list[str]], dict[int, Demo]]:
    """
    Compare all systems.

    Returns:
        by seed and system the results with the banks `"with"` and `"without"`, and about `"others"`; by seed and
        system the share of answers about others that are a taught name; by system tokens, seconds of training, to
        teach 100 concepts and to forget one; by seed the view that asks about others.
    """
    found, triggered, costs, others = {}, {}, {}, {}
    for seed in study.of(SEEDS):
        demo = study.demo(seed)
        others[seed] = asking_about(demo, demo.pairs.validation, "others")
        found[seed], triggered[seed] = compare_one(demo, others[seed])
        costs = costs or costs_of(demo)
    return found, triggered, costs, others


def compare_one(demo: Demo, others: Demo) -> tuple[dict[str, dict[str, Result]], dict[str, float]]:
    """Return the results of one seed, and how often each system says a taught name of another picture."""
    found = {name: dict(demo.results[name]) for name in ("copy", "baseline", "tinyalign", "text_cut")}
    models = {
        "baseline": (systems.train_system(demo, "baseline", memory_top_k=0), {}),
        "tinyalign": (systems.train_system(demo, "tinyalign", "without"), {"bank": "with"}),
        "text_cut": (
            systems.train_system(demo, "text_rag", in_text=True, memory_top_k=0),
            {"captions": others.captions("with")},
        ),
    }
    for name, (full, negatives) in FINE_TUNED.items():
        model = fine_tuned(demo, name, full, negatives)
        models[name] = model, {}
        found[name] = {"with": systems.evaluate_system(demo, folder_of(name), *model, answer=False)}
        found[name]["without"] = demo.results["baseline"]["without"]
    triggered = {}
    for name, (model, read) in models.items():
        kept = folder_of(name) if name in FINE_TUNED else name
        found[name]["others"] = systems.evaluate_system(others, kept, *model, answer=False, **read)
        triggered[name] = share_of_taught(demo, answers_of(others, *model, kept, **read))
    model = models["baseline"][0]
    found["chosen"], found["named"], found["mixed"] = {}, {}, {}
    for bank in BANKS:
        taken, speaks = chosen_by_likelihood(demo, *model, bank)
        right = taken == np.array(demo.labels(demo.queried))
        found["chosen"][bank] = Result(exact_match=(right & speaks).astype(float))
        found["named"][bank] = Result(exact_match=right.astype(float))
        found["mixed"][bank] = mixed_with_neighbours(demo, demo.results["baseline"][bank], bank)
    found["mixed"]["others"] = mixed_with_neighbours(others, found["baseline"]["others"], "with")
    taken, speaks = chosen_by_likelihood(others, *model, "with")
    triggered["chosen"] = share_of_taught(demo, np.where(speaks, taken, ""))
    triggered["named"] = share_of_taught(demo, taken)
    triggered["copy"] = share_of_taught(demo, [names[0] for names in others.captions("with")])
    return found, triggered


def costs_of(demo: Demo) -> dict[str, list[str]]:
    """Return tokens and seconds of training, to teach 100 concepts and to forget one; forgetting tunes anew."""
    bank, found = seconds_of_bank(demo), {}

    def seconds_of(folder: str) -> float:
        return sum(record.seconds for record in read_records(demo.out / folder / "model"))

    trained = {"tinyalign": seconds_of("tinyalign"), "text_cut": seconds_of("text_rag"), "copy": 0.0}
    baseline = seconds_of("baseline")
    for name in ("tinyalign", "text_cut", "chosen", "named", "mixed", "copy"):
        result = demo.results.get(name, demo.results["baseline"])["with"]
        tokens = "-" if result.tokens is None else f"{result.tokens:.0f}"
        seconds = trained.get(name, baseline)
        found[name] = [tokens, f"{seconds:.0f}", f"{bank['teach']:.0f}", f"{bank['forget']:.1f}"]
    tokens = f"{demo.results['baseline']['with'].tokens:.0f}"
    for name in FINE_TUNED:
        seconds = seconds_of(folder_of(name))
        teach = seconds * TAUGHT / num_taught(demo, name)
        found[name] = [tokens, f"{baseline:.0f} + {seconds:.0f}", f"{teach:.0f}", f"{seconds:.0f}"]
    return found | {"baseline": [tokens, f"{baseline:.0f}", "-", "-"]}
