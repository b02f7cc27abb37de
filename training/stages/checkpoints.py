"""Connector weights as files, and which checkpoint a run goes on from."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from ...modeling_tinyalign.files import apply_umask
from ...modeling_tinyalign.memory_bank import MemoryBank
from ..arguments.stage import StageArguments
from ..arguments.tuning import part_of
from ..data.training_rows import content_hash
from ..disk import save_file as write_file
from ..hub.run_facts import RUN_NAME

CONNECTORS_NAME = "connectors.safetensors"
TRAINED_NAME = "trained.safetensors"
# What decides the trajectory: with another value, checkpoints are of another run.
TRAJECTORY = (
    "learning_rate vision_tower_lr connector_lr memory_connector_lr language_model_lr lr_scheduler_type warmup_steps "
    "tune_vision_tower tune_connector tune_memory_connector tune_language_model lora_r lora_alpha lora_dropout "
    "lora_target_modules weight_decay optim optim_args adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs "
    "max_grad_norm neftune_noise_alpha num_train_epochs max_steps seed data_seed train_sampling_strategy "
    "dataloader_drop_last bf16 fp16 memory_dropout max_length truncation save_only_model model vision_model "
    "language_model"
).split()
MODEL_TRAJECTORY = (
    "memory_top_k memory_tokens memory_input latent_dim image_seq_length "
    "key_space memory_scores retrieval_threshold connector_size prompt_captions"
).split()


def connectors_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The connector and, in a model with memory, the memory connector."""
    connectors = {"connector": model.base_model.connector}
    if model.config.memory_top_k > 0:
        connectors["memory_connector"] = model.base_model.memory_connector
    return connectors


def save_connectors(model: PreTrainedModel, folder: str | os.PathLike, state_dict: dict | None = None):
    """Write the connectors, and nothing else, from the gathered `state_dict` of a model that is divided."""
    state_dict = model.state_dict() if state_dict is None else state_dict
    prefix = f"{model.base_model_prefix}."
    parts = tuple(f"{prefix}{part}." for part in connectors_of(model))
    write_tensors({name[len(prefix) :]: state_dict[name] for name in state_dict if name.startswith(parts)}, folder)


def write_tensors(tensors: dict[str, torch.Tensor], folder: str | os.PathLike, name: str = CONNECTORS_NAME):
    """Write tensors to a file in `folder`, which is made."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, Path(folder, name), metadata={"format": "pt"})
    apply_umask(folder)


def load_connectors(model: PreTrainedModel, folder: str | os.PathLike):
    """
    Read what [`save_connectors`] wrote.

    Raises `RuntimeError` naming the tensors that do not fit the model.
    """
    tensors = load_file(Path(folder, CONNECTORS_NAME))
    nn.ModuleDict(connectors_of(model)).load_state_dict(tensors)


def save_trained(
    model: PreTrainedModel, folder: str | os.PathLike, state_dict: dict | None = None, loadable: bool = True
):
    """
    Write the connectors as [`save_connectors`], and all else that trains, if it does, to `trained.safetensors`. Where
    nothing else does, and the other parts are known checkpoints, `from_pretrained` loads the folder (`loadable`).
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    save_connectors(model, folder, state_dict)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = {name: state_dict[name] for name in trained if "connector" not in part_of(name)}
    if others:
        write_tensors(others, folder, TRAINED_NAME)
    if loadable and not others and None not in (model.config.vision_model, model.config.language_model):
        model.save_pretrained(folder, connectors_only=True, state_dict=state_dict)
    else:
        model.config.save_pretrained(folder)  # with which `from_pretrained` says what loads


def load_trained(model: PreTrainedModel, folder: str | os.PathLike):
    """Read what [`save_trained`] wrote; raises `RuntimeError` as [`load_connectors`]."""
    load_connectors(model, folder)
    path = Path(folder, TRAINED_NAME)
    if path.is_file():
        model.load_state_dict(load_file(path), strict=False)


def trajectory_settings(
    args: StageArguments, model: PreTrainedModel, processor: ProcessorMixin, rows: Any, bank: MemoryBank | None
) -> dict[str, Any]:
    """Return, by name, all that decides the losses of a run: its checkpoints are of no use with other values."""
    settings = {name: vars(args)[name] for name in TRAJECTORY}
    settings["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(rows, datasets.Dataset):
        settings["rows"] = len(rows)
        settings["rows_hash"] = content_hash(rows)
    settings["memory_bank"] = None
    if bank is not None:
        settings["memory_bank"] = {"keys": bank.config.sha256.keys, "values": bank.config.sha256.values}
    settings["image_aspect_ratio"] = processor.image_aspect_ratio
    for name in MODEL_TRAJECTORY:
        settings[name] = vars(model.config)[name]
    return settings


def last_checkpoint(
    output_dir: str | os.PathLike, settings: dict, chosen: str | None = None, write: bool = True
) -> str | None:
    """
    The last complete checkpoint of the run with these settings, or that which was `chosen`. The settings are kept
    beside the checkpoints (`write`).

    Raises `ValueError`, naming what differs, when the checkpoints are of another run, or the chosen one is not there.
    """
    settings = json.loads(json.dumps(settings, default=str))
    run = Path(output_dir, RUN_NAME)
    complete = complete_checkpoints(output_dir)
    if complete and run.is_file():
        earlier = json.loads(run.read_text())
        changed = [  # an earlier version may have kept fewer settings
            f"{name}: {earlier[name]!r} then, {settings[name]!r} now"
            for name in sorted(earlier.keys() & settings.keys())
            if earlier[name] != settings[name]
        ]
        if changed:
            raise ValueError(
                f"{output_dir} holds checkpoints of another run ({'; '.join(changed)}). Use another output_dir, or "
                "delete this one to train anew."
            )
    if chosen is not None and Path(chosen).resolve() not in [Path(path).resolve() for path in complete]:
        raise ValueError(
            f"resume_from_checkpoint is {chosen}, but the complete checkpoints in {output_dir} are "
            f"{', '.join(complete) or 'none'}: choose one of them, or leave it out to go on from the last, if any."
        )
    if write:  # one process does
        run.parent.mkdir(parents=True, exist_ok=True)
        write_file(run, f"{json.dumps(settings, indent=2)}\n".encode())
    return chosen or (complete[-1] if complete else None)


def complete_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """Return the folders of the checkpoints that were written to their end, the last one last."""
    return [path for path in sort_checkpoints(str(output_dir)) if _is_complete(Path(path))]


def _is_complete(checkpoint: Path) -> bool:
    """Return True if the last file, the trainer's state, is there and whole: the disk may have been full."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True
