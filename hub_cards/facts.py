"""Facts that cards tell, kept as `card_facts.json` beside the model or bank that they describe."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

FACTS_NAME = "card_facts.json"
BANK_CONFIG_NAME = "bank_config.json"
BLANK = "[More Information Needed]"


class Facts:
    """Base of all facts: a fact that is not known is None, never an empty text or a number that is none."""

    def validate_no_blanks(self):
        for name, value in vars(self).items():
            for item in _leaves(value):
                if isinstance(item, str) and (not item.strip() or BLANK in item):
                    raise ValueError(f"{name} is blank ({item!r}), expected a text, or null where it is not known")
                if isinstance(item, float) and not math.isfinite(item):
                    raise ValueError(f"{name} is {item}, expected a finite number, or null where it is not known")


@strict
@dataclass(kw_only=True)
class Part(Facts):
    """Something that a model or a bank is made of."""

    role: str  # "language model", "vision tower", "images and labels", ...
    source: str  # a Hub id, a package, an address
    revision: str | None = None  # a commit, or a package's version
    license: str | None = None  # SPDX id
    # "model" or "dataset" when the source is a Hub id: it is linked then, and in the card's metadata.
    hub_type: str | None = None


@strict
@dataclass(kw_only=True)
class Evaluation(Facts):
    """A table of systems and metrics: of the model itself, and of what it is compared with."""

    dataset: str  # its Hub id, or a name of it, as a reader should see it
    split: str
    metrics: dict[str, str]  # column headings: {"exact_match": "Exact match"}
    # By system and metric: the value alone, or [value, low, high] with its 95% interval.
    own: dict[str, dict[str, list[int | float]]]  # go into the card's metadata, too
    others: dict[str, dict[str, list[int | float]]] = field(default_factory=dict)
    # By metric, where each has its own: {"dataset_type": "org/name", "dataset_split": "test", "dataset_revision": ...}
    sources: dict[str, dict[str, str]] = field(default_factory=dict)

    def validate_names(self):
        for name, scores in (self.own | self.others).items():
            if unknown := scores.keys() - self.metrics.keys():
                raise ValueError(f"{name} has a score of {sorted(unknown)}, expected those of {list(self.metrics)}")
            if any(len(score) not in (1, 3) for score in scores.values()):
                raise ValueError(f"{name} has the scores {scores}, expected [value] or [value, low, high]")


@strict
@dataclass(kw_only=True)
class Example(Facts):
    """A question that the card's Python asks."""

    prompt: str = "Describe the image."
    image: str | None = None  # a file beside the card; without one, the Python draws a red square
    output: str | None = None  # what the Python printed when it was run as it stands


@strict
@dataclass(kw_only=True)
class ModelFacts(Facts):
    """The facts of a model's card: text, not Markdown, and numbers as measured."""

    repo_id: str  # "org/name", or a folder's name before it is pushed
    summary: str | None = None  # one or two sentences on what the model does
    license: str | None = None  # for the whole, of the Hub's list: "apache-2.0", or "other" when the parts' differ
    language: list[str] | None = None  # codes: ["en"]
    tags: list[str] = field(default_factory=list)  # beside those of every TinyAlign model
    parts: list[Part] = field(default_factory=list)  # the two models it began as, and every source of training data
    top_k: int | None = None  # examples that it retrieves for an image; 0 for a baseline without memory
    bank: Part | None = None  # its source is a path from the checkpoint's folder until it is on the Hub
    example: Example = field(default_factory=Example)
    # Settings by name of each stage of training, its minutes and memory among them, in the order in which they ran.
    stages: dict[str, dict[str, str | int | float | bool]] = field(default_factory=dict)
    curves: str | None = None  # picture of the training curves, a file beside the card
    command: str | None = None  # trains the model again
    evaluation: Evaluation | None = None
    hardware: str | None = None  # "2 cores of AMD EPYC"
    limits: list[str] = field(default_factory=list)  # what the model can't do, one sentence an item
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def pictures(self) -> list[str]:
        """The names of the card's pictures, files beside it."""
        return list(filter(None, (self.curves, self.example.image)))

    def validate_pictures(self):
        for name in self.pictures:
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise ValueError(f"a picture is {name!r}, expected the name of a file beside the card, without spaces")


