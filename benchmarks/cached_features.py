"""
Epochs of stage 1 with `cache_features` against epochs from images, with SigLIP-so400m and SmolLM2-135M.

    tinyalign demo && OMP_NUM_THREADS=2 python benchmarks/cached_features.py demo

Both models at their real widths with random weights, 729 visual tokens, a third of the layers of both (--share) so
that it runs on a CPU; the demo's emoji, its tokenizer, no memory. The cached run's first epoch
includes making the cache. Goal: at least 1.5 times faster from the second epoch on.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SiglipImageProcessorPil, SiglipVisionConfig
from transformers import SiglipVisionModel as Tower
from transformers.utils import logging

from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.training import AlignmentConfig, AlignmentTrainer
from tinyalign_vlm.training.data.features import cache_vision_features
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.systems import chats


def make_parts(folder: Path, demo: Path, share: float) -> tuple[str, str]:
    """Folders of both, with random weights."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=round(27 * share),
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    Tower(vision).save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder / "vision")
    weights = demo / "weights/smollm2-135m-instruct"
    text = AutoConfig.from_pretrained(weights)
    text.num_hidden_layers, text.layer_types = round(30 * share), None
    AutoModelForCausalLM.from_config(text).save_pretrained(folder / "text")
    AutoTokenizer.from_pretrained(weights).save_pretrained(folder / "text")
    return str(folder / "vision"), str(folder / "text")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `tinyalign demo`")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the layers (default: a third)")
    parser.add_argument("--images", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    pairs = load_pairs()
    images = pairs.twemoji.select(pairs.train[: arguments.images])
    rows = chats(images["label"]).add_column("image", list(images["image"]))
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        names = make_parts(Path(folder), arguments.demo, arguments.share)
        for cached in (False, True):
            model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(*names, memory_top_k=0)
            processor = TinyAlignProcessor.from_vision_text_pretrained(*names, model.config)
            started, features = time.perf_counter(), None
            if cached:
                features = cache_vision_features(model, processor, rows["image"], Path(folder, "features"))
            making = time.perf_counter() - started
            config = AlignmentConfig(
                os.path.join(folder, f"out-{cached}"),
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=2,
                logging_strategy="epoch",
                save_strategy="no",
                disable_tqdm=True,
            )
            trainer = AlignmentTrainer(
                model, config, train_dataset=rows, processing_class=processor, vision_features=features
            )
            trainer.train()
            rates = [e["samples_per_second"] for e in trainer.state.log_history if "samples_per_second" in e]
            seconds["cached" if cached else "from images"] = [arguments.images / rate for rate in rates]
            seconds["cached" if cached else "from images"][0] += making
    print(f"{arguments.images} images, {torch.get_num_threads()} threads; seconds an epoch\n")
    print("| epoch | from images | cached | times faster |\n|---|---|---|---|")
    for number, (slow, fast) in enumerate(zip(seconds["from images"], seconds["cached"], strict=True), 1):
        print(f"| {number} | {slow:.1f} | {fast:.1f} | {slow / fast:.2f} |")


if __name__ == "__main__":
    main()
