"""Parts of models and banks for their cards: name, commit and licence, and never a path of this machine."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoCard, try_to_load_from_cache

from ...hub_cards.cards import is_hub_id
from ...hub_cards.facts import BankFacts, Part, read_facts, write_facts

UNKNOWN = "unknown"  # an id of the Hub's list of licences, too
SECONDS = 10  # to wait for the Hub's answer


def describe_part(role: str, name: str, hub_type: str, revision: str | None = None) -> Part:
    """
    Returns a model or data set by its folder, file or Hub id, with its commit at this `revision` (by default main) and
    the licence that its card names there. A path is named without its folder.
    """
    if not is_hub_id(name):
        license = _license_of_folder(Path(name).expanduser())
        return Part(role=role, source=Path(name).name, revision="local, without a revision", license=license)
    commit, license = _ask_hub(name, hub_type, revision)
    return Part(role=role, source=name, revision=commit, license=license, hub_type=hub_type)


def with_facts_of_hub(facts: BankFacts) -> BankFacts:
    """Returns the facts with commit and licence of each part that is on the Hub, as far as they are known there."""
    parts = []
    for part in facts.parts:
        if part.hub_type is not None and part.license is None:
            part = describe_part(part.role, part.source, part.hub_type, part.revision)
        parts.append(replace(part, license=part.license or UNKNOWN))
    return replace(facts, parts=parts)


def record_bank(folder: str | os.PathLike, settings: Any) -> None:
    """
    Writes what `tinyalign bank build` knows into a bank's card_facts.json; summary and licence are left to a person.

    Args:
        folder: The bank's.
        settings: A dataclass whose fields are the options of the command, `dataset` and `dataset_revision` among them.
    """
    facts = read_facts(folder)
    data = describe_part("images and captions", settings.dataset, "dataset", settings.dataset_revision)
    command = ["tinyalign", "bank", "build", *_options(settings), "--out", "bank"]
    facts = replace(facts, parts=[*facts.parts, data], command=public_command(command))
    if data.license != UNKNOWN:
        facts.license = [data.license]
    write_facts(folder, with_facts_of_hub(facts))


def _options(settings: Any) -> list[str]:
    """Returns the options that are not at their defaults."""
    defaults, options = vars(type(settings)(settings.dataset)), ["--dataset", settings.dataset]
    for name, value in vars(settings).items():
        if value == defaults[name]:
            continue
        options.append(f"--{name}")
        if isinstance(value, list):
            options += value
        elif value is not True:
            options.append(str(value))
    return options


def public_command(arguments: Sequence[str]) -> str:
    """Returns a command line with paths of this machine cut to their last name."""
    return shlex.join(map(_public_argument, arguments))


def _public_argument(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if argument.startswith("-") and equals:
        return f"{option}={_public_argument(value)}"
    if re.search(r"[{\s]", argument) and not os.path.exists(argument):  # JSON or a sentence, with paths in it
        return re.sub(r"(?<![\w:/.])(?:~|\.{1,2})?/(?:[^\s/\"']+/)*(?=[^\s/\"'])", "", argument)
    if "/" not in argument or "://" in argument or is_hub_id(argument):
        return argument
    return Path(argument).name


def _license_of_folder(path: Path) -> str:
    if (path / "card_facts.json").is_file():
        license = read_facts(path).license
    elif (path / "README.md").is_file():
        license = RepoCard.load(path / "README.md", ignore_metadata_errors=True).data.get("license")
    else:
        license = None
    return _joined(license)


def _ask_hub(name: str, hub_type: str, revision: str | None) -> tuple[str, str]:
    """Returns commit and licence, `UNKNOWN` where the Hub has none, or cannot be reached and the cache has none."""
    try:
        info = HfApi().repo_info(name, repo_type=hub_type, revision=revision, timeout=SECONDS)
    except Exception:  # of huggingface_hub, and of an HTTP library that changes from version to version
        return _ask_cache(name, hub_type, revision)
    license = None if info.card_data is None else info.card_data.get("license")
    return info.sha, _joined(license)


def _ask_cache(name: str, hub_type: str, revision: str | None) -> tuple[str, str]:
    commit, license = revision or UNKNOWN, UNKNOWN
    for file in ("config.json", "README.md"):
        cached = try_to_load_from_cache(name, file, repo_type=hub_type, revision=revision)
        if isinstance(cached, str):
            commit = Path(cached).parent.name
            license = _license_of_folder(Path(cached).parent)
    return commit, license


def _joined(license: str | list[str] | None) -> str:
    if not license:
        return UNKNOWN
    return ", ".join(license) if isinstance(license, list) else license
