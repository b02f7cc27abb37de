"""`tinyalign demo`: does retrieval help a small model to name emoji it has never seen? On real weights and images."""

import json
import os
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.utils import logging

from ...modeling_tinyalign import MemoryBank, TinyAlignForConditionalGeneration, ValueEncoder, ValueEncoderConfig
from ...processing import TinyAlignProcessor
from ..arguments.files import CONFIGS, read_config
from ..arguments.stage import bfloat16_is_fast
from ..bank.value_encoder_training import ValueEncoderTrainingConfig, train_value_encoder
from ..data.chats import to_messages
from ..data.features import cache_vision_features
from ..data.neighbours import find_neighbours, source_ids_of
from ..disk import save_file
from ..evaluation.answers import Evaluation, evaluate_answers
from ..hub.run_facts import RECORD_NAME, stage_record, write_records
from ..stages.precision import bfloat16_language_model
from ..stages.trainers import TRAINERS
from .cards import write_demo_cards
from .pairs import Pairs, load_pairs
from .report import write_report
from .weights import convert_efficientnet_lite0, convert_smollm2

PROMPT = "What is this?"
TOP_K, NUM_LATENTS = 4, 8  # 32 memory tokens; 8 latents hold four words, as many as 97% of the labels have
ANSWER_TOKENS = 12  # the longest label has 10, and its end
BANKS = ("without", "with")  # the drawings of the held-out concepts


@dataclass
class DemoConfig:
    """Size of the demo's training and evaluation; the defaults are the full run."""

    concepts: int | None = None
    value_encoder_steps: int = 1500
    stage1_steps: int = 100
    stage2_steps: int = 120
    stage2_learning_rate: float = 1e-4  # more than the default 2e-5: these are few steps
    memory_dropout: float = 0.0
    memory_scores: bool = False
    batch_size: int = 10
    seed: int = 0


QUICK = DemoConfig(concepts=160, value_encoder_steps=600, stage1_steps=15, stage2_steps=3)


def write_json(path: Path, content) -> None:
    """Whole or not at all: what is there is taken for finished by the next run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(path, f"{json.dumps(content, indent=1, default=np.ndarray.tolist)}\n".encode())


def check_settings(path: Path, config: "DemoConfig") -> None:
    """Keeps the settings in `path`. Raises `ValueError` when the folder has results of other ones."""
    if path.exists() and (kept := json.loads(path.read_text())) != asdict(config):
        changed = [f"{name}: {kept.get(name)} then, {now} now" for name, now in asdict(config).items()]
        raise ValueError(
            f"{path.parent} has a demo of other settings ({'; '.join(changed)}): delete it or choose another --output."
        )
    write_json(path, asdict(config))


class Clock:
    """Prints how long each step took, and adds it in `path` to what earlier, interrupted runs took."""

    def __init__(self, path: Path):
        self.path, self.started, self.last = path, time.time(), time.time()
        self.record = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "peak_memory_gb": 0.0}

    def __call__(self, step: str, note: str = ""):
        now = time.time()
        seconds = self.record["seconds"]
        seconds[step] = seconds.get(step, 0.0) + now - self.last
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.record["peak_memory_gb"] = max(self.record["peak_memory_gb"], peak)
        self.last = now
        write_json(self.path, self.record)
        print(f"[{now - self.started:5.0f} s] {step}{note and ': '}{note}", flush=True)


def compose(weights: dict[str, Path], config: DemoConfig, **model_config) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A new model of the two checkpoints and its processor; the same seed gives the same connectors."""
    set_seed(config.seed)
    vision, text = str(weights["vision"]), str(weights["text"])
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        vision, text, text_kwargs={"dtype": torch.float32}, vision_pool_size=3, **model_config
    )
    return model.eval(), TinyAlignProcessor.from_vision_text_pretrained(vision, text, model.config)


