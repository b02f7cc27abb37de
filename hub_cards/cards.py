"""Model, bank and Space cards, filled from what a run recorded. A card with a gap is refused."""

import os
import re
from pathlib import Path

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
from jinja2 import UndefinedError

from .facts import FACTS_NAME, BankFacts, ModelFacts, Part, SpaceFacts, System, read_facts, require, write_facts
from .markdown import TEMPLATES, Markup, literal

TASK = "image-text-to-text"
HUB = "https://huggingface.co"
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
# The Gradio that the Space was tried with.
GRADIO_VERSION = "6.31.0"
SHORT_DESCRIPTION = 60


def render_model_card(facts: ModelFacts) -> ModelCard:
    """The card of a checkpoint.

    Raises `ValueError` naming every required fact that is missing or not of its type.
    """
    require(facts)
    for name in filter(None, (facts.curves, facts.example.image)):
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"The card of {facts.repo_id!r} shows {name!r}, expected the name of a file beside it.")
    evaluation = facts.evaluation
    for metric in sorted({score.metric for system in evaluation.systems for score in system.scores}):
        if metric not in evaluation.metrics:
            raise ValueError(f"The card of {facts.repo_id!r} has a score of {metric!r}, evaluation.metrics lacks it.")
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
    parts = [*facts.parts, *([facts.bank] if facts.bank else [])]
    data = ModelCardData(
        language=facts.language,
        license=facts.license,
        license_name="see-what-it-is-made-of" if facts.license == "other" else None,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["tinyalign", "custom_code"],
        base_model=_hub_ids(parts, "model"),
        datasets=_hub_ids(parts, "dataset"),
        model_name=facts.repo_id.split("/")[-1],
        eval_results=results,
    )
    table = [[system.name, *_cells(system, evaluation.metrics)] for system in evaluation.systems]
    return ModelCard(
        _render(
            "model_card.md",
            data,
            facts,
            parts=parts,
            evaluation=evaluation,
            table=table,
            snippet=usage_snippet(facts),
            energy=_energy(facts),
        )
    )


def usage_snippet(facts: ModelFacts) -> str:
    """Python that asks the model the example's question and prints the answer and where it comes from.

    It needs nothing of ours. Before the model is on the Hub, it runs in the checkpoint's folder.
    """
    on_hub, image = "/" in facts.repo_id, facts.example.image
    model, prompt = literal(facts.repo_id if on_hub else "."), literal(facts.example.prompt)
    lines = []
    if on_hub and image:
        lines.append("from huggingface_hub import hf_hub_download")
    lines += [
        "from PIL import Image",
        "from transformers import pipeline",
        "",
        f'pipe = pipeline("image-text-to-text", model={model}, trust_remote_code=True)',
    ]
    if facts.bank and facts.bank.hub_type is None:
        lines.append(f"pipe.model.attach_memory_bank({literal(facts.bank.source)})")
    if image is None:
        lines.append('image = Image.new("RGB", (224, 224), "red")')
    else:
        lines.append(
            f"image = Image.open({f'hf_hub_download({model}, {literal(image)})' if on_hub else literal(image)})"
        )
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


