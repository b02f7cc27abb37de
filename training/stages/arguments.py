"""Arguments of the trainers that transformers and TRL take, and these do not."""

from typing import Any

from transformers import PreTrainedModel

from ..arguments.stage import StageArguments

# Arguments by name, and what to do instead of passing one.
INSTEAD = {
    "data_collator": "images, chats and neighbours go together, change the rows",
    "model_init": "make the model first, and a trainer for each",
    "peft_config": "set tune_language_model to lora or another adapter in the trainer's args, and lora_r and the like",
    "formatting_func": "give the rows a column messages",
    "optimizer_cls_and_kwargs": "set optim and optim_args in the trainer's args, or pass optimizers",
}
EXPECTED = {
    PreTrainedModel: "load or compose it first",
    StageArguments: "make an AlignmentConfig for AlignmentTrainer, an InstructionConfig for InstructionTrainer",
}


def check_arguments(model: Any, args: Any, given: dict[str, Any]):
    """Raise `TypeError` or `ValueError`, saying what to do, for what these trainers do not take."""
    for name, advice in INSTEAD.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} was given, expected none: {advice}.")
    for thing, (expected, advice) in zip((model, args), EXPECTED.items(), strict=True):
        if not isinstance(thing, expected):
            raise TypeError(f"Found a {type(thing).__name__}, expected a {expected.__name__}: {advice}.")
    if args.uses_lora and (given.get("optimizers") or [None])[0] is not None:
        raise ValueError(
            f"optimizers were given, but tune_language_model is {args.tune_language_model}: its adapters are made "
            "when training begins, and the optimizer would not have them. Set optim and optim_args in args."
        )
