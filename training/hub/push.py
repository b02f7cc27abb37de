"""Pushing a checkpoint and its memory bank to the Hub, with their cards."""

import json
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from ...hub_cards.cards import render_bank_card, render_model_card
from ...hub_cards.facts import FACTS_NAME, BankFacts, ModelFacts, facts_json, on_hub, read_facts
from ...modeling_tinyalign.configuration_tinyalign import TinyAlignConfig
from ...modeling_tinyalign.files import CARD_NAME, WEIGHTS, push_files, resolve_commit
from ...modeling_tinyalign.memory_bank import MemoryBank
from ...modeling_tinyalign.modeling_tinyalign import TinyAlignForConditionalGeneration
from .space import push_space

AUTO_CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
    "processor_config.json": ("AutoProcessor",),
}
# Of a checkpoint's folder; optimizer states, pickles and subfolders stay here.
SUFFIXES = {".json", ".safetensors", ".py", ".jinja", ".png", ".txt", ".model"}


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
    if space is not None and (model is None or facts_of(folder, model[1], None) is None):
        raise ValueError(f"A Space needs a checkpoint with {FACTS_NAME}, which says what to ask it.")
    if bank is not None:
        loaded = MemoryBank.from_pretrained(bank[0])
        bank_card = card_of(Path(bank[0]), bank[1], other=model[1] if model else None)
        if model is not None:
            card_of(folder, model[1], bank[1], "0" * 40)  # what it lacks is said before anything is pushed
            TinyAlignForConditionalGeneration.from_pretrained(folder, dtype="auto").attach_memory_bank(loaded)
        commit = loaded.push_to_hub(bank[1], private=private, revision=revision, card=bank_card)
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
    bank_on_hub = (config.memory_bank, config.memory_bank_revision)
    card, facts = card_of(folder, model[1], *bank_on_hub), facts_of(folder, model[1], *bank_on_hub)
    if facts is not None:
        files[FACTS_NAME] = facts_json(facts).encode()
    _, commit = push_files(
        {**files, CARD_NAME: card.encode()},
        model[1],
        "model",
        replaced=WEIGHTS,
        make_card=str,
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


def facts_of(
    folder: Path, repo_id: str, other: str | None, revision: str | None = None
) -> ModelFacts | BankFacts | None:
    """The facts in the folder as they are on the Hub, or None if it has a README.md instead."""
    if (folder / CARD_NAME).is_file() and not (folder / FACTS_NAME).is_file():
        return None
    return on_hub(read_facts(folder), repo_id, other, revision)


def card_of(folder: Path, repo_id: str, other: str | None, revision: str | None = None) -> str:
    """
    README.md of a repository: made of the facts in the folder, else the one that is there.

    Raises `ValueError` naming the facts that are missing.
    """
    facts = facts_of(folder, repo_id, other, revision)
    if facts is None:
        return (folder / CARD_NAME).read_text(encoding="utf-8")
    if isinstance(facts, BankFacts):
        return str(render_bank_card(facts))
    if facts.bank is not None and facts.bank.hub_type is None:
        raise ValueError(f"The card of {folder} names the local bank {facts.bank.source}: push it too, with --bank.")
    return str(render_model_card(facts))
