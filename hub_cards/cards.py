"""Model, bank and Space cards: one template each, filled with the facts that are known."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
    SpaceCard,
    SpaceCardData,
)
from huggingface_hub.utils import validate_repo_id

from .facts import FACTS_NAME, BankFacts, Evaluation, ModelFacts, Part, facts_of_bank_config, read_facts, write_facts
from .markdown import block, escaped, literal, table, text

TASK = "image-text-to-text"
HUB = "https://huggingface.co"
HERE = Path(__file__).parent
# Without `configs` the Hub's viewer and `load_dataset` would have to guess what the files of a bank are.
BANK_FILES = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
GRADIO_VERSION = "6.31.0"  # that the Space was tried with
# At most 60 characters: the Hub shows no more.
SPACE_SUMMARY = "Ask about an image, and see which examples it looked at"
BASELINE_SPACE_SUMMARY = "Ask about an image"


def plain_model_card(repo_id: str, config: Any, tags: list[str]) -> str:
    """Return the README.md of a model of which no more is known than its `TinyAlignConfig`."""
    bank = None
    if config.memory_top_k > 0 and config.memory_bank is not None and not os.path.exists(config.memory_bank):
        revision = config.memory_bank_revision
        bank = Part(role="memory bank", source=config.memory_bank, revision=revision, hub_type="dataset")
    facts = ModelFacts(repo_id=repo_id, tags=tags, parts=parts_of_config(config), top_k=config.memory_top_k, bank=bank)
    return str(model_card(facts))


def plain_bank_card(repo_id: str, bank_config: Any) -> str:
    """Return the README.md of a memory bank of which no more is known than the content of its bank_config.json."""
    return str(bank_card(facts_of_bank_config(repo_id, asdict(bank_config))))


def parts_of_config(config: Any) -> list[Part]:
    """Return the vision tower and the language model that a model's config names, a local one without its folder."""
    parts = []
    for role, known_name, revision, part_config in (
        ("vision tower", config.vision_model, config.vision_model_revision, config.vision_config),
        ("language model", config.language_model, config.language_model_revision, config.text_config),
    ):
        name = known_name or part_config._name_or_path or part_config.model_type
        if is_hub_id(name):
            parts.append(Part(role=role, source=name, revision=revision, hub_type="model"))
        else:
            parts.append(Part(role=role, source=Path(name).name, revision=revision))
    return parts


