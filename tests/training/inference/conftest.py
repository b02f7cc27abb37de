"""A tiny model that reads captions, latents and similarities, and a bank of noisy pictures."""

import io
from types import SimpleNamespace

import pytest
from clients.conftest import only_say_letters
from PIL import Image

from tinyalign_vlm import MemoryBank

QUESTION = "what is in the image?"


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture(scope="package")
def parts(make_model, make_processor, images, captions, value_encoder) -> SimpleNamespace:
    """`model`, to which `bank` is attached, and its `processor`."""
    model = make_model(memory_input="both", memory_scores=True, memory_tokens=3)
    processor = make_processor(model)
    only_say_letters(model, processor)
    bank = MemoryBank.build(
        [{"image": image, "caption": caption} for image, caption in zip(images[:8], captions[:8], strict=True)],
        model,
        processor,
        value_encoder,
    )
    model.attach_memory_bank(bank, tokenizer=processor.tokenizer)
    return SimpleNamespace(model=model, processor=processor, bank=bank)


@pytest.fixture
def tower_calls(parts, monkeypatch) -> list:
    """One item for each picture that the vision tower is asked about."""
    calls, look = [], parts.model.base_model._read_vision_tower

    def counted(pixel_values, **kwargs):
        calls.extend(pixel_values)
        return look(pixel_values, **kwargs)

    monkeypatch.setattr(parts.model.base_model, "_read_vision_tower", counted)
    return calls


def generated(parts: SimpleNamespace, image, bank: MemoryBank, *turns: str, length: int = 6, **settings) -> str:
    """The answer of `model.generate` with this bank attached; `turns` are question, answer, ..., question."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": turns[0]}]
    messages = [{"role": "user", "content": content}]
    for number, text in enumerate(turns[1:]):
        messages.append({"role": ("assistant", "user")[number % 2], "content": [{"type": "text", "text": text}]})
    inputs = parts.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    attached = parts.model.memory_bank
    parts.model.attach_memory_bank(bank)
    try:
        ids = parts.model.generate(**inputs, max_new_tokens=length, **settings)
    finally:
        parts.model.attach_memory_bank(attached)
    return parts.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
