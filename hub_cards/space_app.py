"""`tinyalign app` as a Hugging Face Space. Which model, and what visitors may do, stands in README.md."""

from pathlib import Path

from huggingface_hub import SpaceCard

from tinyalign_vlm.training.inference.app import start_app

if __name__ == "__main__":
    card = SpaceCard.load(Path(__file__).with_name("README.md")).data
    start_app(
        card.models[0],
        card["model_revision"],
        visitors_may=card["visitors_may"],
        host=None,
        port=None,
        question=card["prompt"],
    )
