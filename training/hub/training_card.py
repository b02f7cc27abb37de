"""The card of a model that `tinyalign train` trained."""

import json
import math
import os
import re
import shlex
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ...hub_cards.cards import parts_of_config, write_card
from ...hub_cards.facts import FACTS_NAME, Evaluation, Example, ModelFacts, Part, read_facts
from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.stage import StageArguments
from .bank_facts import licenses_of_rows
from .parts import UNKNOWN, common_license, describe_part, license_of, public_command, public_source
from .run_facts import (
    CURVES_NAME,
    RECORD_NAME,
    RUN_NAME,
    StageRecord,
    hardware,
    hyperparameters,
    read_records,
    stage_record,
    versions,
    write_records,
)

logger = logging.get_logger(__name__)
STAGES = {1: "Stage 1: alignment pre-training", 2: "Stage 2: instruction tuning"}


def write_training_card(
    config: StageArguments, model: PreTrainedModel, trainer: Trainer, bank: MemoryBank | None, command: str
) -> None:
    """Write training_record.json, training_curves.png and README.md beside a model that was just trained.

    A model that goes on from another has the parts and stages of that one in its card, too. What a run can't know is
    "unknown" in card_facts.json, where it can be filled in: licences of local weights and data. A card that can't be
    written is a warning: the model is saved.
    """
    try:
        earlier, records = None, []
        if config.model is not None:
            earlier = read_facts(_folder_with(config.model, FACTS_NAME))
            records = read_records(_folder_with(config.model, RECORD_NAME))
        records.append(stage_record(STAGES[config.stage], trainer))
        write_records(config.output_dir, records)
        write_card(config.output_dir, _facts(config, model, records, bank, command, earlier))
    except (ValueError, StrictDataclassError) as error:
        logger.warning(f"README.md was not written: {error}")


def _facts(
    config: StageArguments,
    model: PreTrainedModel,
    records: list[StageRecord],
    bank: MemoryBank | None,
    command: str,
    earlier: ModelFacts | None,
) -> ModelFacts:
    parts = earlier.parts if earlier is not None and earlier.parts else _composed_of(model)
    license = earlier.license if earlier is not None and earlier.parts else common_license(parts)
    data = _data_part(config)
    again = [part for part in parts if (part.source, part.revision) == (data.source, data.revision)]
    return ModelFacts(
        repo_id=Path(config.output_dir).resolve().name,
        summary=_card_summary(parts, data, bank),
        license=license,
        language=earlier and earlier.language,
        parts=[*parts, *([] if again else [data])],
        top_k=model.config.memory_top_k,
        bank=None if bank is None else _bank_part(config, bank),
        example=Example(prompt=config.prompt or Example.prompt),
        stages=hyperparameters(records),
        curves=CURVES_NAME,
        command=public_command(shlex.split(command)),
        evaluation=_evaluation(config, records[-1], data),
        hardware=hardware(config.world_size, config.use_cpu),
        limits=_limits([*parts, data], bank, records[-1]),
        versions=versions(),
    )


def _composed_of(model: PreTrainedModel) -> list[Part]:
    """Return the vision tower and the language model of a model: its own, whatever a recipe's defaults say."""
    parts = []
    origins = model.config.vision_model, model.config.language_model  # paths, when it was composed in this process
    for part, origin in zip(parts_of_config(model.config), origins, strict=True):
        parts.append(describe_part(part.role, origin or part.source, "model", part.revision))
    return parts


def _data_part(config: StageArguments) -> Part:
    part = describe_part("training data", config.dataset, "dataset", config.dataset_revision)
    path = Path(config.output_dir, RUN_NAME)
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if part.hub_type is None and run.get("rows_hash"):
        part.revision = f"sha256 of the rows: {run['rows_hash'][:12]}"
    return part


def _bank_part(config: StageArguments, bank: MemoryBank) -> Part:
    if bank.repo_id is not None:
        part = describe_part("memory bank", bank.repo_id, "dataset", bank.revision)
    else:
        part = describe_part("memory bank", str(config.memory_bank), "dataset")
        part.revision = f"sha256 of the keys: {bank.config.sha256.keys[:12]}"
        path = os.path.relpath(Path(config.memory_bank).expanduser(), Path(config.output_dir).expanduser())
        if re.fullmatch(r"(\.\./)*[^/]+", path):  # it names no other folder of this machine
            part.source = path
    if part.license == UNKNOWN:
        part.license = license_of(licenses_of_rows(bank))
    return part


def _folder_with(model: str, file: str) -> Path:
    """Return the folder with this file of a checkpoint, by its folder or Hub id; it may lack the file."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    try:
        return Path(hf_hub_download(model, file)).parent
    except OSError:  # offline, or there is none
        return Path(model)


def _card_summary(parts: list[Part], data: Part, bank: MemoryBank | None) -> str:
    names = {part.role: part.source.split("/")[-1] for part in parts}
    models = " and ".join(names[role] for role in ("vision tower", "language model") if role in names)
    memory = "" if bank is None else f", with a memory bank of {len(bank):,} rows"
    return f"{models or 'A vision-language model'}, trained on {data.source.split('/')[-1]}{memory}."


def _evaluation(config: StageArguments, record: StageRecord, data: Part) -> Evaluation | None:
    """Return the loss at the step saved: on the evaluation rows, or without any on the last training rows."""
    losses, name, split = record.losses, data.source, "training rows"
    if record.eval_losses:
        losses, split = record.eval_losses, "evaluation rows"
        name = public_source(config.eval_dataset or config.dataset)
    if record.saved_step is not None:
        losses = [[step, loss] for step, loss in losses if step <= record.saved_step]
    if not losses or not math.isfinite(losses[-1][1]):
        return None
    step, loss = losses[-1]
    return Evaluation(
        dataset=name,
        split=f"{split}, step {step}",
        metrics={"loss": "loss per token"},
        own={"this model": {"loss": [loss]}},
    )


def _limits(parts: list[Part], bank: MemoryBank | None, record: StageRecord) -> list[str]:
    limits = ["Bias and safety were not evaluated."]
    if not record.eval_losses:
        limits.append("The loss in training is of rows it was trained on: it says nothing about other images.")
    if bank is not None:
        limits.append("Answers depend on the bank: one that lacks what is asked for can mislead the model.")
    unknown = dict.fromkeys(part.source for part in parts if part.license in (None, UNKNOWN))
    if unknown:
        limits.append(f"The licence of {', '.join(unknown)} is not known: find out before you share the model.")
    return limits
