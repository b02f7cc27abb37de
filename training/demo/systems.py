"""The systems that the demo trains, all in as many steps, and what each of them answers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from ...modeling_tinyalign import TinyAlignForConditionalGeneration
from ...processing import TinyAlignProcessor
from ..arguments.files import CONFIGS, read_config
from ..arguments.stage import bfloat16_is_fast
from ..data.chats import add_captions, encode_chat, to_messages
from ..evaluation.answers import evaluate_answers
from ..evaluation.choices import score_answers
from ..hub.run_facts import RECORD_NAME, StageRecord, stage_record, write_records
from ..models import widen_connector
from ..stages.precision import bfloat16_language_model
from ..stages.trainers import TRAINERS
from .state import KEYWORDS_PROMPT, PROMPT, TOP_K, Demo, DemoConfig, Result, write_json

ANSWER_TOKENS = 12  # the longest label has 10, and its end
BATCH_SIZE = 16  # of evaluation
STAGE_TITLES = {1: "Stage 1: alignment", 2: "Stage 2: instruction"}


def compose_demo(
    weights: dict[str, Path], config: DemoConfig, **model_config
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a new model of the two checkpoints and its processor; the same seed gives the same connectors."""
    set_seed(config.seed)
    vision, text = str(weights["vision"]), str(weights["text"])
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        vision, text, text_kwargs={"dtype": torch.float32}, **{"vision_pool_size": 3, **model_config}
    )
    return model.eval(), TinyAlignProcessor.from_vision_text_pretrained(vision, text, model.config)


def chats(
    labels: list[str], keywords: list[str] | None = None, captions: list[list[str]] | None = None
) -> datasets.Dataset:
    """Return one chat a label: a question for the keywords, where there are some, then one for the name.

    Args:
        captions: of neighbours, to be written into the question (text-only RAG).
    """
    rows = []
    for number, label in enumerate(labels):
        messages = to_messages(PROMPT, label)
        if keywords is not None and keywords[number]:
            again = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}, messages[1]]
            messages = to_messages(KEYWORDS_PROMPT, keywords[number]) + again
        rows.append(messages if captions is None else add_captions(messages, captions[number]))
    return datasets.Dataset.from_dict({"messages": rows})


def add_neighbours(rows: datasets.Dataset, found: tuple[np.ndarray, np.ndarray]) -> datasets.Dataset:
    """Return the rows with what `find_neighbours` found for them."""
    scores, ids = found
    return rows.add_column("memory_ids", ids.tolist()).add_column("memory_scores", scores.tolist())


