"""A tiny checkpoint and its bank in folders, as a client finds them."""

import base64
import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tinyalign_vlm import MemoryBank, ValueEncoder, ValueEncoderConfig

QUESTION = "what is in the image?"


@pytest.fixture(scope="package")
def saved(make_model, make_processor, images, tmp_path_factory) -> SimpleNamespace:
    """`model` (folder of model and processor), `bank` (folder), and the same two loaded, with their processor."""
    folder = tmp_path_factory.mktemp("clients")
    model = make_model()
    processor = make_processor(model)
    only_say_letters(model, processor)
    torch.manual_seed(0)
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "num_self_attends_per_block": 1}
    sizes = {"num_latents": 3, "latent_dim": 5, "d_model": 16, "vision_feature_size": 16, "num_vision_tokens": 16}
    rows = [{"image": image, "caption": f"a {image.getpixel((0, 0))} square"} for image in images]
    bank = MemoryBank.build(rows, model, processor, ValueEncoder(ValueEncoderConfig(**heads, **sizes)))
    bank.save_pretrained(folder / "bank")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model.attach_memory_bank(bank)
    return SimpleNamespace(
        model=model, processor=processor, bank=bank, folder=str(folder / "model"), bank_folder=str(folder / "bank")
    )


def only_say_letters(model, processor):
    """Random weights say bytes that are no text, which a streamer holds back."""
    words = {index: processor.tokenizer.decode([index]) for index in range(model.config.text_config.vocab_size)}
    silent = [index for index, word in words.items() if not (word.isascii() and word.strip().isalpha())]
    model.generation_config.suppress_tokens = silent


def data_url(image: Image.Image, format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(*images, text: str = QUESTION) -> list[dict]:
    """One user turn with these images, in transformers' format."""
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def openai_chat(*urls: str, text: str = QUESTION) -> list[dict]:
    """The same in OpenAI's."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def prompt(saved: SimpleNamespace, *images, **kwargs) -> dict:
    """The inputs of the model for [`chat`]."""
    return saved.processor.apply_chat_template(
        chat(*images, **kwargs), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def answer(saved: SimpleNamespace, *images, max_new_tokens: int = 6, text: str = QUESTION, **kwargs) -> str:
    """What the model itself says, greedily."""
    inputs = prompt(saved, *images, text=text)
    ids = saved.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    return saved.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
