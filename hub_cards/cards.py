"""Model and bank cards, filled from what a run recorded. A card with a gap is refused."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent
TASK = "image-text-to-text"
# What a bank card takes from bank_config.json.
BANK_CONFIG_FACTS = (
    "num_rows",
    "key_dim",
    "num_latents",
    "latent_dim",
    "tower",
    "key_encoder",
    "value_encoder",
    "sha256",
    "versions",
)


@dataclass(kw_only=True)
class Part:
    """Something that a model or a bank is made of.

    Args:
        role: "language model", "vision tower", "memory bank", "images and labels", ...
        source: a Hub id, a package, an address.
        revision: a commit, or a package's version.
        license: SPDX id.
        hub_type: "model" or "dataset" when `source` is a Hub id; the card's metadata links it then.
    """

    role: str
    source: str
    revision: str
    license: str
    hub_type: str | None = None


@dataclass(kw_only=True)
class Stage:
    """One stage of training, its hyperparameters by name."""

    name: str
    hyperparameters: dict[str, Any]


@dataclass(kw_only=True)
class Score:
    """A measured value with its 95% interval; `metric` is a key of `Evaluation.metrics`."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True)
class System:
    """A row of the evaluation's table. The rows of the model itself go into the card's metadata, too."""

    name: str
    scores: list[Score]
    is_this_model: bool


@dataclass(kw_only=True)
class Evaluation:
    """A table of systems and metrics.

    Args:
        dataset: its Hub id, or the name of its folder.
        dataset_name, split: as a reader should see them.
        metrics: column headings by metric id, `{"exact_match": "Exact match"}`.
    """

    dataset: str
    dataset_name: str
    split: str
    metrics: dict[str, str]
    systems: list[System]


@dataclass(kw_only=True)
class ModelFacts:
    """What a model card says.

    Args:
        repo_id: "org/name", or a folder's name before it is pushed.
        summary: what the model does, in one or two sentences.
        license: SPDX id of the whole, in lower case as the Hub has it.
        language: codes, `["en"]`.
        snippet, snippet_output: Python that was run as it stands, and what it printed.
        stages: in the order in which they ran.
        curves: picture of the training curves, a file beside the card.
        command: what to type to train the model again.
        hardware, training_hours: "2 CPU cores", and how long they took for all stages.
        peak_memory_gb, seconds_per_answer: measured on the same hardware.
        limits: what the model can't do, one sentence an item.
        versions: package versions by name.
        co2_grams: of the training, where it was measured.
    """

    repo_id: str
    summary: str
    license: str
    language: list[str]
    snippet: str
    snippet_output: str
    parts: list[Part]
    stages: list[Stage]
    curves: str
    command: str
    evaluation: Evaluation
    hardware: str
    training_hours: float
    peak_memory_gb: float
    seconds_per_answer: float
    limits: list[str]
    versions: dict[str, str]
    co2_grams: float | None = None


@dataclass(kw_only=True)
class BankFacts:
    """What a bank card says.

    Args:
        repo_id: "org/name", or a folder's name before it is pushed.
        summary: what the rows are, in one or two sentences.
        license: SPDX ids of the rows, in lower case as the Hub has them.
        language: codes of the captions' languages.
        parts: the vision tower, and every source of images and captions.
        command: what to type to make the bank again.
        config: the bank's `config` (bank_config.json).
        size_mb: of the Parquet files together.
        limits: what is wrong or missing in the rows, one sentence an item.
    """

    repo_id: str
    summary: str
    license: list[str]
    language: list[str]
    parts: list[Part]
    command: str
    config: dict[str, Any]
    size_mb: float
    limits: list[str]


def render_model_card(facts: ModelFacts) -> ModelCard:
    """The card of a checkpoint; `.save(folder / "README.md")` or `.push_to_hub(repo_id)`.

    Raises `ValueError` naming every required fact that is missing or not a number.
    """
    _require(facts, list(_gaps(facts, "")))
    evaluation = facts.evaluation
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=evaluation.dataset,
            dataset_name=evaluation.dataset_name,
            dataset_split=evaluation.split,
            metric_type=score.metric,
            metric_name=f"{evaluation.metrics[score.metric]} ({system.name})",
            metric_value=score.value,
        )
        for system in evaluation.systems
        if system.is_this_model
        for score in system.scores
    ]
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["tinyalign", "custom_code"],
        base_model=_hub_ids(facts.parts, "model"),
        datasets=_hub_ids(facts.parts, "dataset"),
        model_name=facts.repo_id.split("/")[-1],
        eval_results=results,
    )
    table = [[system.name, *_cells(system, evaluation.metrics)] for system in evaluation.systems]
    return ModelCard.from_template(
        data, template_path=str(TEMPLATES / "model_card.md"), facts=facts, evaluation=evaluation, table=table
    )


def render_bank_card(facts: BankFacts) -> DatasetCard:
    """The card of a memory bank, with the configuration that makes `load_dataset` read its rows and nothing else.

    Raises `ValueError` naming every required fact that is missing.
    """
    absent = [f"config[{key!r}]" for key in BANK_CONFIG_FACTS if not facts.config.get(key)]
    _require(facts, [*_gaps(facts, ""), *absent])
    data = DatasetCardData(
        pretty_name=facts.repo_id.split("/")[-1],
        language=facts.language,
        license=facts.license,
        size_categories=_size_category(facts.config["num_rows"]),
        source_datasets=_hub_ids(facts.parts, "dataset"),
        tags=["tinyalign", "memory-bank"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    return DatasetCard.from_template(
        data, template_path=str(TEMPLATES / "bank_card.md"), facts=facts, config=facts.config
    )


def _gaps(value: Any, name: str) -> Iterator[str]:
    """Names of the required facts in `value` that are empty or not a number. A field with a default may be None."""
    if is_dataclass(value):
        for field in fields(value):
            content = vars(value)[field.name]
            if content is not None or field.default is not None:
                yield from _gaps(content, f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _gaps(item, f"{name}[{number}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield name
    elif isinstance(value, str):
        if not value.strip():
            yield name
    elif value is None or value == [] or value == {}:
        yield name


def _require(facts: ModelFacts | BankFacts, gaps: list[str]) -> None:
    if gaps:
        raise ValueError(
            f"The card of {facts.repo_id!r} lacks {', '.join(gaps)}. A card has no blanks: fill these fields of "
            f"{type(facts).__name__}."
        )


def _hub_ids(parts: list[Part], hub_type: str) -> list[str] | None:
    return [part.source for part in parts if part.hub_type == hub_type] or None


def _cells(system: System, metrics: dict[str, str]) -> list[str]:
    """One system's scores in the order of the columns, "-" where it has none."""
    scores = {score.metric: score for score in system.scores}
    cells = []
    for metric in metrics:
        if metric not in scores:
            cells.append("-")
            continue
        score = scores[metric]
        interval = "" if score.low is None or score.high is None else f" ({score.low:.3g} to {score.high:.3g})"
        cells.append(f"{score.value:.3g}{interval}")
    return cells


def _size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows."""
    bounds = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")]
    lower = None
    for bound, name in bounds:
        if num_rows < bound:
            return f"{lower}<n<{name}" if lower else f"n<{name}"
        lower = name
    return "n>100M"
