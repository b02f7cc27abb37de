"""`tinyalign demo`: does retrieval help a small model to name emoji it has never seen? On real weights and images."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.utils import logging

from ...modeling_tinyalign import MemoryBank, TinyAlignForConditionalGeneration
from ...processing import TinyAlignProcessor
from ..arguments.files import CONFIGS, read_config
from ..arguments.stage import bfloat16_is_fast
from ..data.chats import to_messages
from ..data.features import cache_vision_features
from ..data.neighbours import find_neighbours, source_ids_of
from ..evaluation.answers import Evaluation, evaluate_answers
from ..hub.run_facts import RECORD_NAME, stage_record, write_records
from ..stages.precision import bfloat16_language_model
from ..stages.trainers import TRAINERS
from .cards import write_demo_cards
from .pairs import Pairs, load_pairs
from .report import write_report
from .state import BANKS, PROMPT, TOP_K, Clock, Demo, DemoConfig, write_json
from .weights import check_installed, convert_efficientnet_lite0, convert_smollm2

ANSWER_TOKENS = 12  # the longest label has 10, and its end
QUICK = DemoConfig(concepts=160, stage1_steps=15, stage2_steps=3)
# What commands go on from. After a quick run they are found at the same place as after a full one.
RESULTS = ("checkpoint", "bank_with_heldout", "bank_without_heldout", "query.png", "report.md")


def check_settings(path: Path, config: DemoConfig) -> None:
    """Keep the settings in `path`. Raises `ValueError` when the folder has results of other ones."""
    if path.exists() and (kept := json.loads(path.read_text())) != asdict(config):
        changed = [f"{name}: {kept.get(name)} then, {now} now" for name, now in asdict(config).items()]
        raise ValueError(
            f"{path.parent} has a demo of other settings ({'; '.join(changed)}): delete it or choose another --output."
        )
    write_json(path, asdict(config))


def link_results(folder: Path, quick: bool) -> None:
    """Let DIR/checkpoint and the like lead to those of a quick run, unless there are some of a full run."""
    for name in RESULTS:
        link = folder / name
        if link.is_symlink():
            link.unlink()
        if quick and not link.exists():
            link.symlink_to(Path("quick", name))


def compose(weights: dict[str, Path], config: DemoConfig, **model_config) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a new model of the two checkpoints and its processor; the same seed gives the same connectors."""
    set_seed(config.seed)
    vision, text = str(weights["vision"]), str(weights["text"])
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        vision, text, text_kwargs={"dtype": torch.float32}, vision_pool_size=3, **model_config
    )
    return model.eval(), TinyAlignProcessor.from_vision_text_pretrained(vision, text, model.config)


def prepare_banks(
    folder: Path, model: PreTrainedModel, processor: ProcessorMixin, features, pairs: Pairs
) -> dict[str, MemoryBank]:
    """Return the bank without the held-out concepts, and the same bank with their drawings added."""
    banks = {}
    for name, rows in zip(BANKS, (pairs.train, pairs.heldout), strict=True):
        path = folder / f"bank_{name}_heldout"
        if not (path / "bank_config.json").exists():
            source, settings = pairs.noto.select(rows), {"caption_column": "label", "vision_features": features[rows]}
            settings["keep_duplicates"] = True  # some concepts share a drawing
            if name == "without":
                settings |= {"key_grid": 3, "whiten_dim": min(512, len(rows) - 1)}
                bank = MemoryBank.build(source, model, processor, **settings)
            else:
                bank = banks["without"].add(source, model, processor, **settings)
            bank.save_pretrained(path)
        banks[name] = MemoryBank.from_pretrained(path)
    return banks


def chats(labels: list[str], neighbours: list[list[str]] | None = None) -> datasets.Dataset:
    """Return one chat a label; with `neighbours`, their captions stand in the question (text-only RAG)."""
    hints = [""] * len(labels) if neighbours is None else [f"Similar: {'; '.join(row)}\n" for row in neighbours]
    messages = [to_messages(hint + PROMPT, label) for hint, label in zip(hints, labels, strict=True)]
    return datasets.Dataset.from_dict({"messages": messages})


def with_neighbours(rows: datasets.Dataset, found: tuple[np.ndarray, np.ndarray]) -> datasets.Dataset:
    """Return the rows with what `find_neighbours` found for them."""
    scores, ids = found
    return rows.add_column("memory_ids", ids.tolist()).add_column("memory_scores", scores.tolist())


