"""Settings both stages share."""

import json
from dataclasses import dataclass, field

import torch

from .precision import bfloat16_is_fast


@dataclass
class RunArguments:
    """
    Settings that both stages add to those of their trainer.

    Parameters:
        > What `tinyalign train` reads and writes

        stage (`int`, *optional*): 1 or 2, the stage a YAML file is for.
        model (`str`, *optional*): Folder or repository of a TinyAlign model with its processor. Or
        vision_model, language_model (`str`, *optional*): of the two to compose a new one from, and
        model_kwargs (`dict`, *optional*): the fields of [`TinyAlignConfig`] to set in it.
        memory_bank (`str`, *optional*): Folder or repository of the bank. Needed unless `memory_top_k` is 0.
        lexicon (`bool`, *optional*, defaults to `True`): Let the memory connector of a newly composed model read the
            words of the bank, see docs/value_encoder.md. `False` for a bank whose value encoder was not trained.
        dataset (`str`, *optional*): A Parquet, JSON or JSON-lines file, a folder, or a dataset repository.
        dataset_split (`str`, *optional*, defaults to `"train"`): The split to train on.
        image_column (`str`, *optional*, defaults to `"image"`): Images, or their paths.
        messages_column (`str`, *optional*, defaults to `"messages"`): Chats, if the data has them.
        answer_column (`str`, *optional*): Without chats: the labels or captions that answer `prompt`.
        prompt (`str`, *optional*): Without chats: what is asked about every image.
        cache_features (`bool`, *optional*, defaults to `True`): Compute the frozen visual features once.

        > Learning rates

        connector_lr, memory_connector_lr (`float`, *optional*): Default to `learning_rate`.
    """

    stage: int | None = field(default=None, metadata={"help": "1 or 2: the stage a YAML file is for."})
    model: str | None = field(default=None, metadata={"help": "TinyAlign model: folder or Hub repository."})
    vision_model: str | None = field(default=None, metadata={"help": "Or: vision tower to compose a new model from,"})
    language_model: str | None = field(default=None, metadata={"help": "and language model."})
    model_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'TinyAlignConfig fields of the new model, as JSON: {"memory_top_k": 3}.'}
    )
    memory_bank: str | None = field(
        default=None, metadata={"help": "Memory bank: folder or Hub repository. Not needed if memory_top_k is 0."}
    )
    lexicon: bool = field(
        default=True,
        metadata={
            "help": "New models: let the memory connector read the words of the bank, see docs/value_encoder.md."
        },
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Parquet, JSON or JSON-lines file, folder, or Hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_column: str = field(default="image", metadata={"help": "Column with images or their paths."})
    messages_column: str = field(default="messages", metadata={"help": "Column with chats, if there is one."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Without chats: column with the label or caption that answers `prompt`."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Without chats: what is asked about every image."})
    cache_features: bool = field(
        default=True, metadata={"help": "Compute the frozen visual features once and keep them in output_dir."}
    )
    connector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the connector, instead of learning_rate."}
    )
    memory_connector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the memory connector, instead of learning_rate."}
    )

    def __post_init__(self):
        if isinstance(self.model_kwargs, str):
            self.model_kwargs = json.loads(self.model_kwargs)
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bfloat16_is_fast(self.use_cpu)
        super().__post_init__()
