"""What cards say: facts that a run recorded, kept as `card_facts.json` beside what they are of."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

FACTS_NAME = "card_facts.json"
BANK_CONFIG_NAME = "bank_config.json"
BLANK = "[More Information Needed]"


@dataclass(kw_only=True)
class Part:
    """Something that a model or a bank is made of.

    Args:
        role: "language model", "vision tower", "images and labels", ...
        source: a Hub id, a package, an address.
        revision: a commit, or a package's version.
        license: SPDX id.
        hub_type: "model" or "dataset" when `source` is a Hub id; it is linked then, and in the card's metadata.
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
    hyperparameters: dict[str, str | float | bool]


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
class Example:
    """A question that the card's snippet asks.

    Args:
        prompt: what is asked about the image.
        image: file beside the card. Without one, the snippet draws a red square.
        output: what the snippet printed when it was run as it stands.
        seconds, memory_gb: how long one more answer took in that process, and the most memory it had.
    """

    prompt: str
    image: str | None = None
    output: str | None = None
    seconds: float | None = None
    memory_gb: float | None = None


@dataclass(kw_only=True)
class ModelFacts:
    """What a model card says. All of it is text, not Markdown; numbers are as measured.

    Args:
        repo_id: "org/name", or a folder's name before it is pushed.
        summary: what the model does, in one or two sentences.
        license: of the whole, an id of the Hub's list: "apache-2.0", or "other" when the parts' differ.
        language: codes, `["en"]`, if they are known.
        parts: the two models it began as, and every source of training data.
        bank: the memory bank; `source` is a path from the checkpoint's folder until it is on the Hub. None for a
            model without memory.
        stages: in the order in which they ran.
        curves: picture of the training curves, a file beside the card.
        command: what to type to train the model again.
        hardware, training_hours: "2 cores of AMD EPYC", and how long they took for all stages.
        peak_memory_gb: most memory that training took.
        limits: what the model can't do, one sentence an item.
        versions: package versions by name.
        watts: power of the machine while it trained, if it is known. Energy is estimated from nothing else.
        grams_co2_per_kwh: of its electricity, if that is known.
    """

    repo_id: str
    summary: str
    license: str
    language: list[str] | None = None
    parts: list[Part]
    bank: Part | None = None
    example: Example
    stages: list[Stage]
    curves: str
    command: str
    evaluation: Evaluation
    hardware: str
    training_hours: float
    peak_memory_gb: float
    limits: list[str]
    versions: dict[str, str]
    watts: float | None = None
    grams_co2_per_kwh: float | None = None


@dataclass(kw_only=True)
class BankFacts:
    """What a bank card says. All of it is text, not Markdown.

    Args:
        repo_id: "org/name", or a folder's name before it is pushed.
        summary: what the rows are, in one or two sentences.
        license: of the rows, ids of the Hub's list.
        language: codes of the captions' languages.
        parts: the vision tower, and every source of images and captions.
        command: what to type to make the bank again.
        limits: what is wrong or missing in the rows, one sentence an item.
        model: a checkpoint with the bank's vision tower, if there is one: a Hub id, or a path from the bank's folder.
        config: the bank's `config` (bank_config.json); `read_facts` takes it from there.
        size_mb: of the Parquet files together; `read_facts` measures it.
    """

    repo_id: str
    summary: str
    license: list[str]
    language: list[str]
    parts: list[Part]
    command: str
    limits: list[str]
    model: str | None = None
    config: dict[str, Any]
    size_mb: float


@dataclass(kw_only=True)
class SpaceFacts:
    """What a demo Space's card says. All of it is text, not Markdown.

    Args:
        repo_id: "org/name" of the Space.
        summary: what it shows, at most 60 characters: the Hub's limit.
        license: of the Space's code, an id of the Hub's list.
        model, model_revision: the checkpoint's Hub id, and the commit whose weights and code it runs.
        bank: the memory bank's Hub id, None for a model without memory.
        prompt: what the demo asks when the user only gives an image.
    """

    repo_id: str
    summary: str
    license: str
    model: str
    model_revision: str
    prompt: str
    bank: str | None = None


Facts = ModelFacts | BankFacts | SpaceFacts
NESTED = {
    "parts": Part,
    "bank": Part,
    "example": Example,
    "stages": Stage,
    "evaluation": Evaluation,
    "systems": System,
    "scores": Score,
}


