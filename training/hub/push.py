"""Pushing a checkpoint and its memory bank to the Hub, with their cards."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, SpaceCard
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_imports

from ...hub_cards.cards import bank_card, check_pictures, model_card, plain_model_card, write_space
from ...hub_cards.facts import FACTS_NAME, ModelFacts, Part, facts_json, read_facts, read_object, write_facts
from ...modeling_tinyalign.configuration_tinyalign import TinyAlignConfig
from ...modeling_tinyalign.files import CARD_NAME, WEIGHTS, push_files, resolve_commit
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.modeling_tinyalign import TinyAlignForConditionalGeneration
from .bank_facts import with_facts_of_hub
from .parts import describe_part

AUTO_CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
    "processor_config.json": ("AutoProcessor",),
}
# Of a checkpoint's folder; optimizer states, pickles and subfolders stay here, and what names this machine's paths.
WEIGHT_SUFFIXES = {".json", ".safetensors", ".py", ".jinja", ".png", ".txt", ".model"}
LOCAL_FILES = {"run.json", "bad_rows.json", "trainer_state.json"}
# Facts of a bank that nothing but a person knows.
EXAMPLES = {"summary": "Photographs of North American birds with their names.", "license": ["cc-by-4.0"]}


def push(
    model: tuple[str, str] | None = None,
    bank: tuple[str, str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    space: str | None = None,
) -> None:
    """Push a bank, then a checkpoint whose config names the bank at the commit that was just made; a commit each.

    Args:
        model: folder of the checkpoint with its processor, and the repository.
        bank: folder and repository. Without it, the checkpoint keeps the bank that it names.
        private, revision: new repositories are private; the branch of both.
        space: repository of a demo Space, a chat with the checkpoint at the commit that was just made.

    Raises:
        ValueError: a file or a fact for a card is missing (they are named), or the bank is not one for this model.
            Nothing was pushed.
        OSError: the Hub refused, or cannot be reached.
    """
    options = {"private": private, "revision": revision}
    for name in (model and model[1], bank and bank[1], space):
        if name is not None:
            validate_repo_id(name)
            if "/" not in name:
                raise ValueError(f"The repository is {name!r}, expected OWNER/NAME: cards name it in full.")
    facts = None if model is None else checked_facts(Path(model[0]), has_bank=bank is not None)
    if space is not None and facts is None:
        raise ValueError(f"A Space needs a checkpoint with {FACTS_NAME}, which says what to ask it.")
    loaded = None
    if bank is not None:
        loaded = MemoryBank.from_pretrained(bank[0])
        card = bank_card_for_push(Path(bank[0]), bank[1], model and model[1])
        if model is not None:
            TinyAlignForConditionalGeneration.from_pretrained(model[0], dtype="auto").attach_memory_bank(loaded)
        commit = loaded.push_to_hub(bank[1], card=card, **options)
        print(f"bank:  {commit.repo_url} at {commit.oid}")
    if model is None:
        return
    config = TinyAlignConfig.from_pretrained(model[0])
    if loaded is not None:
        config.memory_bank, config.memory_bank_revision = loaded.repo_id, loaded.revision
    elif config.memory_bank is not None:
        config.memory_bank_revision = resolve_commit(config.memory_bank, config.memory_bank_revision)
    elif config.memory_top_k > 0:
        print("The checkpoint names no memory bank: give --bank, or attach one after loading.")
    if facts is not None:
        part, name, revision = facts.bank, config.memory_bank, config.memory_bank_revision
        if name is not None and (part is None or (part.source, part.revision) != (name, revision)):
            source = name if bank is None else os.path.abspath(bank[0])
            known = part.license if part is not None and part.source == name else None
            license = known or describe_part("memory bank", source, "dataset", revision).license
            part = Part(role="memory bank", source=name, revision=revision, license=license, hub_type="dataset")
        facts = replace(facts, repo_id=model[1], bank=part)
    commit = push_checkpoint(Path(model[0]), model[1], config, facts, **options)
    print(f"model: {commit.repo_url} at {commit.oid}")
    if space is not None:
        print(f"space: {push_space(space, facts, commit.oid, private).repo_url}")


def push_checkpoint(
    folder: Path, repo_id: str, config: TinyAlignConfig, facts: ModelFacts | None, **options
) -> CommitInfo:
    """Push the files of a checkpoint with this config; its card is of the facts, or else that in the folder."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name not in LOCAL_FILES]
    files = {path.name: path for path in paths if path.suffix in WEIGHT_SUFFIXES}
    files["config.json"] = config.to_json_string().encode()
    if facts is not None:
        files |= {name: folder / name for name in facts.pictures}
        files |= {FACTS_NAME: facts_json(facts).encode(), CARD_NAME: str(model_card(facts)).encode()}
    elif (folder / CARD_NAME).is_file():
        files[CARD_NAME] = folder / CARD_NAME
    options |= {"replaced": WEIGHTS, "commit_message": "Upload TinyAlign"}
    return push_files(files, repo_id, "model", make_card=lambda name: plain_model_card(name, config, []), **options)[1]


