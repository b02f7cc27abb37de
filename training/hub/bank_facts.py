"""Facts of a new bank for its card: what is known of where its rows are from, and how they were made."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets

from ...hub_cards.facts import BankFacts, Part, facts_json, facts_of_bank_config, read_facts, write_facts
from ...modeling_tinyalign.files import replace_folder
from ...modeling_tinyalign.memory_bank import MemoryBank
from .parts import UNKNOWN, describe_part, public_command

DATA = "images and captions"
MOST_LICENSES = 8  # of rows that a card names; a column with more holds something else


def save_with_facts(
    bank: MemoryBank, out: str | os.PathLike, command: Sequence[str], old: Sequence[Any] = (), data: Part | None = None
) -> None:
    """Save a new bank with what is known of it in card_facts.json; a person adds the rest.

    `command` made it, with new rows of the data set `data`, and others of the banks named in `old`. Raises as
    `MemoryBank.save_pretrained`.
    """
    earlier = [_facts_of_bank(name) for name in old]  # first: a broken one is told of by the name of its own file

    def write(folder: Path) -> None:
        bank.write_files(folder)
        facts = _with_sources(read_facts(folder), bank, data, earlier, public_command(command))
        write_facts(folder, with_facts_of_hub(facts))

    replace_folder(Path(out), write)


def facts_of_dataset(bank: MemoryBank, dataset: Any) -> str:
    """Return the card_facts.json of a bank that was built of a data set in Python. The Hub is not asked: push does."""
    facts = facts_of_bank_config("bank", asdict(bank.config))
    return facts_json(_with_sources(facts, bank, _part_of_dataset(dataset), (), None))


def with_facts_of_hub(facts: BankFacts) -> BankFacts:
    """Return the facts with commit and licence of each part that is on the Hub, as far as they are known there."""
    parts = []
    for part in facts.parts:
        if part.hub_type is not None and part.license is None:
            part = describe_part(part.role, part.source, part.hub_type, part.revision)
        parts.append(replace(part, license=part.license or UNKNOWN))
    return replace(facts, parts=parts)


def licenses_of_rows(bank: MemoryBank) -> list[str]:
    """Return the licences in the bank's column `license`, as the Hub writes them; none unless every row has one."""
    columns = [name for name in ("license", "licence") if name in bank.config.columns]
    if not columns:
        return []
    found = {str(license or "").strip().lower() for license in bank.table[columns[0]].unique().to_pylist()}
    return sorted(found) if "" not in found and len(found) <= MOST_LICENSES else []


def command_of_settings(words: Sequence[str], settings: Any) -> list[str]:
    """Return the command line of these settings, a dataclass of options with `dataset` among them, and `--out`."""
    defaults, options = vars(type(settings)(settings.dataset)), [*words, "--dataset", settings.dataset]
    for name, value in vars(settings).items():
        if value == defaults[name]:
            continue
        options.append(f"--{name}")
        if isinstance(value, list):
            options += value
        elif value is not True:
            options.append(str(value))
    return ["tinyalign", "bank", *options, "--out", "bank"]


def _with_sources(
    facts: BankFacts, bank: MemoryBank, data: Part | None, earlier: Sequence[BankFacts], command: str | None
) -> BankFacts:
    """Return a bank's own facts with those of its sources. Two sources have no common summary: a person writes it."""
    parts, limits = list(facts.parts), list(facts.limits)
    for other in earlier:
        parts += [part for part in other.parts if part.role != "vision tower"]
        limits += other.limits
    if data is not None:
        parts.append(data)
    licenses = [other.license for other in earlier] + ([] if data is None else [_list_of(data.license)])
    common = sorted(set().union(*licenses)) if licenses and all(licenses) else None
    facts = replace(
        facts,
        license=licenses_of_rows(bank) or common,
        parts=[part for place, part in enumerate(parts) if part not in parts[:place]],
        limits=list(dict.fromkeys(limits)),
        command=command,
    )
    if len(earlier) == 1 and data is None:
        facts = replace(facts, summary=earlier[0].summary, language=earlier[0].language)
    return facts


def _facts_of_bank(name: str | os.PathLike) -> BankFacts:
    """Return the facts in a bank's folder, or of its repository."""
    if Path(name).expanduser().is_dir():
        return read_facts(Path(name).expanduser())
    part = describe_part("memory bank", str(name), "dataset")
    return BankFacts(repo_id=str(name), parts=[part], license=_list_of(part.license), config={})


def _list_of(license: str | None) -> list[str] | None:
    return None if license in (None, UNKNOWN) else license.split(", ")


def _part_of_dataset(dataset: Any) -> Part | None:
    """Return the repository that a data set was loaded from; None if it does not know of one."""
    if not isinstance(dataset, datasets.Dataset) or not dataset.cache_files:
        return None
    # the cache of `datasets`: ORG___NAME/CONFIG/VERSION/COMMIT/FILE
    folders = Path(dataset.cache_files[0]["filename"]).parts[-5:]
    organisation, divided, name = folders[0].partition("___")
    if not divided or not re.fullmatch("[0-9a-f]{40}", folders[3]):
        return None
    return Part(role=DATA, source=f"{organisation}/{name}", revision=folders[3], hub_type="dataset")
