"""A chat with a TinyAlign model, for a Hugging Face Space. Which model, and what it is asked, stands in README.md."""

import warnings
from pathlib import Path

import gradio
from huggingface_hub import SpaceCard
from PIL import Image, ImageOps
from transformers import pipeline

CARD = SpaceCard.load(Path(__file__).with_name("README.md")).data
PIPE = pipeline("image-text-to-text", model=CARD.models[0], revision=CARD["model_revision"], trust_remote_code=True)
warnings.simplefilter("error", Image.DecompressionBombWarning)  # anybody may upload an image


def answer(message: dict, history: list[dict]) -> str:
    """The answer to an image and a question, and the examples it has seen. Every turn stands for itself."""
    if not message["files"]:
        return "Add an image to your question."
    image = ImageOps.exif_transpose(Image.open(message["files"][0])).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": message["text"] or CARD["prompt"]}]
    output = PIPE(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False)
    text = output[0]["generated_text"]
    if PIPE.model.config.memory_top_k == 0:
        return text
    pixels = PIPE.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    return f"{text}\n\nSeen for it: {', '.join(PIPE.model.retrieve(pixels).captions[0])}"


DEMO = gradio.ChatInterface(answer, multimodal=True, title=CARD.title, description=CARD["short_description"])

if __name__ == "__main__":
    DEMO.launch()
