"""Changes to a batch and to the mode of the language model just before a training step."""

from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_layers import GradientCheckpointingLayer


def without_dropout(language_model: PreTrainedModel):
    """
    Put a language model in evaluation mode, but for the layers themselves, which checkpoint their activations in
    training mode only.
    """
    language_model.eval()
    for module in language_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing


def with_blank_image(model: PreTrainedModel, processor: ProcessorMixin, inputs: dict) -> dict:
    """
    Return a batch of text with a row added that has a blank image and no label. The connectors get a gradient of zero
    from it: none at all would stop stage 1, and processes that wait for each other's.
    """
    length = max(inputs["input_ids"].shape[1], processor.num_image_tokens)
    inputs = dict(inputs)
    for name, padding in (
        ("input_ids", processor.tokenizer.pad_token_id or 0),
        ("attention_mask", 0),
        ("labels", -100),
    ):
        inputs[name] = F.pad(inputs[name], (0, length - inputs[name].shape[1], 0, 1), value=padding)
    inputs["input_ids"][-1, : processor.num_image_tokens] = processor.image_token_id
    inputs["attention_mask"][-1, : processor.num_image_tokens] = 1
    blank = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    inputs["pixel_values"] = blank["pixel_values"].to(inputs["input_ids"].device)
    return {**inputs, "memory": "off"} if model.config.memory_top_k > 0 else inputs
