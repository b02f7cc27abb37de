"""Parts of models and banks for their cards: name, commit and licence, and never a path of this machine."""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, RepoCard, try_to_load_from_cache
from yaml import YAMLError

from ...hub_cards.cards import is_hub_id
from ...hub_cards.facts import FACTS_NAME, Part, read_facts
from ..arguments.names import HUB_SECONDS

UNKNOWN = "unknown"  # an id of the Hub's list of licences, too
LOCAL = "local, without a revision"
FREE_TEXT = ("--prompt", "--where", "--set")  # options whose values are no paths


def describe_part(role: str, name: str, hub_type: str, revision: str | None = None) -> Part:
    """Return a model or data set by its folder, file or Hub id, with the licence that its card names.

    On the Hub it has its commit at this `revision`, by default main. A path is named without its folder.
    """
    if is_hub_id(name):
        commit, license = _ask_hub(name, hub_type, revision)
        return Part(role=role, source=name, revision=commit, license=license, hub_type=hub_type)
    path = Path(name).expanduser().absolute()
    return Part(role=role, source=public_source(name), revision=LOCAL, license=_license_of_folder(path))


def public_source(name: str) -> str:
    """Return a Hub id as it is, and of a path of this machine the last name."""
    return name if is_hub_id(name) else Path(name).expanduser().absolute().name or "(local)"


def license_of(license: str | Sequence[str] | None) -> str:
    """Return one text of the licences of a part."""
    if not license or not isinstance(license, (list, tuple)):
        return str(license or UNKNOWN)
    return ", ".join(map(str, license))


def common_license(parts: Sequence[Part]) -> str:
    """Return the licence of a model of these parts: "other" if theirs differ."""
    known = {(part.license or UNKNOWN).lower() for part in parts}
    if UNKNOWN in known:
        return UNKNOWN
    return known.pop() if len(known) == 1 else "other"


def public_command(arguments: Sequence[str]) -> str:
    """Return a command line without access tokens, and with paths of this machine cut to their last name."""
    words, option = [], ""
    for argument in arguments:
        words.append(_public(argument, option))
        if argument.startswith("--") or option not in FREE_TEXT:
            option = argument
    return shlex.join(words)


def _public(argument: str, option: str) -> str:
    if option in FREE_TEXT and not argument.startswith("--"):
        return re.sub(r"\bhf_\w{30,}", "...", argument)
    name, equals, value = argument.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name):
        return f"{name}={_public(value, name)}"
    if option.endswith("token") or re.search(r"\bhf_\w{30,}", argument):
        return "..."
    if argument.startswith(("{", "[")):  # JSON
        return re.sub(r'"([^"]+)"', lambda text: f'"{_public(text[1], "")}"', argument)
    if re.match(r"(?!file:)\w+://", argument):
        return re.sub("//[^/@]*@", "//", argument)  # without a name and a password
    if "/" not in argument or is_hub_id(argument):
        return argument
    return Path(argument).name


def _license_of_folder(path: Path) -> str:
    if (path / FACTS_NAME).is_file():
        return license_of(read_facts(path).license)
    if (path / "README.md").is_file():
        with suppress(ValueError, YAMLError):  # somebody's README.md
            return license_of(RepoCard.load(path / "README.md", ignore_metadata_errors=True).data.get("license"))
    return UNKNOWN


def _ask_hub(name: str, hub_type: str, revision: str | None) -> tuple[str, str]:
    """Return commit and licence, `UNKNOWN` where the Hub has none, or cannot be reached and the cache has none."""
    with suppress(Exception):  # of huggingface_hub, and of an HTTP library that changes from version to version
        info = HfApi().repo_info(name, repo_type=hub_type, revision=revision, timeout=HUB_SECONDS)
        return info.sha, license_of(info.card_data and info.card_data.get("license"))
    commit, license = revision or UNKNOWN, UNKNOWN
    for file in ("config.json", "bank_config.json", "README.md"):
        cached = try_to_load_from_cache(name, file, repo_type=hub_type, revision=revision)
        if isinstance(cached, str):
            commit, license = Path(cached).parent.name, _license_of_folder(Path(cached).parent)
    return commit, license
