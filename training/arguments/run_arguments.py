"""Settings both stages share."""

import importlib.util
import json
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .inherited import refuse_what_has_no_effect
from .tuning import TuningArguments

BASELINES = ("wider_connector", "static_rag", "text_rag")


@dataclass
class RunArguments(TuningArguments):
    __doc__ = f"""
    Settings that both stages add to those of their trainer.
    {TuningArguments.__doc__}
        > What `tinyalign train` reads and writes

        stage (`int`, *optional*): 1 or 2, the stage a YAML file is for.
        model (`str`, *optional*): Folder or repository of a TinyAlign model with its processor. Or
        vision_model, language_model (`str`, *optional*): of the two to compose a new one from, and
        model_kwargs (`dict`, *optional*): the fields of [`TinyAlignConfig`] to set in it.
        image_aspect_ratio (`str`, *optional*): How images that are not square get into a new model: `"square"` is the
            tower's own preprocessing, `"pad"` pads to a square with the mean colour first. The processor keeps it.
        memory_bank (`str`, *optional*): Folder or repository of the bank. Needed unless `memory_top_k` is 0.
        lexicon (`bool`, *optional*, defaults to `True`): Let the memory connector of a newly composed model read the
            words of the bank, see docs/value_encoder.md. `False` for a bank whose value encoder was not trained.

        any_tower (`bool`, *optional*, defaults to `False`): Take a bank of another vision tower too: an ablation.
        baseline (`str`, *optional*): A comparison point of the paper instead of TinyAlign, `"wider_connector"`,
            `"static_rag"` or `"text_rag"`; see docs/baselines.md.
        memory_dropout (`float`, *optional*, defaults to 0): Share of the images that lose neighbours in training: all,
            some, or the most similar ones. The model then works with its bank on, off and partly on; see
            docs/adaptive_retrieval.md.

        > Data, see docs/training.md

        dataset (`str`, *optional*): JSON, JSON lines, Parquet or WebDataset (.tar) files, a pattern of them
            (`"shards/*.tar"`), a folder, or a dataset repository; its configuration and revision are
        dataset_config, dataset_revision (`str`, *optional*).
        dataset_split (`str`, *optional*, defaults to `"train"`): The split of a folder or repository to train on.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed, without a copy on disk.
            Needs `max_steps`. Rows are checked as they come, neighbours looked up in every step.
        image_folder (`str`, *optional*): What paths of images are relative to. Defaults to the folder of `dataset`.
        image_column (`str`, *optional*): Images, or their paths. Defaults to `image`, `images`.
        messages_column (`str`, *optional*): Chats. Defaults to `messages`, `conversations`, `prompt` + `completion`.
        answer_column (`str`, *optional*): Without chats: the labels or captions that answer `prompt`.
        prompt (`str`, *optional*): Without chats: what is asked about every image.
        max_length (`int`, *optional*): Tokens that a row may have, those of its images included. Defaults to the
            context of the language model. Longer rows are skipped, or
        truncation (`bool`, *optional*, defaults to `False`): lose the tokens at their end, but never one of an image,
            nor all that is to be learnt.
        strict (`bool`, *optional*, defaults to `False`): Stop when a row is bad, instead of skipping it.
        num_proc (`int`, *optional*): Processes that read and check the rows, and look up their neighbours.
        cache_features (`bool`, *optional*, defaults to `False`): The visual features of the frozen tower are computed
            once, and kept under `HF_HOME` for other runs. Not with `streaming`.
        activation_checkpointing (`bool`, *optional*): Activations are computed again in the backward pass, for less
            memory and a slower step.

        > What people watch

        eval_dataset (`str`, *optional*): Rows to evaluate on, as `dataset`; ten times unless
            `eval_strategy` says otherwise.
        eval_split (`str`, *optional*, defaults to `"validation"`): Their split of a folder or repository.
        eval_samples (`int`, *optional*, defaults to 4): Of these rows, how many the model answers at each evaluation:
            on the console, in `samples.jsonl` in `output_dir`, and as a table in W&B and trackio.

        > Batch

        global_batch_size (`int`, *optional*): Rows of an optimizer step, whatever the number of processes:
            `gradient_accumulation_steps` follows from it. Defaults to what the other settings give.
    """

    stage: int | None = field(default=None, metadata={"help": "1 or 2: the stage a YAML file is for."})
    model: str | None = field(default=None, metadata={"help": "TinyAlign model: folder or Hub repository."})
    vision_model: str | None = field(default=None, metadata={"help": "Or: vision tower to compose a new model from,"})
    language_model: str | None = field(default=None, metadata={"help": "and language model."})
    model_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'TinyAlignConfig fields of the new model, as JSON: {"memory_top_k": 3}.'}
    )
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={
            "help": "New models: square (the tower's preprocessing) or pad (to a square, with the mean colour).",
            "choices": ["square", "pad"],
        },
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
    any_tower: bool = field(default=False, metadata={"help": "Take a bank of another vision tower (an ablation)."})
    baseline: str | None = field(
        default=None,
        metadata={"help": "A comparison point of the paper, see docs/baselines.md.", "choices": list(BASELINES)},
    )
    memory_dropout: float = field(
        default=0.0, metadata={"help": "Share of the images that lose neighbours in training, 0 to 1."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "JSON, JSON-lines, Parquet or WebDataset files (or a pattern), folder, or Hub dataset."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed. Needs max_steps."})
    image_folder: str | None = field(
        default=None, metadata={"help": "What paths of images are relative to, by default the dataset's folder."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with images or their paths, by default image or images."}
    )
    messages_column: str | None = field(
        default=None,
        metadata={"help": "Column with chats, by default messages, conversations, or prompt and completion."},
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Without chats: column with the label or caption that answers `prompt`."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Without chats: what is asked about every image."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens a row may have, those of images included, by default the model's context."},
    )
    truncation: bool = field(
        default=False, metadata={"help": "Cut the text of longer rows, instead of skipping them."}
    )
    strict: bool = field(default=False, metadata={"help": "Stop when a row is bad, instead of skipping it."})
    num_proc: int | None = field(
        default=None, metadata={"help": "Processes that read and check the rows, and look up their neighbours."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute activations again in the backward pass: less memory, a slower step."}
    )
    cache_features: bool = field(
        default=False, metadata={"help": "Compute the frozen visual features once and keep them under HF_HOME."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Rows to evaluate on, files, folder or Hub dataset; ten times by default."}
    )
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    eval_samples: int = field(
        default=4, metadata={"help": "Evaluation rows that the model answers at each evaluation, to be read."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of an optimizer step in all processes; sets gradient_accumulation_steps."},
    )

    def __post_init__(self):
        self._check_run()
        if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:  # before transformers 5.23
            self.gradient_checkpointing = self.gradient_checkpointing or bool(self.activation_checkpointing)
        if not torch.accelerator.is_available():
            self.use_cpu = True
        refuse_what_has_no_effect(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bfloat16_is_fast(self.use_cpu)
        if str(self.resume_from_checkpoint).lower() == "true":
            self.resume_from_checkpoint = None  # a run goes on from its last checkpoint anyway
        self.logging_nan_inf_filter = False  # it waits for the device at every batch; LossCheck does once a step
        if self.eval_dataset is not None and self.eval_strategy == "no":
            self.eval_strategy, self.eval_steps = "steps", self.eval_steps or 0.1
        super().__post_init__()
        self._check_trackers()
        if self.n_gpu > 1:
            raise ValueError(
                f"This process sees {self.n_gpu} GPUs, expected one: start one for each with accelerate launch "
                "--config_file ddp.yaml (see docs/training.md), or choose one with CUDA_VISIBLE_DEVICES=0."
            )
        if self.tune_vision_tower != "frozen":
            self._check_trained_vision_tower()
        if self.streaming and self.cache_features:
            raise ValueError(
                "Found streaming and cache_features, expected one of the two: features are kept of rows that are read "
                "in the same order again and again. Set streaming: false, or cache_features: false."
            )
        if self.streaming and (self.memory_dropout or self.baseline in ("static_rag", "text_rag")):
            raise ValueError(
                f"memory_dropout is {self.memory_dropout} and baseline {self.baseline!r}: they need neighbours "
                "looked up beforehand, but those of streamed rows are looked up in every step. Set streaming: false."
            )
        if self.streaming:  # in accelerate's other mode one process reads for all, and rows must have equal lengths
            self.accelerator_config.dispatch_batches = False
        if self.global_batch_size is not None:
            self._accumulate_to_global_batch()

    def _check_run(self):
        """Reads `model_kwargs`; raises `ValueError` for values that would fail only after the data was read."""
        if isinstance(self.model_kwargs, str):
            try:
                self.model_kwargs = json.loads(self.model_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"model_kwargs is {self.model_kwargs}, expected JSON like '{{\"memory_top_k\": 3}}' ({error})."
                ) from error
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, dict):
            raise ValueError(f"model_kwargs is {self.model_kwargs!r}, expected {{name: value, ...}}.")
        least = {"max_length": 1, "global_batch_size": 1, "per_device_train_batch_size": 1, "num_proc": 1}
        least |= {"eval_samples": 0, "eval_steps": 0, "weight_decay": 0, "dataloader_num_workers": 0}
        for name, minimum in least.items():
            value = vars(self)[name]
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}, expected {minimum} or more.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs:g} and max_steps {self.max_steps}: expected passes over "
                "the data, more than 0, or a number of steps."
            )
        if self.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"deepspeed is {self.deepspeed!r}, but DeepSpeed is not installed: pip install deepspeed, or leave it "
                "out and divide the model with FSDP2 (accelerate launch --config_file fsdp2.yaml)."
            )

    def _check_trackers(self):
        for name in set(self.report_to) - set(get_available_reporting_integrations()):
            if name in INTEGRATION_TO_CALLBACK:
                raise ValueError(f"report_to is {name}, which is not installed: pip install {name}.")
            raise ValueError(f"report_to is {name}, expected one of {', '.join(INTEGRATION_TO_CALLBACK)}, or none.")

    def _check_trained_vision_tower(self):
        if self.streaming and self.memory_bank is not None:
            raise ValueError(
                f"tune_vision_tower is {self.tune_vision_tower!r} and streaming true: neighbours of streamed rows are "
                "looked up in every step, with keys of a vision tower that is no longer that of the bank. Set "
                "streaming: false, and they are looked up beforehand."
            )
        if self.cache_features:
            raise ValueError(
                f"tune_vision_tower is {self.tune_vision_tower!r} and cache_features true: features computed once are "
                "those of a tower that stays as it is. Set cache_features: false, or tune_vision_tower: frozen."
            )

    def _accumulate_to_global_batch(self):
        if self.deepspeed is not None:
            raise ValueError(
                "Found deepspeed and global_batch_size, expected one of the two: DeepSpeed's file is read before the "
                "accumulated batches are known. Use accelerate launch --config_file zero2.yaml, or set "
                "gradient_accumulation_steps."
            )
        rows = self.train_batch_size * self.world_size
        steps, rest = divmod(self.global_batch_size, rows)
        if rest or steps == 0:
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, expected a multiple of {rows}: {self.world_size} "
                f"processes x {self.train_batch_size} rows each. Change per_device_train_batch_size or the number of "
                "processes."
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is {rows} rows x {steps} accumulated batches, but "
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}: leave one of the two out."
            )
        self.gradient_accumulation_steps = steps


def bfloat16_is_fast(use_cpu: bool) -> bool:
    """Whether the device that trains computes in bfloat16 itself."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return use_cpu and (capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))