def train_system(
    folder: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    features: np.ndarray,
    bank: MemoryBank | None,
    config: DemoConfig,
) -> PreTrainedModel:
    """Train both stages as training/configs/ has them, in fewer and smaller steps, each resumed where it stopped.

    The result and its record are kept in `folder`, which is named after the system.
    """
    final = folder / "model"
    if (final / RECORD_NAME).exists():
        return TinyAlignForConditionalGeneration.from_pretrained(final).eval()
    shared = {
        "global_batch_size": config.batch_size,
        "per_device_train_batch_size": config.batch_size,
        "memory_dropout": config.memory_dropout,
        "seed": config.seed,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": False,
    }
    stage1 = {"max_steps": config.stage1_steps, "save_steps": 50}
    stage2 = {"max_steps": config.stage2_steps, "learning_rate": config.stage2_learning_rate, "save_strategy": "no"}
    records = []
    for stage, name, own in ((1, "Stage 1: alignment", stage1), (2, "Stage 2: instruction", stage2)):
        print(f"Training {folder.name}, stage {stage} of 2, {own['max_steps']} steps", flush=True)
        own |= {"output_dir": folder / f"stage{stage}", "logging_steps": max(1, min(5, own["max_steps"] // 10))}
        fields = [text for field, value in {**shared, **own}.items() for text in (f"--{field}", str(value))]
        settings = read_config([CONFIGS / f"stage{stage}.yaml"], fields)
        parts = {"processing_class": processor, "memory_bank": bank, "vision_features": features}
        trainer = TRAINERS[stage](model, settings, train_dataset=rows, **parts)
        trainer.train()
        records.append(stage_record(name, trainer))
    model.save_pretrained(final)
    processor.save_pretrained(final)
    write_records(final, records)
    return model


def evaluate_system(
    path: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: datasets.Dataset,
    features: np.ndarray,
    bank: MemoryBank | None = None,
) -> Evaluation:
    """Return losses and greedy answers on the held-out queries, kept in `path`."""
    if path.exists():
        kept = json.loads(path.read_text())
        lists = ("answers", "references")
        return Evaluation(**{name: column if name in lists else np.array(column) for name, column in kept.items()})
    settings = {"batch_size": 32, "max_new_tokens": ANSWER_TOKENS, "desc": path.stem}
    with bfloat16_language_model(model, enabled=bfloat16_is_fast(use_cpu=not torch.cuda.is_available())):
        result = evaluate_answers(model, processor, rows, bank, features, **settings)
    write_json(path, asdict(result))
    return result


def run_demo(output_dir: str | os.PathLike, quick: bool = False):
    """Train the baseline, text-only RAG and TinyAlign with the same budget, and write `report.md` with its pictures.

    They are evaluated on emoji whose concepts were never trained on. Interrupted, it goes on where it stopped.
    """
    logging.disable_progress_bar()  # of loading weights
    datasets.disable_progress_bars()
    folder, config = Path(output_dir).resolve(), QUICK if quick else DemoConfig()
    out = folder / "quick" if quick else folder
    pairs = load_pairs(config.seed, config.concepts)
    check_installed()
    check_settings(out / "config.json", config)
    link_results(folder, quick=False)
    clock = Clock(out / "clock.json")
    weights = {
        "vision": convert_efficientnet_lite0(folder / "weights" / "efficientnet-lite0"),
        "text": convert_smollm2(folder / "weights" / "smollm2-135m-instruct"),
    }
    clock("weights converted", f"{len(pairs.train)} concepts to train on, {len(pairs.heldout)} held out")
    demo = Demo(out, quick, config, pairs, weights, clock)
    prepare(demo)
    run_baseline(demo)
    run_text_rag(demo)
    model, processor = run_tinyalign(demo)
    clock("evaluated")

    model.attach_memory_bank(demo.banks["with"], tokenizer=processor.tokenizer)
    model.save_pretrained(out / "checkpoint")
    processor.save_pretrained(out / "checkpoint")
    example = demo.queries[demo.shown[0]]
    example["image"].save(out / "query.png")
    print("A new process without the package loads the checkpoint (10 seconds or so)", flush=True)
    answer = write_demo_cards(demo)
    clock("answered in a process without the package", f'"{answer}" for {example["label"]!r}; cards written')
    write_report(demo, answer, example["label"])
    clock("report written")
    link_results(folder, quick)
    print_next_commands(out)


def print_next_commands(out: Path) -> None:
    """Say where the results are, and print the commands that go on from there."""
    installed, place = Path(sys.executable).with_name("tinyalign"), os.path.relpath(out)
    program = "tinyalign" if shutil.which("tinyalign") else os.path.relpath(installed)
    print(
        f"\n{place}/report.md has the results, {place}/checkpoint the model, {place}/bank_with_heldout its memory "
        "bank. README.md asks the model in ten lines of Python. Look at the bank, or push both to the Hub:\n\n"
        f"  {program} bank info {place}/bank_with_heldout\n"
        f"  {program} bank view {place}/bank_with_heldout -o bank.html --image {place}/query.png "
        f"--model {place}/checkpoint\n"
        f"  {program} push {place}/checkpoint YOU/MODEL --bank {place}/bank_with_heldout YOU/BANK"
    )


def prepare(demo: Demo) -> None:
    """Make features and banks, and look up the neighbours of all query drawings."""
    pairs, config, out = demo.pairs, demo.config, demo.out
    model, processor = compose(demo.weights, config, memory_top_k=TOP_K)
    features = {
        style: cache_vision_features(model, processor, rows["image"], out / "features" / style, desc=style)
        for style, rows in (("noto", pairs.noto), ("twemoji", pairs.twemoji))
    }
    demo.clock("frozen visual features cached")
    demo.banks = prepare_banks(out, model, processor, features["noto"], pairs)
    demo.clock("memory banks built")
    train, heldout = features["twemoji"][pairs.train], features["twemoji"][pairs.heldout]
    demo.features = {"train": train, "heldout": heldout}
    demo.shuffled = {name: bank.shuffled(config.seed) for name, bank in demo.banks.items()}
    own = source_ids_of(pairs.twemoji.select(pairs.train)["image"])
    # of the training drawings twice as many, so that memory dropout has some to put in the place of others
    demo.found = {"train": find_neighbours(demo.banks["without"], model, train, 2 * TOP_K, own)}
    for name in BANKS:
        demo.found[name] = find_neighbours(demo.banks[name], model, heldout, TOP_K)
        demo.found[f"shuffled_{name}"] = find_neighbours(demo.shuffled[name], model, heldout, TOP_K)


def run_baseline(demo: Demo) -> None:
    """Train and evaluate the model without memory; a bank changes nothing."""
    model, processor = compose(demo.weights, demo.config, memory_top_k=0)
    rows = chats(demo.labels(demo.pairs.train))
    model = train_system(demo.out / "baseline", model, processor, rows, demo.features["train"], None, demo.config)
    demo.clock("baseline trained")
    rows = chats(demo.labels(demo.pairs.heldout))
    result = evaluate_system(demo.out / "evaluation/baseline.json", model, processor, rows, demo.features["heldout"])
    demo.results["baseline"] = dict.fromkeys(BANKS, result)


def run_text_rag(demo: Demo) -> None:
    """Train and evaluate the model that reads captions of neighbours as text."""
    model, processor = compose(demo.weights, demo.config, memory_top_k=0)
    rows = chats(demo.labels(demo.pairs.train), demo.captions("without", "train"))
    model = train_system(demo.out / "text_rag", model, processor, rows, demo.features["train"], None, demo.config)
    demo.clock("text-only RAG trained")
    demo.results["text_rag"] = {}
    for name in BANKS:
        rows = chats(demo.labels(demo.pairs.heldout), demo.captions(name, name))
        path = demo.out / f"evaluation/text_rag_{name}.json"
        demo.results["text_rag"][name] = evaluate_system(path, model, processor, rows, demo.features["heldout"])


def run_tinyalign(demo: Demo) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Train TinyAlign, and evaluate it with both banks and with the same banks shuffled; return it."""
    model, processor = compose(demo.weights, demo.config, memory_top_k=TOP_K, memory_scores=demo.config.memory_scores)
    bank, features = demo.banks["without"], demo.features["train"]
    model.attach_memory_bank(bank, tokenizer=processor.tokenizer)
    rows = with_neighbours(chats(demo.labels(demo.pairs.train)), demo.found["train"])
    model = train_system(demo.out / "tinyalign", model, processor, rows, features, bank, demo.config)
    demo.clock("TinyAlign trained")
    heldout = chats(demo.labels(demo.pairs.heldout))
    for system, prefix, banks in (("tinyalign", "", demo.banks), ("random_bank", "shuffled_", demo.shuffled)):
        demo.results[system] = {}
        for name, bank in banks.items():
            model.attach_memory_bank(bank, tokenizer=processor.tokenizer)
            rows = with_neighbours(heldout, demo.found[prefix + name])
            path = demo.out / f"evaluation/{system}_{name}.json"
            result = evaluate_system(path, model, processor, rows, demo.features["heldout"], bank)
            demo.results[system][name] = result
    return model, processor
