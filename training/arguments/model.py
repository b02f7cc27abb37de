"""Settings that choose the model, its processor and its memory bank."""

import json
from dataclasses import dataclass

from .settings import setting

BASELINES = ("wider_connector", "static_rag", "text_rag")


@dataclass
class ModelArguments:
    """The model of a run: loaded, or composed of a vision tower and a language model; and its memory."""

    model: str | None = setting(None, "Folder or Hub repository of a TinyAlign model with its processor.")
    vision_model: str | None = setting(None, "Or: folder or Hub repository of the vision tower of a new model,")
    language_model: str | None = setting(None, "and that of its language model.")
    model_kwargs: dict | str | None = setting(
        None, 'TinyAlignConfig fields to set in the model, as JSON: {"memory_top_k": 3}.'
    )
    image_aspect_ratio: str | None = setting(
        None,
        "New models, which keep it: square is the tower's own preprocessing; pad makes images square "
        "with their mean colour first.",
        ["square", "pad"],
    )
    memory_bank: str | None = setting(
        None, "Folder or Hub repository of the memory bank. Not needed if memory_top_k is 0."
    )
    any_tower: bool = setting(False, "Take a bank of another vision tower, too: an ablation.")
    baseline: str | None = setting(
        None, "A comparison point of the paper instead of TinyAlign, see docs/baselines.md.", list(BASELINES)
    )
    memory_dropout: float | None = setting(
        None,
        "Share of the images, 0 to 1, that lose neighbours in training: five in six the most similar ones, as if the "
        "bank did not know them, and one in six all. Without it a model learns to trust whatever it is given, see "
        "docs/method.md. By default 0.3, and 0 for streamed rows.",
    )

    def read_model_kwargs(self):
        """Turn `model_kwargs` from JSON into a dictionary; raises `ValueError` if it is none."""
        if isinstance(self.model_kwargs, str):
            try:
                self.model_kwargs = json.loads(self.model_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"model_kwargs is {self.model_kwargs}, expected JSON like '{{\"memory_top_k\": 3}}' ({error})."
                ) from error
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, dict):
            raise ValueError(f"model_kwargs is {self.model_kwargs!r}, expected {{name: value, ...}}.")
