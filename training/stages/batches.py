"""Changes to a batch, and to the mode and the special tokens of the language model, before it trains."""

from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_layers import GradientCheckpointingLayer


def without_dropout(language_model: PreTrainedModel):
    """Put a language model in evaluation mode, but for the layers themselves, which checkpoint their activations in
    training mode only.
    """
    language_model.eval()
    for module in language_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing


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