def train_system(
    demo: Demo,
    name: str,
    bank: str | None = None,
    in_text: bool = False,
    rows: datasets.Dataset | None = None,
    **model_config,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Train a system in both stages as training/configs/ has them, in fewer and smaller steps, the second with
    adapters. Each stage has training drawings of its own.

    Each goes on where it stopped. The model, its record and its processor are kept in the folder of this name.

    Args:
        bank: name of the bank that it reads in training; None for one without memory tokens.
        in_text: write the names of the neighbours into the question; memory dropout takes as many of them away.
        rows: chats about the training drawings, one each, in place of the demo's.
    """
    config, train, final = demo.config, demo.pairs.train, demo.out / name / "model"
    model, processor = compose_demo(demo.weights, config, **model_config)
    if name == "wider_connector":
        widen_connector(model)
        processor.num_image_tokens = model.config.num_image_tokens
    if (final / RECORD_NAME).exists():
        return TinyAlignForConditionalGeneration.from_pretrained(final).eval(), processor
    if rows is None:
        rows = chats(demo.labels(train), demo.keywords(train), demo.training_captions() if in_text else None)
    if "feature_index" not in rows.column_names:
        rows = rows.add_column("feature_index", list(range(len(rows))))
    parts = {"processing_class": processor, "vision_features": demo.features["train"]}
    if bank is not None:
        model.attach_memory_bank(demo.banks[bank], tokenizer=processor.tokenizer)
        rows = add_neighbours(rows, demo.found["train"])
        parts["memory_bank"] = demo.banks[bank]
    memory = {} if bank is None else {"memory_dropout": config.memory_dropout}
    stages = {1: {"max_steps": config.stage1_steps, "save_steps": 50}, 2: stage2_settings(config)}
    order = np.random.default_rng(config.seed).permutation(len(rows))
    first = config.stage1_steps * config.batch_size
    records = []
    for (stage, settings), chosen in zip(stages.items(), (order[:first], order[first:]), strict=True):
        if settings["max_steps"]:
            records.append(train_stage(demo, name, stage, model, rows.select(chosen), settings | memory, **parts))
    model.save_pretrained(final)
    processor.save_pretrained(final)
    write_records(final, records)
    demo.clock(f"{name} trained")
    return model, processor


def stage2_settings(config: DemoConfig) -> dict[str, str | int | float]:
    """Return the settings of the second stage: adapters on the language model."""
    settings = {"max_steps": config.stage2_steps, "learning_rate": config.stage2_learning_rate, "save_strategy": "no"}
    # Dropout takes a third of a step on a CPU, and no row is seen twice.
    return settings | {"tune_language_model": "lora", "lora_r": 16, "lora_dropout": 0.0}


def train_stage(
    demo: Demo, name: str, stage: int, model: PreTrainedModel, rows: datasets.Dataset, settings: dict, **parts
) -> StageRecord:
    """Train a stage of a system as its file in training/configs/ says, with these settings, and return its record."""
    steps, batch_size = settings["max_steps"], demo.config.batch_size
    print(f"Training {name}, stage {stage} of 2, {steps} steps", flush=True)
    settings = {
        "output_dir": demo.out / name / f"stage{stage}",
        "logging_steps": max(1, min(5, steps // 10)),
        "global_batch_size": batch_size,
        "per_device_train_batch_size": batch_size,
        "seed": demo.config.seed,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": False,
        **settings,
    }
    fields = [text for field, value in settings.items() for text in (f"--{field}", str(value))]
    trainer = TRAINERS[stage](
        model, read_config([CONFIGS / f"stage{stage}.yaml"], fields), train_dataset=rows, **parts
    )
    trainer.train()
    return stage_record(STAGE_TITLES[stage], trainer)


def questions(
    demo: Demo, prompt: str, rows: Sequence[int], bank: str | None, captions: Sequence[Sequence[str]] | None
) -> datasets.Dataset:
    """Return a question for each of these queries, for `score_answers`; bank and captions as for `evaluate_system`."""
    messages = [to_messages(prompt, "-")[:1] for _ in rows]
    if captions is not None:
        messages = [add_captions(turn, captions[row]) for turn, row in zip(messages, rows, strict=True)]
    asked = datasets.Dataset.from_dict({"messages": messages, "feature_index": list(map(int, rows))})
    return asked if bank is None else add_neighbours(asked, [part[rows, :TOP_K] for part in demo.found[bank]])


def evaluate_system(
    demo: Demo,
    name: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    bank: str | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    features: np.ndarray | None = None,
    answer: bool = True,
) -> Result:
    """Return what a system answers to the queries, kept in a file of this name.

    Args:
        bank: name of the bank that the model reads.
        captions: of neighbours, to be written into the question.
        features: those of other pictures in place of the queries'.
        answer: let it answer some of them, too.
    """
    path = demo.out / "evaluation" / f"{name}.json"
    if path.exists():
        return read_result(path)
    features = demo.features["queries"] if features is None else features
    read = None if bank is None else demo.banks[bank]
    if read is not None:
        model.attach_memory_bank(read, tokenizer=processor.tokenizer)

    ask = partial(questions, demo, bank=bank, captions=captions)
    settings = {"bank": read, "vision_features": features, "batch_size": BATCH_SIZE, "desc": name}
    with bfloat16_language_model(model, enabled=bfloat16_is_fast(use_cpu=not torch.cuda.is_available())):
        result = score_system(demo, model, processor, ask, **settings)
        if answer:
            shown = ask(PROMPT, demo.answered)
            result.tokens = prompt_tokens(processor, shown)
            result.answers, result.seconds = evaluate_answers(model, processor, shown, ANSWER_TOKENS, **settings)
    write_json(path, asdict(result))
    return result


def read_result(path: Path) -> Result:
    """Read what was kept of a system's answers."""
    kept = json.loads(path.read_text())
    return Result(**{key: np.array(value) if isinstance(value, list) else value for key, value in kept.items()})


def score_system(
    demo: Demo,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    ask: Callable[[str, Sequence[int]], datasets.Dataset],
    **settings,
) -> Result:
    """Return how likely a system finds the right answers to the queries, keywords and names.

    Args:
        ask: makes the rows of `score_answers` of a question and the numbers of queries.
        settings: those of `score_answers`.
    """
    labels, asked = demo.labels(demo.queried), demo.asked
    keywords = demo.keywords(demo.queried[asked])
    options = [[text, *demo.options[row]] for text, row in zip(keywords, asked, strict=True)]
    words = score_answers(model, processor, ask(KEYWORDS_PROMPT, asked), options, **settings)
    names = score_answers(model, processor, ask(PROMPT, range(len(labels))), [[label] for label in labels], **settings)
    return Result(
        choice=(words.likelihoods[:, 1:].argmax(1) == 0).astype(float),
        exact_match=names.is_greedy[:, 0].astype(float),
        keyword_losses=words.losses[:, 0],
        keyword_tokens=words.num_tokens[:, 0],
        name_losses=names.losses[:, 0],
        name_tokens=names.num_tokens[:, 0],
    )


def prompt_tokens(processor: ProcessorMixin, rows: datasets.Dataset) -> float:
    """Return the mean number of tokens of questions, those of pictures and memory included."""
    lengths = [len(encode_chat(processor, chat, add_generation_prompt=True)[0]) for chat in rows["messages"]]
    return float(np.mean(lengths))
