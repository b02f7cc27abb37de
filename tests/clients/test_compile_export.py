"""torch.compile and torch.export of the prefill, without retrieval: with memory="off", or with given values."""

import pytest
import torch

from .conftest import prompt

LOOSE = {"atol": 1e-4, "rtol": 1e-4}


def inputs_for(saved, images, count: int, memory: str) -> dict:
    """`count` prompts with an image each."""
    one = prompt(saved, images[0])
    inputs = {name: one[name].repeat(count, 1) for name in ("input_ids", "attention_mask")}
    pixels = saved.processor.image_processor(images=images[:count], return_tensors="pt")["pixel_values"]
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, 2, 3, 5, generator=generator)
    return {**inputs, "pixel_values": pixels, **({"memory": "off"} if memory == "off" else {"memory_values": values})}


@pytest.fixture
def model(make_model):
    """Without a bank: retrieval would fail."""
    return make_model()


@pytest.mark.parametrize("memory", ["off", "values"])
@torch.no_grad()
def test_compiled_prefill(model, saved, images, memory):
    """In one graph for all batch sizes."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for count in (2, 3):
        inputs = inputs_for(saved, images, count, memory)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **LOOSE)


@torch.no_grad()
def test_compiled_generation(model, saved, images):
    """`generate` compiles the decoding step by itself where the cache is static; `aot_eager` does all but the
    generation of machine code.
    """
    torch.compiler.reset()
    inputs = {**inputs_for(saved, images, 2, "values"), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(**inputs, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("memory, strict", [("off", False), ("values", True)])
@torch.no_grad()
def test_exported_prefill(model, saved, images, memory, strict, tmp_path):
    """Exported for two images, the program takes any number of them, and other lengths; it can be saved."""
    model.config.text_config.use_cache = False
    inputs = inputs_for(saved, images, 2, memory)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=512)
    shapes = dict.fromkeys(inputs)
    shapes |= {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    shapes |= {name: {0: batch} for name in ("pixel_values", "memory_values") if name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "prefill.pt2")
    loaded = torch.export.load(tmp_path / "prefill.pt2").module()
    for count in (2, 3):
        inputs = inputs_for(saved, images, count, memory)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **LOOSE)
        for name in ("input_ids", "attention_mask"):  # a longer prompt
            inputs[name] = torch.cat([inputs[name], inputs[name][:, -5:]], dim=1)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **LOOSE)
