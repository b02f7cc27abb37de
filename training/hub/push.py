"""Pushing a checkpoint and its memory bank to the Hub, with their cards."""

import json
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers.dynamic_module_utils import get_relative_imports

from ...hub_cards.cards import bank_card, model_card, plain_model_card, write_space
from ...hub_cards.facts import FACTS_NAME, ModelFacts, facts_json, on_hub, read_facts, write_facts
from ...modeling_tinyalign.configuration_tinyalign import TinyAlignConfig
from ...modeling_tinyalign.files import CARD_NAME, WEIGHTS, push_files, resolve_commit
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.modeling_tinyalign import TinyAlignForConditionalGeneration
from .bank_facts import with_facts_of_hub

AUTO_CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
    "processor_config.json": ("AutoProcessor",),
}
# Of a checkpoint's folder; optimizer states, pickles and subfolders stay here.
SUFFIXES = {".json", ".safetensors", ".py", ".jinja", ".png", ".txt", ".model"}
# Facts of a bank that nothing but a person knows.
EXAMPLES = {"summary": "Photographs of North American birds with their names.", "license": ["cc-by-4.0"]}


def push(
    model: tuple[str, str] | None = None,
    bank: tuple[str, str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    space: str | None = None,
):
    """
    Pushes a bank, then a checkpoint whose config names the bank at the commit that was just made; a commit each.

    Args:
        model: Folder of the checkpoint with its processor, and the repository.
        bank: Folder of the bank, and the repository. Without it, the checkpoint keeps the bank that it names.
        private: Whether new repositories are private.
        revision: The branch, for both. By default main.
        space: Repository of a demo Space, a chat with the checkpoint at the commit that was just made.

    Raises:
        ValueError: A file or a fact for a card is missing (they are named), or the bank is not one for this model.
            Nothing was pushed.
        OSError: The Hub refused, or can't be reached.
    """
    if model is not None:
        folder = Path(model[0])
        check_checkpoint(folder)
        config = TinyAlignConfig.from_pretrained(folder)
        facts = facts_in(folder)
        if bank is None and facts is not None and facts.bank is not None and facts.bank.hub_type is None:
            raise ValueError(
                f"The card of {folder} names the local bank {facts.bank.source}: push it too, with --bank."
            )
    if space is not None and (model is None or facts is None):
        raise ValueError(f"A Space needs a checkpoint with {FACTS_NAME}, which says what to ask it.")
    if bank is not None:
        loaded = MemoryBank.from_pretrained(bank[0])
        card_of_bank = bank_card_for_push(Path(bank[0]), bank[1], other=model[1] if model else None)
        if model is not None:
            TinyAlignForConditionalGeneration.from_pretrained(folder, dtype="auto").attach_memory_bank(loaded)
        commit = loaded.push_to_hub(bank[1], private=private, revision=revision, card=card_of_bank)
        print(f"bank:  {commit.repo_url} at {commit.oid}")
    if model is None:
        return
    if bank is not None:
        config.memory_bank, config.memory_bank_revision = loaded.repo_id, loaded.revision
    elif config.memory_bank is not None:
        config.memory_bank_revision = resolve_commit(config.memory_bank, config.memory_bank_revision)
    elif config.memory_top_k > 0:
        print("The checkpoint names no memory bank: give --bank, or attach one after loading.")
    files = {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES}
    files["config.json"] = config.to_json_string().encode()
    if facts is not None:
        facts = on_hub(facts, model[1], config.memory_bank, config.memory_bank_revision)
        files |= {FACTS_NAME: facts_json(facts).encode(), CARD_NAME: str(model_card(facts)).encode()}
    elif (folder / CARD_NAME).is_file():
        files[CARD_NAME] = folder / CARD_NAME
    _, commit = push_files(
        files,
        model[1],
        "model",
        replaced=WEIGHTS,
        make_card=lambda name: plain_model_card(name, config, []),
        commit_message="Upload TinyAlign",
        private=private,
        revision=revision,
    )
    print(f"model: {commit.repo_url} at {commit.oid}")
    if space is not None:
        print(f"space: {push_space(space, facts, commit.oid, private).repo_url}")


def check_checkpoint(folder: Path):
    """Raises `ValueError` unless the folder has weights, and the code and `auto_map` to load it with."""
    missing = [] if list(folder.glob(WEIGHTS)) else [WEIGHTS]
    for name, classes in AUTO_CLASSES.items():
        content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        auto_map = content.get("auto_map", {})
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


def facts_in(folder: Path) -> ModelFacts | None:
    """Returns the facts of a checkpoint's card, or None if nobody has recorded any."""
    return read_facts(folder) if (folder / FACTS_NAME).is_file() else None


def bank_card_for_push(folder: Path, repo_id: str, other: str | None) -> str:
    """
    Returns the README.md of a bank's repository: made of the facts in the folder, else the one that is there.

    Args:
        other: Repository of a model that reads the bank.

    Raises:
        ValueError: A fact is missing that only a person knows. What is known has been written to card_facts.json.
    """
    path = folder / FACTS_NAME
    if (folder / CARD_NAME).is_file() and not path.is_file():
        return (folder / CARD_NAME).read_text(encoding="utf-8")
    facts = read_facts(folder)
    missing = [name for name in EXAMPLES if not vars(facts)[name]]
    if missing:
        found = "lacks" if path.is_file() else "was written with what the bank knows, and lacks"
        if not path.is_file():
            write_facts(folder, with_facts_of_hub(facts))
        examples = ", ".join(f'"{name}": {json.dumps(EXAMPLES[name])}' for name in missing)
        raise ValueError(
            f"{path} {found} {' and '.join(missing)}, which only you know: fill in ({examples}, say; licences are ids "
            "of https://huggingface.co/docs/hub/repositories-licenses), read over the rest, and push again."
        )
    return str(bank_card(on_hub(facts, repo_id, other)))


def push_space(repo_id: str, facts: ModelFacts, model_revision: str, private: bool | None = None) -> CommitInfo:
    """
    Puts a chat with a model into a Space, which is created if it does not exist.

    Args:
        facts: Of the model as it is on the Hub.
        model_revision: The commit whose weights and code the Space runs.

    Raises:
        OSError: The Hub refused, or can't be reached.
    """
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_space(folder, url.repo_id, facts, model_revision)
        return api.upload_folder(
            repo_id=url.repo_id,
            repo_type="space",
            folder_path=folder,
            commit_message=f"A chat with {facts.repo_id}",
        )
