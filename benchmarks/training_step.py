"""
TinyAlign's training step against the baseline's (no memory) at the paper's shape: time and peak memory, as ratios.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py

SigLIP-so400m at 384 pixels (729 visual tokens) and Qwen2-0.5B at their real widths with random weights, layers cut so
that it runs on a CPU (--layers; both models have about as many, 27 and 24); rows of 60 text tokens, the last 30 of
them learnt; 4 neighbours given, whose captions fill 32 memory tokens. The steps of both
alternate in one process, the median of the ratios of their CPU seconds counts; the memory is the peak resident set of
a process of its own for each. Goal: at most 1.05 of both. --memory_input latents has the paper's connector.
"""

import argparse
import resource
import subprocess
import sys
import time
from statistics import median

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from tinyalign_vlm import TinyAlignConfig, TinyAlignForConditionalGeneration

TOP_K, PATCHES, TEXT, LEARNT = 4, 729, 60, 30
IMAGE_TOKEN = 151000


class System:
    """A model in training mode, its optimizer and a batch."""

    def __init__(self, top_k: int, stage: int, layers: int, batch_size: int, memory_input: str):
        torch.manual_seed(0)
        vision = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=layers,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        )
        text = Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=layers,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        config = TinyAlignConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE_TOKEN,
            image_seq_length=PATCHES,
            memory_top_k=top_k,
            memory_input=memory_input,
        )
        self.model = TinyAlignForConditionalGeneration(config).train()
        self.model.requires_grad_(stage == 2)
        for name in ("connector", "memory_connector"):
            if name == "connector" or top_k:
                self.model.get_submodule(f"model.{name}").requires_grad_(True)
        self.model.model.vision_tower.requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        image = [IMAGE_TOKEN] * (PATCHES + config.num_memory_tokens)
        ids = torch.randint(0, 1000, (batch_size, TEXT))
        ids = torch.cat([torch.tensor(image).expand(batch_size, -1), ids], dim=1)
        labels = ids.clone()
        labels[:, :-LEARNT] = -100
        self.batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "pixel_values": torch.randn(batch_size, 3, 384, 384),
        }
        if top_k:
            self.batch["memory_ids"] = torch.arange(top_k).expand(batch_size, -1)
            self.batch["memory_scores"] = torch.rand(batch_size, top_k)
            if config.reads_captions:
                self.batch["memory_input_ids"] = torch.randint(0, 1000, (batch_size, config.memory_tokens))
            if config.reads_latents:
                shape = (batch_size, top_k, config.memory_tokens, config.latent_dim)
                self.batch["memory_values"] = torch.randn(shape).half()

    def step(self) -> float:
        """CPU seconds of a step of the optimizer."""
        started = time.process_time()
        self.model(**self.batch, supervised_logits_only=True, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def peak_memory(arguments: argparse.Namespace, top_k: int, stage: int) -> float:
    """GB, of a process that takes three steps."""
    command = [sys.executable, __file__, "--memory_of", str(top_k), "--stage", str(stage)]
    for name in ("layers", "batch_size", "memory_input"):
        command += [f"--{name}", str(vars(arguments)[name])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of each of the two models (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed (default: %(default)s)")
    parser.add_argument("--memory_input", default="captions", help="(default: %(default)s)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="one of the two (default: both)")
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = {"layers": arguments.layers, "batch_size": arguments.batch_size, "memory_input": arguments.memory_input}
    if arguments.memory_of is not None:
        system = System(arguments.memory_of, arguments.stage, **shape)
        for _ in range(3):
            system.step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    print(
        "| stage | baseline, CPU s | TinyAlign, CPU s | ratio | baseline, GB | TinyAlign, GB | ratio |\n|" + "---|" * 7
    )
    for stage in (1, 2) if arguments.stage is None else (arguments.stage,):
        systems = [System(top_k, stage, **shape) for top_k in (0, TOP_K)]
        times = [[system.step() for system in systems] for _ in range(arguments.steps + 2)][2:]
        baseline, tinyalign = (median(column) for column in zip(*times, strict=True))
        ratio = median(b / a for a, b in times)
        del systems
        memory = [peak_memory(arguments, top_k, stage) for top_k in (0, TOP_K)]
        print(
            f"| {stage} | {baseline:.2f} | {tinyalign:.2f} | {ratio:.3f} | {memory[0]:.2f} | {memory[1]:.2f} | "
            f"{memory[1] / memory[0]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
