"""A saved checkpoint works in a fresh process that has neither this package nor faiss."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignProcessor

FRESH_PROCESS = """
import sys

sys.modules["tinyalign_vlm"] = sys.modules["faiss"] = None  # importing them fails

import json
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, again = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
base = AutoModel.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
assert (config.num_image_tokens, processor.num_image_tokens) == (19, 19)
assert all("transformers_modules" in type(part).__module__ for part in (config, base, model, processor))
content = [{"type": "image", "image": Image.new("RGB", (40, 50), "red")}, {"type": "text", "text": "what is it?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
settings = {"memory": "off", "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
answers = pipeline("image-text-to-text", model=folder, **trust)(text=messages, generate_kwargs=settings)
assert base(**inputs, memory="off").last_hidden_state.shape[1] == inputs["input_ids"].shape[1]
model.save_pretrained(again)
processor.save_pretrained(again)
print(json.dumps({"ids": ids.tolist(), "answer": answers[0]["generated_text"][-1]["content"]}))
"""


def test_a_fresh_process_without_the_package(make_model, make_processor, tmp_path):
    model = make_model()
    processor = make_processor(model)
    folders = [str(tmp_path / "first"), str(tmp_path / "again")]
    model.save_pretrained(folders[0])
    processor.save_pretrained(folders[0])
    results = []
    for index, folder in enumerate(folders):  # the second is saved by the remote code itself
        process = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, folder, folders[1]],
            env={**os.environ, "HF_HOME": str(tmp_path / f"home{index}"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        results.append(json.loads(process.stdout.splitlines()[-1]))
    assert results[0] == results[1]
    content = [{"type": "image", "image": Image.new("RGB", (40, 50), "red")}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = model.generate(**inputs, memory="off", max_new_tokens=5, do_sample=False, num_beams=2)
    ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert results[0] == {"ids": ids, "answer": processor.decode(ids, skip_special_tokens=True)}


def test_the_installed_package_wins(make_model, make_processor, tmp_path):
    """With the package, the Auto classes need no trust and give its own classes."""
    model = make_model()
    model.save_pretrained(tmp_path)
    make_processor(model).save_pretrained(tmp_path)
    for trust in (False, True):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded) is TinyAlignForConditionalGeneration
        assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is TinyAlignProcessor
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("entry", ["configuration_tinyalign", "modeling_tinyalign", "processing_tinyalign"])
def test_an_entry_names_every_module_it_needs(make_model, make_processor, tmp_path, entry):
    """Otherwise a download of the code that is cut off could not be completed by a second try."""
    model = make_model()
    model.save_pretrained(tmp_path)
    make_processor(model).save_pretrained(tmp_path)
    path = str(tmp_path / f"{entry}.py")
    needed = {os.path.basename(file).removesuffix(".py") for file in get_relative_import_files(path)}
    assert set(get_relative_imports(path)) == needed
