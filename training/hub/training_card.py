"""The card of a model that `tinyalign train` trained."""

import json
import math
import os
import re
from pathlib import Path

from huggingface_hub import RepoCard, hf_hub_download
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ...hub_cards.cards import write_card
from ...hub_cards.facts import FACTS_NAME, Evaluation, Example, ModelFacts, Part, Score, System, read_facts
from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.run_arguments import RunArguments
from .run_facts import (
    CURVES_NAME,
    RECORD_NAME,
    RUN_NAME,
    StageRecord,
    hardware,
    read_records,
    stage_record,
    versions,
    write_records,
)

logger = logging.get_logger(__name__)
UNKNOWN = "unknown"  # an id of the Hub's list of licences, too
STAGES = {1: "Stage 1: alignment pre-training", 2: "Stage 2: instruction tuning"}


def write_training_card(
    config: RunArguments, model: PreTrainedModel, trainer: Trainer, bank: MemoryBank | None, command: str
) -> None:
    """
    Writes training_record.json, training_curves.png and README.md beside a model that was just trained.

    A model that goes on from another has the parts and stages of that one in its card, too. What a run can't know is
    "unknown" in card_facts.json, where it can be filled in: licences of local weights and data. A card that can't be
    written is a warning: the model is saved.
    """
    try:
        records = [*_earlier_records(config.model), stage_record(STAGES[config.stage], trainer)]
        write_records(config.output_dir, records)
        write_card(config.output_dir, _facts(config, model, records, bank, command))
    except ValueError as error:
        logger.warning(f"README.md was not written: {error}")


def _facts(
    config: RunArguments,
    model: PreTrainedModel,
    records: list[StageRecord],
    bank: MemoryBank | None,
    command: str,
) -> ModelFacts:
    output_dir, earlier = Path(config.output_dir), None
    if config.model is not None:
        earlier = read_facts(_folder_of(config.model, FACTS_NAME))
    if earlier is not None and earlier.parts is not None:
        parts, license = earlier.parts, earlier.license
    else:
        vision = config.vision_model or model.config.vision_config._name_or_path or str(config.model)
        text = config.language_model or model.config.text_config._name_or_path or str(config.model)
        parts = [
            part_of("vision tower", vision, "model", model.config.vision_model_revision),
            part_of("language model", text, "model", model.config.language_model_revision),
        ]
        license = _common([part.license for part in parts])
    data = part_of("training data", config.dataset, "dataset", config.dataset_revision)
    if data.hub_type is None and (rows_hash := _run_settings(output_dir).get("rows_hash")):
        data.revision = f"sha256 of the rows: {rows_hash[:12]}"
    return ModelFacts(
        repo_id=output_dir.resolve().name,
        summary=_summary(parts, data, bank),
        license=license,
        language=earlier and earlier.language,
        parts=[*(part for part in parts if part.source != data.source), data],
        bank=None if bank is None else _bank_part(config, bank),
        example=Example(prompt=config.prompt or "Describe the image."),
        stages=[record.stage for record in records],
        curves=CURVES_NAME,
        command=command,
        evaluation=_evaluation(records[-1], data),
        hardware=hardware(config.world_size, config.use_cpu),
        training_hours=sum(record.seconds for record in records) / 3600,
        peak_memory_gb=max(record.peak_memory_gb for record in records),
        limits=_limits(parts, data, bank, records[-1]),
        versions=versions(),
    )


def part_of(role: str, name: str, hub_type: str, revision: str | None = None) -> Part:
    """
    A model or data set by its folder, file or Hub id, with its commit at this `revision` (by default main) and the
    licence that its card names there. A path is named without its folder.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        license = _license(path / "README.md") if (path / "README.md").is_file() else UNKNOWN
        return Part(role=role, source=path.name, revision="local, without a revision", license=license)
    commit, license = revision or UNKNOWN, UNKNOWN
    for file in ("config.json", "README.md") if hub_type == "model" else ("README.md",):
        try:
            cached = Path(hf_hub_download(name, file, repo_type=hub_type, revision=revision))
        except OSError:  # offline, or there is none
            continue
        commit = cached.parent.name
        license = _license(cached) if file == "README.md" else license
    return Part(role=role, source=name, revision=commit, license=license, hub_type=hub_type)


def _license(card: Path) -> str:
    license = RepoCard.load(card, ignore_metadata_errors=True).data.get("license", UNKNOWN)
    return ", ".join(license) if isinstance(license, list) else license


def _common(licenses: list[str]) -> str:
    """The licence of a model whose parts have these."""
    known = {license.lower() for license in licenses}
    return known.pop() if len(known) == 1 else UNKNOWN if UNKNOWN in known else "other"


def _folder_of(model: str, file: str) -> Path:
    """The folder with this file of a checkpoint, by its folder or Hub id; it may lack the file."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(hf_hub_download(model, file)).parent
    except OSError:  # offline, or there is none
        return Path(model)


def _earlier_records(model: str | None) -> list[StageRecord]:
    return [] if model is None else read_records(_folder_of(model, RECORD_NAME))


def _run_settings(output_dir: Path) -> dict:
    path = output_dir / RUN_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def _bank_part(config: RunArguments, bank: MemoryBank) -> Part:
    if bank.repo_id is not None:
        return part_of("memory bank", bank.repo_id, "dataset", bank.revision)
    part = part_of("memory bank", str(config.memory_bank), "dataset")
    part.source = os.path.relpath(config.memory_bank, config.output_dir)
    part.revision = f"sha256 of the keys: {bank.config.sha256.keys[:12]}"
    return part


def _summary(parts: list[Part], data: Part, bank: MemoryBank | None) -> str:
    names = {part.role: part.source.split("/")[-1] for part in parts}
    models = " and ".join(names[role] for role in ("vision tower", "language model") if role in names)
    memory = "" if bank is None else f", with a memory bank of {len(bank):,} rows"
    return f"{models or 'A vision-language model'}, trained on {data.source.split('/')[-1]}{memory}."


def _evaluation(record: StageRecord, data: Part) -> Evaluation:
    """The loss on the evaluation rows, or on the last training rows where there were none, at the step saved."""
    losses, split = (record.eval_losses, "evaluation rows") if record.eval_losses else (record.losses, "training rows")
    if record.saved_step is not None:
        losses = [[step, loss] for step, loss in losses if step <= record.saved_step]
    score = Score(metric="loss", value=losses[-1][1] if losses else math.nan)
    return Evaluation(
        dataset=data.source.replace(" ", "-"),
        dataset_name=data.source,
        split=f"{split}, step {losses[-1][0] if losses else 0}",
        metrics={"loss": "loss per token"},
        systems=[System(name="this model", scores=[score], is_this_model=True)],
    )


def _limits(parts: list[Part], data: Part, bank: MemoryBank | None, record: StageRecord) -> list[str]:
    limits = ["Nothing but the loss above was measured; bias and safety were not evaluated."]
    if not record.eval_losses:
        limits.append("That loss is of rows it was trained on: it says nothing about other images.")
    if bank is not None:
        limits.append("Answers depend on the bank: one that lacks what is asked for can mislead the model.")
    unknown = [part.source for part in (*parts, data) if part.license == UNKNOWN]
    if unknown:
        limits.append(f"The licence of {', '.join(unknown)} is not known: find out before you share the model.")
    return limits