def facts_json(facts: ModelFacts | BankFacts) -> str:
    """The content of `card_facts.json`: what is not in the folder anyway."""
    content = asdict(facts)
    if isinstance(facts, BankFacts):
        del content["config"], content["size_mb"]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_facts(folder: str | os.PathLike, facts: ModelFacts | BankFacts) -> None:
    """Keeps the facts as `card_facts.json` in the folder of a checkpoint or a bank."""
    fresh = Path(folder, f"{FACTS_NAME}.new")  # there may be facts in it that a person filled in
    fresh.write_text(facts_json(facts), encoding="utf-8")
    fresh.replace(fresh.with_suffix(""))


def read_facts(folder: str | os.PathLike) -> ModelFacts | BankFacts:
    """
    The facts in a checkpoint's or a bank's folder. A field that `card_facts.json` lacks is None: rendering names it.

    Raises `ValueError` naming the file when it is no JSON object, or has a field that no card has.
    """
    folder = Path(folder)
    path, bank_config = folder / FACTS_NAME, folder / BANK_CONFIG_NAME
    content = {"repo_id": folder.resolve().name, **(_read_object(path) if path.is_file() else {})}
    if not bank_config.is_file():
        return _from_json(ModelFacts, content, str(path))
    size = sum(file.stat().st_size for file in (folder / "data").glob("*.parquet"))
    return _from_json(BankFacts, {**content, "config": _read_object(bank_config), "size_mb": size / 1e6}, str(path))


def _read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object ({error}). Correct it, or delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is no JSON object (a {type(content).__name__}). Correct it, or train or build again."
        )
    return content


def on_hub(
    facts: ModelFacts | BankFacts, repo_id: str, other: str | None = None, revision: str | None = None
) -> ModelFacts | BankFacts:
    """
    The facts as they are after a push to `repo_id`.

    Args:
        other: of a model, its bank's repository, with the commit `revision`; of a bank, a model's that reads it.
    """
    if isinstance(facts, BankFacts):
        is_path = facts.model is not None and facts.model.startswith((".", "/"))
        return replace(facts, repo_id=repo_id, model=other or (None if is_path else facts.model))
    bank = facts.bank
    if bank is not None and other is not None:
        bank = replace(bank, source=other, revision=revision, hub_type="dataset")
    return replace(facts, repo_id=repo_id, bank=bank)


def require(facts: Facts) -> None:
    """Raises `ValueError` naming every required fact that is missing, blank, or not of its type."""
    if gaps := list(_gaps(facts, type(facts), "")):
        raise ValueError(
            f"The card of {facts.repo_id!r} lacks {', '.join(gaps)}: missing, blank, or not of its type. A card has "
            f"no blanks: fill these fields of {type(facts).__name__} (in {FACTS_NAME})."
        )


def _gaps(value: Any, kind: Any, name: str) -> Iterator[str]:
    """Names of the facts in `value` that are not a `kind` with something in it."""
    if isinstance(kind, UnionType):
        fits = value is None if NoneType in get_args(kind) else False
        gaps = [[] if fits else list(_gaps(value, option, name)) for option in get_args(kind)]
        yield from min(gaps, key=len)
    elif kind is Any:
        return
    elif is_dataclass(kind) and isinstance(value, kind):
        for field in fields(kind):
            yield from _gaps(vars(value)[field.name], field.type, f"{name}.{field.name}" if name else field.name)
    elif get_origin(kind) is list and isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _gaps(item, get_args(kind)[0], f"{name}[{number}]")
    elif get_origin(kind) is dict and isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _gaps(item, get_args(kind)[1], f"{name}[{key!r}]")
    elif not (
        (kind is str and isinstance(value, str) and value.strip() and BLANK not in value)
        or (kind is float and isinstance(value, int | float) and type(value) is not bool and math.isfinite(value))
        or (kind is bool and type(value) is bool)
    ):
        yield name


def _from_json(kind: type, content: Any, name: str) -> Any:
    """`content` as the dataclass `kind`, what is absent as its default or None."""
    if not isinstance(content, dict):
        raise ValueError(f"{name} is {str(content)[:50]!r}, expected an object with the fields of {kind.__name__}.")
    known = {field.name: None if field.default is MISSING else field.default for field in fields(kind)}
    if unknown := sorted(content.keys() - known.keys()):
        raise ValueError(
            f"{name} has {', '.join(unknown)}, expected the fields of {kind.__name__}: {', '.join(known)}."
        )
    values = {**known, **content}
    for key, nested in NESTED.items():
        if key in values and values[key] is not None:
            value, path = values[key], f"{name}: {key}"
            values[key] = (
                [_from_json(nested, item, f"{path}[{number}]") for number, item in enumerate(value)]
                if isinstance(value, list)
                else _from_json(nested, value, path)
            )
    return kind(**values)
