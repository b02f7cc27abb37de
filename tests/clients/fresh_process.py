"""
What a user does where this package is not installed; test_fresh.py runs it in such environments.

    python fresh_process.py MODEL IMAGE [BANK]

MODEL and BANK are folders or repositories; with the bank "-" retrieval is expected to fail, and without one it is the
bank that the config names. Prints JSON.
"""

import base64
import importlib.metadata
import importlib.util
import json
import sys
import threading

from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    TextIteratorStreamer,
    pipeline,
)

QUESTION = "what is in the image?"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def chat(image: dict) -> list[dict]:
    content = [{"type": "image", **image}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def main(name: str, path: str, bank: str | None) -> dict:
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(name, **trust)
    processor = AutoProcessor.from_pretrained(name, **trust)
    base = AutoModel.from_pretrained(name, **trust)
    multimodal = AutoModelForMultimodalLM.from_pretrained(name, **trust)
    model = AutoModelForImageTextToText.from_pretrained(name, **trust)
    parts = {"config": config, "processor": processor, "base": base, "model": model, "multimodal": multimodal}
    report = {
        "installed": sorted(
            distribution.metadata["Name"].lower().replace("_", "-")
            for distribution in importlib.metadata.distributions()
        ),
        "package": importlib.util.find_spec("tinyalign_vlm") is not None,
        "modules": {part: type(value).__module__.split(".")[0] for part, value in parts.items()},
    }

    picture = Image.open(path)
    with open(path, "rb") as file:
        data = file.read()
    encoded = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{encoded}"
    sources = {
        "PIL image": {"image": picture},
        "path": {"path": path},
        "base64": {"base64": encoded},
        "data URL": {"url": url},
        "a path under another name": {"image": path},
    }
    template = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat({"image": picture}), **template)
    for source in (data, path, encoded, url, picture.copy()):
        again = processor(images=source, text="<image>", return_tensors="pt")
        assert again["pixel_values"].equal(inputs["pixel_values"]), type(source)

    memory = {}
    if bank == "-":
        memory = {"memory": "off"}
        report["errors"] = [
            error_of(model.generate, **inputs, **GREEDY),
            error_of(model.retrieve, inputs["pixel_values"]),
        ]
        report["errors"].append(error_of(model.attach_memory_bank, "nowhere"))
    elif config.memory_top_k > 0:
        if bank is not None:
            model.attach_memory_bank(bank)
        report["captions"] = model.retrieve(inputs["pixel_values"]).captions
        report["bank"] = [model.memory_bank.repo_id, model.memory_bank.revision]
    ids = model.generate(**inputs, **GREEDY, **memory)[0, inputs["input_ids"].shape[1] :]
    report["generate"] = processor.decode(ids, skip_special_tokens=True)

    pipe = pipeline(
        "image-text-to-text", model=model if bank else name, processor=processor if bank else None, **trust
    )
    settings = {"generate_kwargs": {**GREEDY, **memory}, "return_full_text": False}
    report["pipeline"] = {
        kind: pipe(text=chat(source), **settings)[0]["generated_text"] for kind, source in sources.items()
    }
    chats = [chat({"path": path}), chat({"image": Image.new("RGB", (30, 60), "blue")}), chat({"base64": encoded})]
    for size in (1, 2):
        answers = pipe(text=chats, batch_size=size, **settings)
        report[f"batch {size}"] = [answer[0]["generated_text"] for answer in answers]
    full = pipe(text=chat({"image": picture}), generate_kwargs=settings["generate_kwargs"])
    report["full text"] = full[0]["generated_text"][-1]["content"]
    prompt = processor.apply_chat_template(chat({"image": picture}), add_generation_prompt=True)
    report["without a chat"] = pipe(images=picture, text=prompt, **settings)[0]["generated_text"]

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
    generate = {**settings["generate_kwargs"], "streamer": streamer}
    thread = threading.Thread(target=pipe, kwargs={"text": chat({"image": picture}), "generate_kwargs": generate})
    thread.start()
    report["streamed"] = "".join(streamer)
    thread.join()
    return report


def error_of(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(json.dumps(main(arguments[0], arguments[1], arguments[2] if len(arguments) > 2 else None)))
