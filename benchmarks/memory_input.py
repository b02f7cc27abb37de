"""
What a model should read of its neighbours and meet in training: the demo's job, on validation concepts, three seeds.

    tinyalign demo && python benchmarks/memory_input.py demo out

Each seed trains, in the demo's steps: the baseline; TinyAlign ("captions"), text-only RAG ("text"), captions and
latents ("both") and latents alone, the paper's way ("latents"), all on training concepts of which the bank lacks 30%;
captions and text without memory dropout ("coverage", "text_coverage"); captions with training concepts that the bank
has, with memory dropout ("dropout") and without ("known"); captions whose dropout always takes all neighbours
("all_off"), and captions in the second stage alone, in as many steps ("one_stage"). Not by default: captions without
similarities ("no_scores"), the baseline on as few rows as are trained without memory in "all_off" ("baseline_120") and
in "captions" ("baseline_20"), and three systems in ten times the steps ("baseline_long", "captions_long",
"latents_long"), with a plot of their losses.

Every number is of concepts that were never trained on, with a bank that has them, one that lacks them, and none
("off"); of a system that reads values also with those of other rows, and with the MLP that reads them switched off:
the mean of the seeds, and from their lowest to their highest.
"mixed" and "weighted" mix the probabilities of the answers with and without memory in one model: half and half, and by
the probability that a neighbour is right. Training goes on where it was interrupted; docs/method.md has the table.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from tinyalign_vlm.modeling_tinyalign.bank_rows import BankRows
from tinyalign_vlm.modeling_tinyalign.outputs import probabilities
from tinyalign_vlm.training.bank.calibration import fit_calibration
from tinyalign_vlm.training.data import memory_dropout
from tinyalign_vlm.training.data.memory_dropout import OFF_SHARE
from tinyalign_vlm.training.data.neighbours import find_neighbours
from tinyalign_vlm.training.demo import run, systems
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.state import BANKS, TOP_K, Clock, Demo, DemoConfig, Result
from tinyalign_vlm.training.hub.run_facts import read_records

METRICS = ("choice", "keyword_loss", "exact_match", "name_loss")
SYSTEMS = (
    "baseline",
    "captions",
    "text",
    "coverage",
    "text_coverage",
    "known",
    "dropout",
    "all_off",
    "one_stage",
    "both",
    "latents",
)
FEWER_ROWS = {"baseline_20": 20, "baseline_120": 120}
LONG = ("baseline_long", "captions_long", "latents_long")
TIMES = 10  # as many steps


def prepare_demo(folder: Path, weights: dict[str, Path], seed: int) -> Demo:
    """Make features, banks and neighbours of one seed."""
    config = DemoConfig(split="validation", seed=seed)
    pairs = load_pairs(seed, split=config.split)
    demo = Demo(folder, False, config, pairs, weights, Clock(folder / "clock.json"))
    run.prepare_demo(demo)
    return demo


def of_known_concepts(demo: Demo) -> Demo:
    """Return the demo with training concepts that the bank has."""
    pairs, (scores, ids) = demo.pairs, demo.found["train"]
    rows = np.searchsorted(pairs.train, pairs.known)
    return replace(
        demo,
        pairs=replace(pairs, train=pairs.known),
        features=demo.features | {"train": demo.features["train"][rows]},
        found=demo.found | {"train": (scores[rows], ids[rows])},
    )


def ten_times(demo: Demo) -> tuple[Demo, datasets.Dataset]:
    """Return the demo with ten times the steps, and its chats as often as these take them."""
    config, train = demo.config, demo.pairs.train
    steps = config.stage1_steps, config.stage2_steps
    passes = -(-TIMES * sum(steps) * config.batch_size // len(train))
    rows = systems.chats(demo.labels(train), demo.keywords(train))
    rows = rows.add_column("feature_index", list(range(len(rows))))
    found = tuple(np.tile(part, (passes, 1)) for part in demo.found["train"])
    config = replace(config, stage1_steps=TIMES * steps[0], stage2_steps=TIMES * steps[1])
    demo = replace(demo, config=config, found=demo.found | {"train": found})
    return demo, datasets.concatenate_datasets([rows] * passes)


def run_one(demo: Demo, name: str) -> dict[str, Result]:
    """Train a system, and return what it answers by bank."""
    rows, part = None, name.removesuffix("_long")
    if name in LONG:
        demo, rows = ten_times(demo)
    if name in FEWER_ROWS:
        steps = FEWER_ROWS[name] // demo.config.batch_size
        demo = replace(demo, config=replace(demo.config, stage1_steps=steps // 4, stage2_steps=steps - steps // 4))
    if part == "baseline" or name in FEWER_ROWS:
        model = systems.train_system(demo, name, rows=rows, memory_top_k=0)
        return {"off": systems.evaluate_system(demo, name, *model, answer=False)}
    if name == "one_stage":
        steps = demo.config.stage1_steps + demo.config.stage2_steps
        demo = replace(demo, config=replace(demo.config, stage1_steps=0, stage2_steps=steps))
    memory_dropout.OFF_SHARE = 1 if name == "all_off" else OFF_SHARE
    if name in ("coverage", "text_coverage", "known"):
        demo = replace(demo, config=replace(demo.config, memory_dropout=0.0))
    if name.startswith("text"):
        model = systems.train_system(demo, name, in_text=True, memory_top_k=0)
        return {
            bank: systems.evaluate_system(demo, f"{name}_{bank}", *model, captions=demo.captions(bank), answer=False)
            for bank in BANKS
        }
    banks = {bank: bank for bank in (*BANKS, "off")}
    memory = {"memory_scores": False} if name == "no_scores" else {}
    if part in ("both", "latents"):
        run.make_latent_banks(demo)
        memory = {"memory_input": part}
        banks = {bank: f"latents_{bank}" for bank in BANKS}
    if name in ("known", "dropout"):
        demo = of_known_concepts(demo)
    model = systems.train_system(demo, name, banks["without"], rows=rows, **memory)
    found = {}
    for key, bank in banks.items():
        found[key] = systems.evaluate_system(demo, f"{name}_{key}", *model, bank=bank, answer=False)
    return found | probe_values(demo, name, *model) if "latents" in banks["with"] else found


def probe_values(demo: Demo, name: str, model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, Result]:
    """Return what a system answers with the values of other rows, and with the MLP that reads them switched off."""
    rng, gather = np.random.default_rng(demo.config.seed), BankRows.gather
    order = torch.from_numpy(rng.permutation(len(demo.banks["latents_with"])))

    def gather_others(bank: BankRows, ids: torch.Tensor, *dtype: torch.dtype) -> torch.Tensor:
        return gather(bank, torch.where(ids < 0, ids, order[ids]), *dtype)

    settings = {"bank": "latents_with", "answer": False}
    with patch.object(BankRows, "gather", gather_others):
        found = {"values of others": systems.evaluate_system(demo, f"{name}_others", model, processor, **settings)}
    for parameter in model.base_model.memory_connector.mlp.linear_2.parameters():
        torch.nn.init.zeros_(parameter)
    return found | {"MLP off": systems.evaluate_system(demo, f"{name}_mlp_off", model, processor, **settings)}


def knows(demo: Demo) -> dict[str, np.ndarray]:
    """Return the probability that a neighbour is right, by bank; fitted on training concepts, `(queries,)` each."""
    bank, pairs = demo.banks["without"], demo.pairs
    model, _ = systems.compose_demo(demo.weights, demo.config, memory_top_k=TOP_K)
    asked = find_neighbours(bank, model, demo.features["twemoji"][pairs.known], run.SEARCHED)
    right = demo.is_right(pairs.known, asked, pairs.known)
    calibration = fit_calibration(asked[0], right, TOP_K, len(bank))
    return {
        name: 1 - probabilities(calibration, torch.from_numpy(demo.found[name][0][:, :TOP_K]))[1].numpy()
        for name in BANKS
    }


def mix(demo: Demo, on: Result, off: Result, weight: np.ndarray) -> Result:
    """Return the losses of answers whose probability is the weighted mean of those with and without memory."""
    losses = {}
    for name, share in (("keyword_losses", weight[demo.asked]), ("name_losses", weight)):
        parts = np.log(share) - vars(on)[name], np.log1p(-share) - vars(off)[name]
        losses[name] = -np.logaddexp(*parts)
    return Result(keyword_tokens=on.keyword_tokens, name_tokens=on.name_tokens, **losses)


def add_mixtures(demo: Demo, name: str) -> None:
    """Add the mixtures of a system with and without its memory to the results."""
    found, known = demo.results[name], knows(demo)
    for title, weights in (("mixed", {bank: np.full_like(known[bank], 0.5) for bank in BANKS}), ("weighted", known)):
        mixed = {bank: mix(demo, found[bank], found["off"], weights[bank].clip(0.001, 0.999)) for bank in BANKS}
        demo.results[f"{name}, {title}"] = mixed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `tinyalign demo`, whose weights are used")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=(*SYSTEMS, "no_scores", *FEWER_ROWS, *LONG))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    weights = {
        "vision": arguments.demo / "weights" / "efficientnet-lite0",
        "text": arguments.demo / "weights" / "smollm2-135m-instruct",
    }
    found = {}
    for seed in arguments.seeds:
        demo = prepare_demo(arguments.out / f"seed{seed}", weights, seed)
        for name in arguments.systems:
            demo.results[name] = run_one(demo, name)
            if "off" in demo.results[name] and len(demo.results[name]) > 1:
                add_mixtures(demo, name)
        for name, banks in demo.results.items():
            for bank in banks:
                scores = {metric: demo.score(name, bank, metric) for metric in METRICS}
                found.setdefault((name, bank), []).append(scores)
        if long := [name for name in LONG if name in demo.results]:
            plot_losses(demo, long, arguments.out / f"long_seed{seed}.png")
        print_table(found, len(arguments.seeds[: arguments.seeds.index(seed) + 1]))


def plot_losses(demo: Demo, names: Sequence[str], path: Path) -> None:
    """Plot the training losses of systems by step, stage 2 behind stage 1, in twenty parts, the mean of each."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for name in names:
        first, second = (np.array(record.losses) for record in read_records(demo.out / name / "model"))
        second[:, 0] += first[-1, 0]
        points = [part.mean(0) for part in np.array_split(np.concatenate([first, second]), 20)]
        axis.plot(*zip(*points, strict=True), label=name, marker=".")
    axis.axvline(first[-1, 0], color="gray", linestyle=":", label="stage 2 begins")
    axis.set(xlabel="step", ylabel="training loss per token")
    axis.legend()
    figure.savefig(path, dpi=110)


def print_table(found: dict[tuple[str, str], list[dict]], seeds: int) -> None:
    """Print the mean of each metric over the seeds, and its lowest and highest value."""
    print(f"\n{seeds} seeds\n| system | bank | " + " | ".join(METRICS) + " |\n" + "|---" * (2 + len(METRICS)) + "|")
    for (name, bank), scores in found.items():
        cells = []
        for metric in METRICS:
            values = [one[metric].value for one in scores if one[metric] is not None]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-")
        print(f"| {name} | {bank} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
