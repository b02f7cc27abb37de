"""
How well a frozen language model reads 8 memory tokens, before any training with it: the loss of repeating a label.

Run it after the demo, whose weights and value encoder it uses:

    tinyalign demo && python benchmarks/reading_latents.py demo

Rows: the label as text; its words as the mean embedding of each word's tokens, one to three slots a word; those with
noise of a given cosine; a two-layer MLP taught to give those embeddings from the latents (no lexicon); the lexicon.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.modeling_tinyalign.connectors import lexicon_words, read_words, slot_tokens
from tinyalign_vlm.training.bank.value_encoder_training import CaptionSampler
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.run import BANKS


class Reader:
    """The language model, and what it is asked."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.embeddings = self.model.get_input_embeddings().weight.float().detach()

    def embed(self, text: str) -> torch.Tensor:
        return self.embeddings[self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    @torch.no_grad()
    def repeat(self, memory: Callable[[str], torch.Tensor], labels: list[str]) -> tuple[float, float]:
        """Loss per token and token accuracy of repeating each label, given its memory tokens `(tokens, hidden)`."""
        losses, correct = [], []
        for label in labels:
            answer = self.tokenizer(f"{label}<|im_end|>", add_special_tokens=False)["input_ids"]
            sequence = [
                self.embed("<|im_start|>user\nRepeat these words:"),
                memory(label),
                self.embed("<|im_end|>\n<|im_start|>assistant\n"),
                self.embeddings[answer],
            ]
            inputs = torch.cat(sequence)[None].bfloat16()
            logits = self.model(inputs_embeds=inputs).logits[0, -len(answer) - 1 : -1].float()
            targets = torch.tensor(answer)
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            correct.append(logits.argmax(-1) == targets)
        return torch.cat(losses).mean().item(), torch.cat(correct).float().mean().item()


def word_vectors(reader: Reader, label: str, slots: int) -> torch.Tensor:
    """`slots` vectors a word, as the lexicon has them."""
    tokens = slot_tokens(reader.tokenizer, label.split(), slots).transpose(0, 1).flatten(0, 1)
    used = (tokens >= 0).unsqueeze(-1)
    return (reader.embeddings[tokens.clamp(min=0)] * used).sum(1) / used.sum(1)


def teach_mlp(reader, encoder, features, captions, words, width: int, steps: int) -> torch.nn.Module:
    """From latents to the vectors of their words, by squared error, on captions and words in random order."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(96, width), torch.nn.GELU(), torch.nn.Linear(width, 576))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    sampler = CaptionSampler(captions, 0.7, seed=0)
    sampler.other_word = lambda: sampler.rng.choice(words)
    scale = reader.embeddings.std()
    blank = reader.embed("\n")[-1]
    for _ in trange(steps, desc=f"MLP of {width}"):
        texts = sampler.sample(64, encoder.config.max_words)
        with torch.no_grad():
            latents = encoder.encode(features[torch.randint(len(features), (64,))], texts)
        targets = blank.expand(64, latents.shape[1], -1).clone()
        for row, text in enumerate(texts):
            vectors = word_vectors(reader, text, 2)[: latents.shape[1]]
            targets[row, : len(vectors)] = vectors
        loss = F.mse_loss(mlp(latents), targets / scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda latents: mlp(latents).detach() * scale


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `tinyalign demo`")
    parser.add_argument("--labels", type=int, default=100, help="held-out labels to repeat (default: %(default)s)")
    parser.add_argument("--mlp_steps", type=int, default=1000, help="0 leaves the MLP out (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    reader = Reader(arguments.demo / "weights" / "smollm2-135m-instruct")
    pairs = load_pairs()
    rows = pairs.noto.select(pairs.heldout[: arguments.labels])
    labels = rows["label"]
    banks = {name: MemoryBank.from_pretrained(arguments.demo / f"bank_{name}_heldout") for name in BANKS}
    encoder = banks["with"].value_encoder
    found = {row["caption"]: row["id"] for row in banks["with"].rows(range(len(banks["with"])))}
    latents = dict(zip(labels, banks["with"].gather([[found[label]] for label in labels])[:, 0], strict=True))

    def report(name: str, memory: Callable[[str], torch.Tensor]):
        print("| {} | {:.2f} | {:.2f} |".format(name, *reader.repeat(memory, labels)), flush=True)

    print(f"Repeating {len(labels)} held-out labels\n")
    print("| memory tokens | loss per token | token accuracy |\n|---|---|---|")
    report("the label as text", lambda label: reader.embed(f" {label}"))
    for slots in (1, 2, 3):
        report(f"word vectors, {slots} a word", lambda label, slots=slots: word_vectors(reader, label, slots))
    mean = reader.embeddings.mean(0)
    for cosine in (0.9, 0.7, 0.5):

        def noisy(label: str, cosine: float = cosine) -> torch.Tensor:
            vectors = word_vectors(reader, label, 2) - mean
            noise = F.normalize(torch.randn_like(vectors), dim=-1) * vectors.norm(dim=-1, keepdim=True)
            return mean + cosine * vectors + (1 - cosine**2) ** 0.5 * noise

        report(f"word vectors, 2 a word, noise (cosine {cosine})", noisy)
    captions = banks["without"].captions
    vocabulary = lexicon_words(reader.tokenizer, ())[1:]
    if arguments.mlp_steps:
        (path,) = (arguments.demo / "features").glob("noto-*.npy")
        features = torch.from_numpy(np.load(path, allow_pickle=False)[pairs.train])
        mlp = teach_mlp(reader, encoder, features, captions, vocabulary, 2304, arguments.mlp_steps)
        report(f"latents, an MLP of 2304 taught for {arguments.mlp_steps} steps", lambda label: mlp(latents[label]))
    for name, bank in banks.items():
        words = lexicon_words(reader.tokenizer, bank.captions)
        lexicon = (*encoder.word_scores(words), slot_tokens(reader.tokenizer, words, 2), reader.embeddings.__getitem__)
        report(
            f"latents, lexicon of {len(words)} words, {name} the held-out labels' own",
            lambda label, lexicon=lexicon: read_words(latents[label], *lexicon),
        )


if __name__ == "__main__":
    main()
