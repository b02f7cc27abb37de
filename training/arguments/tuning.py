"""Settings of the parts of a model: which of them train, and how fast."""

import importlib.util
import math
import re
from dataclasses import dataclass, fields

import torch

from .settings import setting

PARTS = ("vision_tower", "connector", "memory_connector", "language_model")
CONNECTOR_POLICIES = ["frozen", "full"]


def part_of(parameter_name: str) -> str:
    """The part that a parameter belongs to; a head that is not tied is the language model's."""
    return next((name for name in parameter_name.split(".") if name in PARTS), "language_model")


@dataclass
class TuningArguments:
    """Settings of what trains, how fast, and what is saved; see docs/training.md."""

    tune_vision_tower: str = setting(
        "frozen",
        "Training of the vision tower: frozen, full, or 'from layer 20', that layer, counted from 0, and "
        "all behind it.",
    )
    tune_connector: str = setting("full", "Training of the connector.", CONNECTOR_POLICIES)
    tune_memory_connector: str = setting("full", "Training of the memory connector.", CONNECTOR_POLICIES)
    tune_language_model: str = setting(
        "frozen",
        "Training of the language model: frozen (the default of stage 1), full (that of stage 2), lora "
        "or qlora: adapters on frozen weights of 4 bits, on CUDA. Adapters are merged at the end.",
        ["frozen", "full", "lora", "qlora"],
    )
    lora_r: int | None = setting(None, "Rank of the adapters, by default 16.")
    lora_alpha: float | None = setting(None, "Weight of the adapters, times lora_r; by default 2 * lora_r.")
    lora_dropout: float | None = setting(None, "Dropout of the adapters, by default 0.05.")
    lora_target_modules: list[str] | None = setting(
        None, "Layers of the language model with adapters, by default all linear ones but its head."
    )
    vision_tower_lr: float | None = setting(None, "Learning rate of the vision tower, instead of learning_rate.")
    connector_lr: float | None = setting(None, "Learning rate of the connector, instead of learning_rate.")
    memory_connector_lr: float | None = setting(
        None, "Learning rate of the memory connector, instead of learning_rate."
    )
    language_model_lr: float | None = setting(None, "Learning rate of the language model or its adapters.")
    save_only: str | None = setting(
        None,
        "connectors: save them without vision tower and language model, which from_pretrained takes from "
        "the checkpoints that the model was composed of.",
        ["connectors"],
    )

    def check_tuning(self):
        """Raise `ValueError` for settings that contradict each other, or need what this machine does not have."""
        self._check_values()
        trained = [part for part in PARTS if self.policy(part) != "frozen"]
        if not trained:
            raise ValueError(
                "Nothing trains: tune_vision_tower, tune_connector, tune_memory_connector and tune_language_model are "
                "all frozen. Set one of them to full."
            )
        for part in PARTS:
            rate = self.rate(part)
            if part not in trained and vars(self)[f"{part}_lr"] is not None:
                raise ValueError(
                    f"{part}_lr is {rate}, but tune_{part} is frozen: a frozen part has no learning rate. Leave "
                    f"{part}_lr out, or set tune_{part}."
                )
        if self.uses_lora:
            self._check_lora()
        if self.save_only is not None and not {"vision_tower", "language_model"}.isdisjoint(trained):
            raise ValueError(
                f"save_only is {self.save_only!r}, but {', '.join(trained)} train: what the others learn would be "
                "lost. Leave save_only out, or freeze them."
            )

    def _check_values(self):
        for field in fields(TuningArguments):
            # a command line has been checked by these, settings from Python have not
            choices, value = field.metadata.get("choices"), vars(self)[field.name]
            if choices and field.default is None:
                choices = [None, *choices]
            if choices and value not in choices:
                raise ValueError(f"{field.name} is {value!r}, expected one of {', '.join(map(str, choices))}.")
        if self.tune_vision_tower not in ("frozen", "full") and self.first_vision_layer is None:
            raise ValueError(
                f"tune_vision_tower is {self.tune_vision_tower!r}, expected frozen, full, or 'from layer N' with the "
                "number of the first layer that trains, counted from 0."
            )
        for name in ("learning_rate", *(f"{part}_lr" for part in PARTS)):
            rate = vars(self)[name]
            if rate is not None and not 0 <= rate < math.inf:  # nor NaN
                raise ValueError(f"{name} is {rate}, expected a number, 0 or more.")
        names = [name for name in vars(self) if name.startswith("lora_") and vars(self)[name] is not None]
        if names and not self.uses_lora:
            raise ValueError(
                f"Found {', '.join(names)}, but tune_language_model is {self.tune_language_model}: adapters are for "
                "lora and qlora. Set tune_language_model: lora, or leave them out."
            )
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}, expected the rank of the adapters, 1 or more.")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, expected a share, 0 to less than 1.")

    def _check_lora(self):
        if importlib.util.find_spec("peft") is None:
            raise ValueError(
                f"tune_language_model is {self.tune_language_model}, which needs PEFT, and it is not installed: pip "
                "install 'tinyalign-vlm[lora]'."
            )
        if self.tune_language_model == "lora":
            return
        if self.use_cpu or not torch.cuda.is_available():
            raise ValueError(
                "tune_language_model is qlora, which needs a CUDA GPU, and found "
                f"{'use_cpu: true' if torch.cuda.is_available() else 'none'} (torch {torch.__version__}). Set "
                "tune_language_model: lora, which trains the same adapters on weights that are not quantized, or run "
                "this where torch.cuda.is_available()."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "tune_language_model is qlora, which needs bitsandbytes, and it is not installed: pip install "
                "'tinyalign-vlm[lora]'."
            )

    @property
    def uses_lora(self) -> bool:
        return self.tune_language_model in ("lora", "qlora")

    @property
    def first_vision_layer(self) -> int | None:
        """N of `"from layer N"`; None of other policies."""
        match = re.fullmatch(r"from[ _]layer[ _](\d+)", str(self.tune_vision_tower).strip())
        return None if match is None else int(match[1])

    def policy(self, part: str) -> str:
        return vars(self)[f"tune_{part}"]

    def rate(self, part: str) -> float:
        """The learning rate of a part, before warm-up."""
        rate = vars(self)[f"{part}_lr"]
        return self.learning_rate if rate is None else rate