def compose_with_memory(weights: dict[str, Path], config: DemoConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """TinyAlign: four neighbours of eight latents each, one after the other."""
    memory = {"memory_top_k": TOP_K, "num_latents": NUM_LATENTS, "memory_fusion": "sequence"}
    return compose(weights, config, memory_scores=config.memory_scores, **memory)


def prepare_value_encoder(path: Path, features: np.ndarray, pairs: Pairs, config: DemoConfig) -> ValueEncoder:
    """Trains the value encoder on the training concepts' Noto drawings, labels and tags, once."""
    if (path / "history.json").exists():
        return ValueEncoder.from_pretrained(path).eval()
    set_seed(config.seed)
    encoder = ValueEncoder(
        ValueEncoderConfig(
            num_latents=NUM_LATENTS, num_vision_tokens=features.shape[1], vision_feature_size=features.shape[2]
        )
    )
    rows = pairs.noto.select(pairs.train)
    captions = [caption for row in zip(rows["label"], rows["tags"], strict=True) for caption in (row[0], *row[1])]
    settings = ValueEncoderTrainingConfig(steps=config.value_encoder_steps, seed=config.seed)
    history = train_value_encoder(encoder, features[pairs.train], captions, settings)
    encoder.save_pretrained(path)
    write_json(path / "history.json", history)
    return encoder


def prepare_banks(
    folder: Path, model: PreTrainedModel, processor: ProcessorMixin, encoder: ValueEncoder, features, pairs: Pairs
) -> dict[str, MemoryBank]:
    """The bank without the held-out concepts, and the same bank with their drawings added."""
    banks = {}
    for name, rows in zip(BANKS, (pairs.train, pairs.heldout), strict=True):
        path = folder / f"bank_{name}_heldout"
        if not (path / "bank_config.json").exists():
            source, columns = pairs.noto.select(rows), {"caption_column": "label", "vision_features": features[rows]}
            columns["keep_duplicates"] = True  # some concepts share a drawing
            if name == "without":
                bank = MemoryBank.build(
                    source, model, processor, encoder, key_grid=3, whiten_dim=min(512, len(rows) - 1), **columns
                )
            else:
                bank = banks["without"].add(source, model, processor, **columns)
            bank.save_pretrained(path)
        banks[name] = MemoryBank.from_pretrained(path)
    return banks


def chats(labels: list[str], neighbours: list[list[str]] | None = None) -> datasets.Dataset:
    """One chat a label; with `neighbours`, their captions stand in the question (text-only RAG)."""
    hints = [""] * len(labels) if neighbours is None else [f"Similar: {'; '.join(row)}\n" for row in neighbours]
    messages = [to_messages(hint + PROMPT, label) for hint, label in zip(hints, labels, strict=True)]
    return datasets.Dataset.from_dict({"messages": messages})


def with_neighbours(rows: datasets.Dataset, found: tuple[np.ndarray, np.ndarray]) -> datasets.Dataset:
    """The rows with what [`find_neighbours`] found for them."""
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
    """
    Both stages as training/configs/ has them, in fewer and smaller steps, each resumed where it was interrupted; the
    result and its record are kept in `folder`.
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
    stage2 = {
        "max_steps": config.stage2_steps,
        "learning_rate": config.stage2_learning_rate,
        "save_strategy": "no",
    }
    records = []
    for stage, name, own in ((1, "Stage 1: alignment", stage1), (2, "Stage 2: instruction", stage2)):
        own |= {"output_dir": folder / f"stage{stage}", "logging_steps": max(1, min(5, own["max_steps"] // 10))}
        fields = [text for field, value in {**shared, **own}.items() for text in (f"--{field}", str(value))]
        settings = read_config([CONFIGS / f"stage{stage}.yaml"], fields)
        trainer = TRAINERS[stage](
            model,
            settings,
            train_dataset=rows,
            processing_class=processor,
            memory_bank=bank,
            vision_features=features,
        )
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
    """Losses and greedy answers on the held-out queries, kept in `path`."""
    if path.exists():
        kept = json.loads(path.read_text())
        lists = ("answers", "references")
        return Evaluation(**{name: column if name in lists else np.array(column) for name, column in kept.items()})
    use_bf16 = bfloat16_is_fast(use_cpu=not torch.cuda.is_available())
    with bfloat16_language_model(model, enabled=use_bf16):
        result = evaluate_answers(
            model, processor, rows, bank, features, batch_size=32, max_new_tokens=ANSWER_TOKENS, desc=path.stem
        )
    write_json(path, asdict(result))
    return result


def run_demo(output_dir: str | os.PathLike, quick: bool = False):
    """
    Trains the baseline, TinyAlign and text-only RAG with the same budget, evaluates them on emoji whose concepts were
    never trained on, and writes `report.md` with its pictures. Interrupted, it goes on where it stopped.
    """
    logging.disable_progress_bar()  # of loading weights
    datasets.disable_progress_bars()
    config, out = QUICK if quick else DemoConfig(), Path(output_dir).resolve()
    if quick:
        out = out / "quick"
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / "config.json", config)
    clock = Clock(out / "clock.json")

    weights_dir = Path(output_dir).resolve() / "weights"
    weights = {
        "vision": convert_efficientnet_lite0(weights_dir / "efficientnet-lite0"),
        "text": convert_smollm2(weights_dir / "smollm2-135m-instruct"),
    }
    pairs = load_pairs(config.seed, config.concepts)
    clock("weights converted", f"{len(pairs.train)} concepts to train on, {len(pairs.heldout)} held out")

    model, processor = compose_with_memory(weights, config)
    features = {
        style: cache_vision_features(model, processor, rows["image"], out / "features" / style, desc=style)
        for style, rows in (("noto", pairs.noto), ("twemoji", pairs.twemoji))
    }
    clock("frozen visual features cached")
    encoder = prepare_value_encoder(out / "value_encoder", features["noto"], pairs, config)
    clock("value encoder trained")
    banks = prepare_banks(out, model, processor, encoder, features["noto"], pairs)
    clock("memory banks built")

    labels = np.array(pairs.labels)
    queries = {"train": pairs.train, "heldout": pairs.heldout}
    features = {name: features["twemoji"][rows] for name, rows in queries.items()}
    shuffled = {name: bank.shuffled(config.seed) for name, bank in banks.items()}
    own = source_ids_of(pairs.twemoji.select(pairs.train)["image"])
    # of the training drawings twice as many, so that memory dropout has some to put in the place of others
    neighbours = {"train": find_neighbours(banks["without"], model, features["train"], 2 * TOP_K, own)}
    for name in BANKS:
        neighbours[name] = find_neighbours(banks[name], model, features["heldout"], TOP_K)
        neighbours[f"shuffled_{name}"] = find_neighbours(shuffled[name], model, features["heldout"], TOP_K)

    def captions(bank: str, queries: str) -> list[list[str]]:
        _, ids = neighbours[queries]
        return [[row["caption"] for row in rows] for rows in banks[bank].rows(ids[:, :TOP_K])]

    train_labels, heldout_labels = labels[pairs.train].tolist(), labels[pairs.heldout].tolist()
    results: dict[str, dict[str, Evaluation]] = {}
    heldout = chats(heldout_labels)

    model, processor = compose(weights, config, memory_top_k=0)
    model = train_system(out / "baseline", model, processor, chats(train_labels), features["train"], None, config)
    clock("baseline trained")
    result = evaluate_system(out / "evaluation/baseline.json", model, processor, heldout, features["heldout"])
    results["baseline"] = dict.fromkeys(BANKS, result)

    model, processor = compose(weights, config, memory_top_k=0)
    rows = chats(train_labels, captions("without", "train"))
    model = train_system(out / "text_rag", model, processor, rows, features["train"], None, config)
    clock("text-only RAG trained")
    results["text_rag"] = {
        name: evaluate_system(
            out / f"evaluation/text_rag_{name}.json",
            model,
            processor,
            chats(heldout_labels, captions(name, name)),
            features["heldout"],
        )
        for name in BANKS
    }

    model, processor = compose_with_memory(weights, config)
    model.build_lexicon(processor.tokenizer, banks["without"])
    rows = with_neighbours(chats(train_labels), neighbours["train"])
    model = train_system(out / "tinyalign", model, processor, rows, features["train"], banks["without"], config)
    clock("TinyAlign trained")
    for system, prefix, kind in (("tinyalign", "", banks), ("random_bank", "shuffled_", shuffled)):
        results[system] = {}
        for name in BANKS:
            model.build_lexicon(processor.tokenizer, kind[name])
            results[system][name] = evaluate_system(
                out / f"evaluation/{system}_{name}.json",
                model,
                processor,
                with_neighbours(heldout, neighbours[prefix + name]),
                features["heldout"],
                kind[name],
            )
    clock("evaluated")

    checkpoint = out / "checkpoint"
    model.build_lexicon(processor.tokenizer, banks["with"])
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    image = out / "query.png"
    shown = np.random.default_rng(config.seed).choice(len(pairs.heldout), min(8, len(pairs.heldout)), replace=False)
    example = int(pairs.heldout[shown[0]])
    pairs.twemoji.cast_column("image", datasets.Image())[example]["image"].save(image)
    nearest = {name: captions(name, name) for name in BANKS}
    print("A new process without the package loads the checkpoint (10 seconds or so)", flush=True)
    answer = write_demo_cards(
        out,
        config=asdict(config),
        quick=quick,
        results=results,
        nearest=nearest,
        num_concepts=(len(pairs.train), len(pairs.heldout)),
        sha256={name: bank.config.sha256.keys for name, bank in banks.items()},
        **clock.record,
        prompt=PROMPT,
    )
    clock("answered in a process without the package", f'"{answer}" for {str(labels[example])!r}; cards written')

    write_report(
        out,
        config=asdict(config),
        quick=quick,
        results=results,
        nearest=nearest,
        neighbour_ids=neighbours["with"][1],
        bank=banks["with"],
        queries=pairs.twemoji.select(pairs.heldout).cast_column("image", datasets.Image()),
        **clock.record,
        shown=shown.tolist(),
        fresh_process=(answer, str(labels[example])),
    )
    clock("report written")
    print(f"{out / 'report.md'}")