def render_bank_card(facts: BankFacts) -> DatasetCard:
    """The card of a memory bank, with the configuration that makes `load_dataset` and the viewer read its rows.

    Raises `ValueError` naming every required fact that is missing.
    """
    require(facts)
    absent = [f"config[{key!r}]" for key in BANK_CONFIG_FACTS if not facts.config.get(key)]
    if absent:
        raise ValueError(f"The card of {facts.repo_id!r} lacks {', '.join(absent)}: save the bank again.")
    config = facts.config
    data = DatasetCardData(
        pretty_name=facts.repo_id.split("/")[-1],
        language=facts.language,
        license=facts.license,
        size_categories=[_size_category(config["num_rows"])],
        source_datasets=_hub_ids(facts.parts, "dataset"),
        task_categories=["image-to-text"],
        tags=["tinyalign", "memory-bank"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    bank, rows = ".", Markup('"parquet", data_files="data/train-*.parquet"')  # datasets can't load "."
    if "/" in facts.repo_id:
        bank, rows = facts.repo_id, literal(facts.repo_id)
    return DatasetCard(
        _render("bank_card.md", data, facts, config=config, packed=config.get("packed"), bank=bank, rows=rows)
    )


def render_space_card(facts: SpaceFacts) -> SpaceCard:
    """The card of a demo Space, which is its configuration as well: space_app.py reads model and revision from it.

    Raises `ValueError` naming every required fact that is missing, a malformed Hub id, or a summary that is longer
    than the Hub allows.
    """
    require(facts)
    for repo_id in filter(None, (facts.repo_id, facts.model, facts.bank)):
        validate_repo_id(repo_id)
    if len(facts.summary) > SHORT_DESCRIPTION:
        raise ValueError(
            f"The summary of {facts.repo_id!r} has {len(facts.summary)} characters, expected at most "
            f"{SHORT_DESCRIPTION}: the Hub shows no more."
        )
    data = SpaceCardData(
        title=facts.repo_id.split("/")[-1],
        emoji="🔎",
        colorFrom="indigo",
        colorTo="green",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        license=facts.license,
        short_description=facts.summary,
        suggested_hardware="cpu-basic",
        models=[facts.model],
        datasets=[facts.bank] if facts.bank else None,
        tags=["tinyalign"],
        model_revision=facts.model_revision,
        prompt=facts.prompt,
    )
    return SpaceCard(_render("space_card.md", data, facts))


def write_card(folder: str | os.PathLike, facts: ModelFacts | BankFacts | None = None) -> ModelCard | DatasetCard:
    """
    Writes README.md, and the facts it is made of, into the folder of a checkpoint or a bank.

    Args:
        facts: by default those that are in the folder.

    Raises:
        ValueError: facts are missing, or a picture that the card shows is not in the folder.
    """
    facts = read_facts(folder) if facts is None else facts
    card = render_model_card(facts) if isinstance(facts, ModelFacts) else render_bank_card(facts)
    if isinstance(facts, ModelFacts):
        for name in filter(None, (facts.curves, facts.example.image)):
            if not Path(folder, name).is_file():
                raise ValueError(f"The card of {folder} shows {name}, which is not there. Correct {FACTS_NAME}.")
    write_facts(folder, facts)
    card.save(Path(folder, "README.md"))
    return card


def write_space(folder: str | os.PathLike, facts: SpaceFacts) -> SpaceCard:
    """Writes a demo Space: README.md, app.py and requirements.txt. Raises as `render_space_card`."""
    card, folder = render_space_card(facts), Path(folder)
    card.save(folder / "README.md")
    here = Path(__file__).parent
    (folder / "app.py").write_text((here / "space_app.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "requirements.txt").write_text("faiss-cpu\npyarrow\ntorch\ntransformers>=5.17,<6\n", encoding="utf-8")
    return card


def _render(template: str, data: ModelCardData | DatasetCardData | SpaceCardData, facts: object, **kwargs) -> str:
    """The metadata, then the template filled in."""
    try:
        body = TEMPLATES.get_template(template).render(facts=facts, link=_link, **kwargs)
    except UndefinedError as error:  # in bank_config.json
        raise ValueError(
            f"The card of {facts.repo_id!r} lacks what it is made of ({error}): save it again."
        ) from error
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _hub_ids(parts: list[Part], hub_type: str) -> list[str] | None:
    return [part.source for part in parts if part.hub_type == hub_type] or None


def _link(part: Part) -> str | None:
    """Where a part is on the Hub."""
    if part.hub_type is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", part.source):
        return None
    return f"{HUB}/{'datasets/' if part.hub_type == 'dataset' else ''}{part.source}"


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


def _energy(facts: ModelFacts) -> str:
    """What is known of the energy that training took."""
    if facts.watts is None:
        return "Energy and CO2 were not measured."
    energy = facts.watts * facts.training_hours / 1000
    estimate = f"Estimated from {facts.watts:.3g} W over that time: {energy:.3g} kWh"
    if facts.grams_co2_per_kwh is None:
        return f"{estimate}; CO2 was not estimated."
    grams = energy * facts.grams_co2_per_kwh
    return f"{estimate}, {grams:.3g} g CO2 equivalent at {facts.grams_co2_per_kwh:.3g} g per kWh."


def _size_category(num_rows: int) -> str:
    """The Hub's name for a number of rows."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    lower = None
    for power, name in enumerate(names, start=3):
        if num_rows < 10**power:
            return f"{lower}<n<{name}" if lower else f"n<{name}"
        lower = name
    return "n>1T"