@strict
@dataclass(kw_only=True)
class BankFacts(Facts):
    """The facts of a memory bank's card: text, not Markdown."""

    repo_id: str  # "org/name", or a folder's name before it is pushed
    summary: str | None = None  # one or two sentences on what the rows are
    license: list[str] | None = None  # of the rows, ids of the Hub's list
    language: list[str] | None = None  # of the captions
    parts: list[Part] = field(default_factory=list)  # the vision tower, and every source of images and captions
    command: str | None = None  # makes the bank again
    limits: list[str] = field(default_factory=list)  # what is wrong or missing in the rows, one sentence an item
    model: str | None = None  # a checkpoint with the bank's vision tower: a Hub id, or a path from the bank's folder
    config: dict[str, Any]  # content of bank_config.json; `read_facts` takes it from there
    size_mb: int | float | None = None  # of the Parquet files together; `read_facts` measures it


# Facts within facts, by the names of their fields.
NESTED_FACTS = {"parts": Part, "bank": Part, "example": Example, "evaluation": Evaluation}


def facts_of_bank_config(repo_id: str, config: dict[str, Any]) -> BankFacts:
    """Return the facts that a bank's own config knows: its vision tower, and the limit that follows from it."""
    source, revision = config["tower"]["name"], config["tower"]["revision"]
    hub_type = "model" if "/" in source and not Path(source).exists() else None
    part = Part(role="vision tower", source=source, revision=revision, hub_type=hub_type)
    limits = [f"A model with another vision tower than {source.split('/')[-1]} cannot use the bank."]
    return BankFacts(repo_id=repo_id, parts=[part], limits=limits, config=config)


def facts_json(facts: ModelFacts | BankFacts) -> str:
    """Return the content of `card_facts.json`: all facts but those that are in the folder anyway."""
    known = ["config", "size_mb"]
    if "/" not in facts.repo_id:  # the name of the folder, which may be moved
        known.append("repo_id")
    content = {name: value for name, value in asdict(facts).items() if name not in known}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_facts(folder: str | os.PathLike, facts: ModelFacts | BankFacts) -> None:
    """Write the facts as `card_facts.json` into the folder of a checkpoint or a bank."""
    fresh = Path(folder, f"{FACTS_NAME}.new")  # there may be facts in it that a person filled in
    fresh.write_text(facts_json(facts), encoding="utf-8")
    fresh.replace(fresh.with_suffix(""))


def read_facts(folder: str | os.PathLike) -> ModelFacts | BankFacts:
    """Return the facts in the folder of a checkpoint or a bank; without a file, those that the folder knows anyway.

    Raises `ValueError` if the file is no JSON object, or has a field (it is named) that is unknown or of a wrong type.
    """
    folder = Path(folder).resolve()
    path, config_path = folder / FACTS_NAME, folder / BANK_CONFIG_NAME
    content = {"repo_id": folder.name, **(read_object(path) if path.is_file() else {})}
    try:
        if not config_path.is_file():
            return _parse_facts(ModelFacts, content)
        size = sum(file.stat().st_size for file in (folder / "data").glob("*.parquet"))
        known = {"config": read_object(config_path), "size_mb": size / 1e6}
        if path.is_file():
            return _parse_facts(BankFacts, content | known)
        return replace(facts_of_bank_config(folder.name, known["config"]), size_mb=known["size_mb"])
    except (StrictDataclassError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{path} has no facts of a card: {reason}. Correct it, see docs/cards.md.") from error


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in lists and dictionaries, however deep."""
    if not isinstance(value, (dict, list)):
        yield value
        return
    for item in value.values() if isinstance(value, dict) else value:
        yield from _leaves(item)


def read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}). Correct it, or delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object. Correct it, or delete it.")
    return content


def _parse_facts(kind: type, content: Any) -> Any:
    """Make the facts `kind`, and those within them, of a JSON object."""
    if not isinstance(content, dict):
        raise TypeError(f"{str(content)[:50]!r}, expected an object with the fields of {kind.__name__}")
    values = {name: value for name, value in content.items() if value is not None}
    for name in NESTED_FACTS.keys() & values.keys():
        value, parse = values[name], partial(_parse_facts, NESTED_FACTS[name])
        values[name] = list(map(parse, value)) if isinstance(value, list) else parse(value)
    return kind(**values)