def checked_facts(folder: Path, has_bank: bool) -> ModelFacts | None:
    """Return the facts of a checkpoint's card, None if nobody has recorded any.

    Raises `ValueError` if the folder lacks weights, or the code and `auto_map` to load them with, or a picture of the
    card, or if its bank is not pushed.
    """
    missing = [] if list(folder.glob(WEIGHTS)) else [WEIGHTS]
    for name, classes in AUTO_CLASSES.items():
        content = read_object(folder / name) if (folder / name).is_file() else {}
        auto_map = content.get("auto_map") or {}
        missing += [f"{auto_class} in the auto_map of {name}" for auto_class in classes if auto_class not in auto_map]
        modules = [auto_map[auto_class].split(".")[0] for auto_class in classes if auto_class in auto_map]
        for module in modules:  # grows
            code = folder / f"{module}.py"
            if code.is_file():
                modules += sorted(set(get_relative_imports(code)) - set(modules))
            else:
                missing.append(code.name)
    if missing:
        raise ValueError(
            f"{folder} is no whole checkpoint, it lacks {', '.join(dict.fromkeys(missing))}: save the model and its "
            "processor there with save_pretrained."
        )
    if not (folder / FACTS_NAME).is_file():
        return None
    facts = read_facts(folder)
    check_pictures(folder, facts)
    if facts.bank is not None and facts.bank.hub_type is None and not has_bank:
        raise ValueError(f"The card of {folder} names the local bank {facts.bank.source}: push it too, with --bank.")
    return facts


def bank_card_for_push(folder: Path, repo_id: str, model: str | None) -> str:
    """Return the README.md of a bank's repository: of the facts in the folder, or the one there if they lack some.

    Raises `ValueError` if a fact is missing that only a person knows, once what is known is in card_facts.json.
    """
    path, facts = folder / FACTS_NAME, with_facts_of_hub(read_facts(folder))
    missing = [name for name in EXAMPLES if not vars(facts)[name]]
    if missing and (folder / CARD_NAME).is_file():
        return (folder / CARD_NAME).read_text(encoding="utf-8")
    if missing:
        found = "lacks" if path.is_file() else "was written with what the bank knows, and lacks"
        if not path.is_file():
            write_facts(folder, facts)
        examples = ", ".join(f'"{name}": {json.dumps(EXAMPLES[name])}' for name in missing)
        raise ValueError(
            f"{path} {found} {' and '.join(missing)}, which only you know: put what is true in the place of the null "
            f"({examples}, say; licences are ids of https://huggingface.co/docs/hub/repositories-licenses), read over "
            "the rest, and push again."
        )
    if model is None and not (facts.model or ".").startswith((".", "/")):
        model = facts.model
    return str(bank_card(replace(facts, repo_id=repo_id, model=model)))


def push_space(repo_id: str, facts: ModelFacts, model_revision: str, private: bool | None = None) -> CommitInfo:
    """Put a chat with a pushed model, at this commit, into a Space, which is created if it does not exist."""
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    message, visitors_may = f"A chat with {facts.repo_id}", "ask"
    if api.file_exists(url.repo_id, CARD_NAME, repo_type="space"):  # what its owner has set there stays
        visitors_may = SpaceCard.load(url.repo_id).data.get("visitors_may", visitors_may)
    with tempfile.TemporaryDirectory() as folder:
        write_space(folder, url.repo_id, facts, model_revision, visitors_may)
        return api.upload_folder(repo_id=url.repo_id, repo_type="space", folder_path=folder, commit_message=message)
