"""Changes to a batch, and to the mode and the special tokens of the language model, before it trains."""

from accelerate.state import GradientState
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from ..arguments.tuning import TuningArguments


def check_batches(args: TrainingArguments, num_rows: int):
    """Raise `ValueError` where `dataloader_drop_last` would drop all rows."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and num_rows < batch:
        raise ValueError(
            f"There are {num_rows} rows, but a batch of all processes has {batch}, and dataloader_drop_last drops "
            "what is less: no step could be taken. Leave it out, or set a smaller per_device_train_batch_size."
        )


def set_modes(model: PreTrainedModel, args: TuningArguments):
    """Put a frozen language model in evaluation mode, without dropout, as a vision tower always is. Their layers, and
    those of a tower that trains, stay in training mode to compute activations again, which they do in no other.
    """
    parts = [model.base_model.vision_tower] if model.base_model.trains_vision_tower else []
    if args.tune_language_model == "frozen":
        parts.append(model.base_model.language_model.eval())
    for part in parts:
        for module in part.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = module.gradient_checkpointing


def without_repeated_rows(inputs: dict, loaded: GradientState, args: TrainingArguments) -> dict:
    """Return a batch of evaluation without the labels of rows that are there again, so that all processes have as many
    rows at the end of the data.
    """
    if inputs is None:  # what accelerate 1.4 makes of a stream without rows
        raise ValueError("The data have no rows to evaluate on, expected at least one.")
    if not loaded.end_of_dataloader or loaded.remainder <= 0:
        return inputs
    own = max(0, loaded.remainder - args.process_index * args.eval_batch_size)
    labels = inputs["labels"].clone()
    labels[own:] = -100
    return {**inputs, "labels": labels}


def align_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Give the model the special tokens of its tokenizer: `Trainer` does the same, and warns of each."""
    config, generation = model.config.get_text_config(), model.generation_config
    for name, value in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", tokenizer.pad_token_id)):
        if value is not None:
            setattr(config, name, value)
            setattr(generation, name, value)
    end = tokenizer.eos_token_id
    if end is None:
        return
    config.eos_token_id = with_first(end, config.eos_token_id) if isinstance(config.eos_token_id, list) else end
    generation.eos_token_id = with_first(end, generation.eos_token_id)


def with_first(token: int, tokens: int | list[int] | None) -> list[int]:
    """Return the tokens with this one before them, unless they have it."""
    others = tokens
    if not isinstance(tokens, list):
        others = [] if tokens is None else [tokens]
    return others if token in others else [token, *others]


def with_blank_image(model: PreTrainedModel, processor: ProcessorMixin, inputs: dict) -> dict:
    """Return a batch of text with a row added that has a blank image and no label. The connectors get a gradient of
    zero from it: none at all would stop stage 1, and processes that wait for each other's.
    """
    length = max(inputs["input_ids"].shape[1], processor.num_image_tokens)
    inputs = dict(inputs)
    fill = {"input_ids": processor.tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": -100}
    for name, padding in fill.items():
        inputs[name] = F.pad(inputs[name], (0, length - inputs[name].shape[1], 0, 1), value=padding)
    inputs["input_ids"][-1, : processor.num_image_tokens] = processor.image_token_id
    inputs["attention_mask"][-1, : processor.num_image_tokens] = 1
    blank = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    inputs["pixel_values"] = blank["pixel_values"].to(inputs["input_ids"].device)
    return {**inputs, "memory": "off"} if model.config.memory_top_k > 0 else inputs