def is_hub_id(name: str) -> bool:
    """Return whether a name is one of a repository "org/name", and no folder of this machine."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not os.path.exists(name)


def model_card(facts: ModelFacts) -> ModelCard:
    """Return the card of a checkpoint."""
    parts = [*facts.parts, *filter(None, [facts.bank])]
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        license_name="see-what-it-is-made-of" if facts.license == "other" else None,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys(["tinyalign", "custom_code", *facts.tags])),
        base_model=_hub_ids(parts, "model"),
        datasets=_hub_ids(parts, "dataset"),
        model_name=facts.evaluation and facts.repo_id.split("/")[-1],  # of the results
        eval_results=facts.evaluation and _eval_results(facts.evaluation),
    )
    stages = {}
    for name, settings in facts.stages.items():
        stages[text(name)] = table(["setting", "value"], [list(map(text, setting)) for setting in settings.items()])
    return ModelCard.from_template(
        data,
        HERE / "model_card.md",
        **{**escaped(asdict(facts)), "stages": stages},
        name=text(facts.repo_id.split("/")[-1]),
        is_local="/" not in facts.repo_id,
        has_memory=bool(facts.bank or facts.top_k),
        parts_table=_parts_table(parts),
        snippet=block(usage_snippet(facts), "python"),
        output=facts.example.output and block(facts.example.output, "text"),
        command_block=facts.command and block(facts.command, "bash"),
        scores=facts.evaluation and _scores_table(facts.evaluation),
    )


def usage_snippet(facts: ModelFacts) -> str:
    """Return Python that asks the model the example's question, and prints the answer and where it comes from.

    It needs nothing of ours. Before the model is on the Hub, it runs in the checkpoint's folder.
    """
    on_hub, image = "/" in facts.repo_id, facts.example.image
    model, prompt = literal(facts.repo_id if on_hub else "."), literal(facts.example.prompt)
    lines = ["from PIL import Image", "from transformers import pipeline", ""]
    chosen = ', revision="main"' if on_hub else ""  # without one, transformers warns of each of the Python files
    lines.append(f'pipe = pipeline("image-text-to-text", model={model}{chosen}, trust_remote_code=True)')
    if facts.bank and facts.bank.hub_type is None:
        lines.append(f"pipe.model.attach_memory_bank({literal(facts.bank.source)})")
    if image is None:
        lines.append('image = Image.new("RGB", (224, 224), "red")')
    elif on_hub:
        lines.insert(0, "from huggingface_hub import hf_hub_download")
        lines.append(f"image = Image.open(hf_hub_download({model}, {literal(image)}))")
    else:
        lines.append(f"image = Image.open({literal(image)})")
    lines += [
        f'content = [{{"type": "image", "image": image}}, {{"type": "text", "text": {prompt}}}]',
        'messages = [{"role": "user", "content": content}]',
        "answer = pipe(text=messages, max_new_tokens=16, return_full_text=False)",
        'print(answer[0]["generated_text"])',
    ]
    if facts.bank:
        lines += [
            'pixels = pipe.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]',
            "print(pipe.model.retrieve(pixels).captions)",
        ]
    return "\n".join(lines)


def bank_card(facts: BankFacts) -> DatasetCard:
    """Return the card of a memory bank, with the metadata that make `load_dataset` and the viewer read its rows."""
    bank, rows = ".", '"parquet", data_files="data/train-*.parquet"'  # datasets can't load "."
    if "/" in facts.repo_id:
        bank, rows = facts.repo_id, literal(facts.repo_id)
    data = DatasetCardData(
        pretty_name=facts.repo_id.split("/")[-1],
        language=facts.language,
        license=facts.license,
        source_datasets=_hub_ids(facts.parts, "dataset"),
        task_categories=["image-to-text"],
        tags=["tinyalign", "memory-bank"],
        configs=BANK_FILES,
    )
    return DatasetCard.from_template(
        data,
        HERE / "bank_card.md",
        **escaped(asdict(facts)),
        name=text(facts.repo_id.split("/")[-1]),
        is_local="/" not in facts.repo_id,
        model_literal=facts.model and literal(facts.model),
        bank_literal=literal(bank),
        rows=rows,
        parts_table=_parts_table(facts.parts),
        command_block=facts.command and block(facts.command, "bash"),
    )


def write_card(folder: str | os.PathLike, facts: ModelFacts | BankFacts | None = None) -> ModelCard | DatasetCard:
    """Write README.md, and the facts it is made of, by default those there, into the folder of a checkpoint or a bank.

    Raises `ValueError` if the facts there cannot be read, or a picture that the card shows is missing.
    """
    facts = read_facts(folder) if facts is None else facts
    if isinstance(facts, BankFacts):
        card = bank_card(facts)
    else:
        check_pictures(folder, facts)
        card = model_card(facts)
    write_facts(folder, facts)
    card.save(Path(folder, "README.md"))
    return card


def check_pictures(folder: str | os.PathLike, facts: ModelFacts) -> None:
    """Raise `ValueError` if a picture that a card shows is missing in its folder."""
    lost = [name for name in facts.pictures if not Path(folder, name).is_file()]
    if lost:
        raise ValueError(
            f"The card of {folder} shows {', '.join(lost)}, which is not there: put it there, or correct {FACTS_NAME}."
        )


def write_space(
    folder: str | os.PathLike, repo_id: str, facts: ModelFacts, model_revision: str, visitors_may: str = "ask"
) -> SpaceCard:
    """Write a demo Space into a folder: app.py, requirements.txt, the package, and README.md, its card, which is its
    configuration as well.

    `facts` are those of the model as it is on the Hub; the Space runs the weights and the code of the commit
    `model_revision`, and its visitors may do what `tinyalign app` says. The package travels as it is installed here: a
    Space runs what its author has tried, released or not. Raises `ValueError` for a name that is none of a repository.
    """
    for name in (repo_id, facts.repo_id):
        validate_repo_id(name)
    data = SpaceCardData(
        title=repo_id.split("/")[-1],
        emoji="🔎",
        colorFrom="indigo",
        colorTo="green",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        license=facts.license,
        short_description=SPACE_SUMMARY if facts.bank else BASELINE_SPACE_SUMMARY,
        models=[facts.repo_id],
        datasets=[facts.bank.source] if facts.bank else None,
        tags=["tinyalign"],
        model_revision=model_revision,
        prompt=facts.example.prompt,
        visitors_may=visitors_may,
    )
    card = SpaceCard.from_template(
        data,
        HERE / "space_card.md",
        **escaped({"model": facts.repo_id, "prompt": facts.example.prompt, "model_revision": model_revision}),
        title=text(repo_id.split("/")[-1]),
        bank=facts.bank and text(facts.bank.source),
    )
    folder = Path(folder)
    card.save(folder / "README.md")
    shutil.copy(HERE / "space_app.py", folder / "app.py")
    needed = [line for line in importlib.metadata.requires("tinyalign-vlm") if "extra ==" not in line]
    (folder / "requirements.txt").write_text("\n".join([*needed, ""]), encoding="utf-8")
    package = folder / "tinyalign_vlm"
    for name in ("modeling_tinyalign", "processing", "training", "hub_cards"):
        shutil.copytree(HERE.parent / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "cli"))
    shutil.copy(importlib.util.find_spec("tinyalign_vlm").origin, package)
    return card


def _hub_ids(parts: list[Part], hub_type: str) -> list[str] | None:
    return [part.source for part in parts if part.hub_type == hub_type] or None


def _parts_table(parts: list[Part]) -> str:
    """Return the table of parts, without columns of which nothing is known."""
    rows = []
    for part in parts:
        source = text(part.source)
        if part.hub_type is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", part.source):
            source = f"[{source}]({HUB}/{'datasets/' if part.hub_type == 'dataset' else ''}{part.source})"
        elif part.source.startswith((".", "/")):  # a local bank: the Python above has the path
            source = text(Path(part.source).name)
        rows.append([text(part.role), source, text(part.revision or "-"), text(part.license or "-")])
    columns = zip(("part", "source", "revision", "licence"), *rows, strict=True)
    headings, *known = zip(*(column for column in columns if set(column[1:]) != {"-"}), strict=True)
    return table(headings, known)


def _eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """Return the model's own scores as the Hub's metadata."""
    results = []
    dataset_type = re.sub(r"[^A-Za-z0-9_./-]+", "-", evaluation.dataset).strip("-./") or "data"  # the Hub's alphabet
    for system, scores in evaluation.own.items():
        for metric, score in scores.items():
            source = {"dataset_type": dataset_type, "dataset_split": evaluation.split}
            result = EvalResult(
                task_type=TASK,
                dataset_name=evaluation.dataset,
                metric_type=metric,
                metric_name=f"{evaluation.metrics.get(metric, metric)} ({system})",
                metric_value=score[0],
                **source | evaluation.sources.get(metric, {}),
            )
            results.append(result)
    return results


def _scores_table(evaluation: Evaluation) -> str:
    rows = []
    for system, scores in (evaluation.own | evaluation.others).items():
        rows.append([text(system), *(_cell(scores.get(metric)) for metric in evaluation.metrics)])
    return table(["system", *map(text, evaluation.metrics.values())], rows)


def _cell(score: list[float] | None) -> str:
    if score is None:
        return "-"
    value, *interval = (f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}" for number in score)
    return f"{value} ({' to '.join(interval)})" if interval else value
