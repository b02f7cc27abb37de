"""`tinyalign demo`: does a bank of names help a small model with emoji it has never seen? With real weights."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ...modeling_tinyalign import MemoryBank, TinyAlignConfig
from ...modeling_tinyalign.bank_format import CONFIG_NAME, CalibrationConfig
from ...modeling_tinyalign.connectors import CaptionTokenizer
from ..bank.calibration import fit_calibration
from ..bank.learned_keys import learn_keys
from ..bank.value_encoder_training import ValueEncoderTrainingConfig
from ..data.features import cache_vision_features
from ..data.neighbours import find_neighbours, source_ids_of
from .cards import write_demo_cards
from .controls import run_controls
from .pairs import character_pictures, load_pairs, options_of
from .report import write_demo_report
from .state import BANKS, OTHER_BANKS, TOP_K, Clock, Demo, DemoConfig, write_json
from .systems import compose_demo, evaluate_system, train_system
from .weights import check_installed, convert_efficientnet_lite0, convert_smollm2

QUICK = DemoConfig(concepts=320, queries=60, stage1_steps=16, stage2_steps=36, every_row=False)
NUM_CHARACTERS = 256
SEARCHED = 32  # neighbours that are looked at for wrong options
# What commands go on from. After a quick run they are found at the same place as after a full one.
RESULTS = ("checkpoint", "bank_with_heldout", "bank_without_heldout", "query.png", "report.md")


def check_settings(path: Path, config: DemoConfig) -> None:
    """Keep the settings in `path`. Raises `ValueError` when the folder has results of other ones."""
    if path.exists() and (kept := json.loads(path.read_text())) != asdict(config):
        changed = [f"{name}: {kept.get(name)} then, {now} now" for name, now in asdict(config).items()]
        raise ValueError(
            f"{path.parent} has a demo of other settings ({'; '.join(changed)}): delete it or choose another --output."
        )
    write_json(path, asdict(config))


def link_results(folder: Path, quick: bool) -> None:
    """Let DIR/checkpoint and the like lead to those of a quick run, unless there are some of a full run."""
    for name in RESULTS:
        link = folder / name
        if link.is_symlink():
            link.unlink()
        if quick and not link.exists():
            link.symlink_to(Path("quick", name))


def run_demo(output_dir: str | os.PathLike, quick: bool = False):
    """Train all systems with the same budget, compare them with rules that need no training, and write `report.md`.

    They are evaluated on emoji whose concepts were never trained on. Interrupted, it goes on where it stopped.
    """
    logging.disable_progress_bar()  # of loading weights
    datasets.disable_progress_bars()
    folder, config = Path(output_dir).resolve(), QUICK if quick else DemoConfig()
    out = folder / "quick" if quick else folder
    pairs = load_pairs(config.seed, config.concepts, config.split)
    check_installed()
    check_settings(out / "config.json", config)
    link_results(folder, quick=False)
    clock = Clock(out / "clock.json")
    weights = {
        "vision": convert_efficientnet_lite0(folder / "weights" / "efficientnet-lite0"),
        "text": convert_smollm2(folder / "weights" / "smollm2-135m-instruct"),
    }
    clock("weights converted", f"{len(pairs.train)} concepts to train on, {len(pairs.heldout)} held out")
    demo = Demo(out, quick, config, pairs, weights, clock)
    prepare_demo(demo)
    run_without_memory(demo)
    model, processor = run_with_memory(demo)

    model.save_pretrained(out / "checkpoint")
    processor.save_pretrained(out / "checkpoint")
    example = demo.queries[int(demo.answered[0])]
    example["image"].save(out / "query.png")
    print("A new process without the package loads the checkpoint (10 seconds or so)", flush=True)
    answer = write_demo_cards(demo)
    clock("answered in a process without the package", f'"{answer}" for {example["label"]!r}; cards written')
    write_demo_report(demo, answer, example["label"])
    clock("report written")
    link_results(folder, quick)
    print_next_commands(out)


def print_next_commands(out: Path) -> None:
    """Say where the results are, and print the commands that go on from there."""
    installed, place = Path(sys.executable).with_name("tinyalign"), os.path.relpath(out)
    program = "tinyalign" if shutil.which("tinyalign") else os.path.relpath(installed)
    print(
        f"\n{place}/report.md has the results, {place}/checkpoint the model, {place}/bank_with_heldout its memory "
        "bank. README.md asks the model in six lines of Python. Look at the bank, or push both to the Hub:\n\n"
        f"  {program} bank info {place}/bank_with_heldout\n"
        f"  {program} bank view {place}/bank_with_heldout -o bank.html --image {place}/query.png "
        f"--model {place}/checkpoint\n"
        f"  {program} push {place}/checkpoint YOU/MODEL --bank {place}/bank_with_heldout YOU/BANK"
    )


def prepare_demo(demo: Demo) -> None:
    """Make features and banks, look up the neighbours of all query drawings, and choose what is asked."""
    pairs, config, out = demo.pairs, demo.config, demo.out
    model, processor = compose_demo(demo.weights, config, memory_top_k=TOP_K)
    features = {
        style: cache_vision_features(model, processor, rows["image"], out / "features" / style, desc=style)
        for style, rows in (("noto", pairs.noto), ("twemoji", pairs.twemoji))
    }
    demo.clock("frozen visual features cached")
    train, queries = (features["twemoji"][rows] for rows in (pairs.train, demo.queried))
    demo.features = {"train": train, "queries": queries} | features
    make_banks(demo, model, processor)
    demo.clock("memory banks built")
    own = source_ids_of(pairs.twemoji.select(pairs.train)["image"])
    demo.found = {"train": find_neighbours(demo.banks["without"], model, demo.features["train"], 2 * TOP_K, own)}
    for name, bank in demo.banks.items():
        demo.found[name] = find_neighbours(bank, model, demo.features["queries"], min(SEARCHED, len(bank)))
    scores, ids = demo.found["without"]
    demo.banks["off"] = demo.banks["without"]
    demo.found["off"] = np.full_like(scores, -np.inf), np.full_like(ids, -1)
    rng = np.random.default_rng(config.seed)
    near = demo.concepts["without"][demo.found["without"][1]]
    demo.options = [options_of(pairs, *query, rng) for query in zip(demo.queried, near, strict=True)]
    run_controls(demo, model, processor.tokenizer)
    demo.clock("rules without training evaluated")


def make_banks(demo: Demo, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Make the bank without the held-out concepts, others with all and half of them, shuffled, of other pictures.

    Keys are learned from the training concepts that the bank does not have, probabilities on the validation concepts.
    """
    pairs, features, seed = demo.pairs, demo.features, demo.config.seed
    half = np.random.default_rng(seed).permutation(pairs.heldout)[::2]  # half of the queries, too
    demo.concepts = {"without": pairs.known}
    for name, added in (("with", pairs.heldout), ("half", np.sort(half))):
        demo.concepts[name] = np.concatenate([pairs.known, added])
    parts = model, processor, pairs.noto, features["noto"]
    if all((bank_folder(demo, name) / CONFIG_NAME).exists() for name in demo.concepts):
        demo.banks = {name: MemoryBank.from_pretrained(bank_folder(demo, name)) for name in demo.concepts}
    else:
        unknown = np.setdiff1d(pairs.train, pairs.known)
        begun = make_bank(*parts, pairs.known, **key_settings(pairs.known))
        begun = learn_keys(begun, features["noto"][unknown], features["twemoji"][unknown], seed)
        calibration = calibrate(demo, make_bank(*parts, pairs.validation, begun), model)
        for name, concepts in demo.concepts.items():
            new = concepts[len(begun) :]
            bank = make_bank(*parts, new, begun) if len(new) else begun
            bank.with_calibration(calibration).save_pretrained(bank_folder(demo, name))
            demo.banks[name] = MemoryBank.from_pretrained(bank_folder(demo, name))
    demo.banks["random"] = demo.banks["with"].shuffled(seed)
    others = character_pictures(NUM_CHARACTERS, seed)
    demo.features["other"] = cache_vision_features(
        model, processor, others["image"], demo.out / "features" / "characters", desc="characters"
    )
    rows = np.arange(len(others))
    demo.banks["other"] = make_bank(model, processor, others, demo.features["other"], rows, **key_settings(rows))


def calibrate(demo: Demo, bank: MemoryBank, model: PreTrainedModel) -> CalibrationConfig | None:
    """Return what makes probabilities of similarities, fitted on the validation concepts, which `bank` ends with."""
    pairs = demo.pairs
    if not len(pairs.validation):
        return None
    found = find_neighbours(bank, model, demo.features["twemoji"][pairs.validation], SEARCHED)
    concepts = np.concatenate([pairs.known, pairs.validation])
    return fit_calibration(found[0], demo.is_right(concepts, found, pairs.validation), TOP_K, len(bank))


def bank_folder(demo: Demo, name: str) -> Path:
    """Return the folder of a bank of drawings."""
    return demo.out / ("bank_half" if name == "half" else f"bank_{name}_heldout")


def key_settings(rows: np.ndarray) -> dict[str, int]:
    """Return the settings of a bank's keys: 3 x 3 cells, as many dimensions as help."""
    return {"key_grid": 3, "whiten_dim": min(512, len(rows) - 1)}


def make_latent_banks(demo: Demo) -> None:
    """Make the banks with values, whose rows are those of the banks with names alone, and so the neighbours."""
    parts = *compose_demo(demo.weights, demo.config, memory_input="latents"), demo.pairs.noto, demo.features["noto"]
    training = ValueEncoderTrainingConfig(steps=demo.config.value_encoder_steps, seed=demo.config.seed)
    settings = {**key_settings(demo.pairs.known), "value_encoder_training": training}
    for name in reversed(BANKS):
        path, rows, begun = demo.out / f"bank_latents_{name}", demo.concepts[name], demo.banks.get("latents_without")
        if not (path / CONFIG_NAME).exists():
            new = rows if begun is None else rows[len(begun) :]
            make_bank(*parts, new, begun, **settings).save_pretrained(path)
        demo.banks[f"latents_{name}"] = MemoryBank.from_pretrained(path)
        demo.found[f"latents_{name}"] = demo.found[name]
    demo.clock("memory banks built")


def make_bank(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    drawings: datasets.Dataset,
    features: np.ndarray,
    rows: np.ndarray,
    begun: MemoryBank | None = None,
    **settings,
) -> MemoryBank:
    """Return a bank of these rows of the drawings with their labels, or the bank `begun` with them added."""
    build = {"caption_column": "label", "keep_duplicates": True}  # some concepts share a drawing
    build["vision_features"] = features[rows]
    if begun is None:
        return MemoryBank.build(drawings.select(rows), model, processor, **build, **settings)
    return begun.add(drawings.select(rows), model, processor, **build)


def run_without_memory(demo: Demo) -> None:
    """Train and evaluate what reads no memory tokens: the baselines, and text-only RAG."""
    results, pictures = demo.results, demo.features
    average = np.broadcast_to(pictures["train"].mean(0, dtype=np.float32), pictures["queries"].shape)
    model = train_system(demo, "baseline", memory_top_k=0)
    results["baseline"] = dict.fromkeys(BANKS, evaluate_system(demo, "baseline", *model))
    demo.clock("evaluated")
    if not demo.config.every_row:
        return
    results["no_image"] = dict.fromkeys(BANKS, evaluate_system(demo, "no_image", *model, features=average))
    model = train_system(demo, "wider_connector")
    results["wider_connector"] = dict.fromkeys(BANKS, evaluate_system(demo, "wider_connector", *model))
    demo.clock("evaluated")
    model = train_system(demo, "text_rag", in_text=True, memory_top_k=0)
    names = [[label] for label in demo.labels(demo.queried)]
    results["true_name"] = dict.fromkeys(BANKS, evaluate_system(demo, "true_name", *model, captions=names))
    results |= {"text_rag": {}, "text_cut": {}}
    packer = CaptionTokenizer(model[1].tokenizer, TinyAlignConfig().memory_tokens)
    for bank in BANKS:
        whole = demo.captions(bank)
        packed = [packer.pack([packer.tokenize(name) for name in names]) for names in whole]
        cut = [[packer.tokenizer.decode(tokens).strip()] for tokens in packed]
        results["text_rag"][bank] = evaluate_system(demo, f"text_rag_{bank}", *model, captions=whole)
        if cut == [["; ".join(names)] for names in whole]:
            results["text_cut"][bank] = results["text_rag"][bank]
        else:
            results["text_cut"][bank] = evaluate_system(demo, f"text_cut_{bank}", *model, captions=cut)
    demo.clock("evaluated")


def run_with_memory(demo: Demo) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Train and evaluate what reads memory tokens, and return TinyAlign and its processor."""
    results = demo.results
    if demo.config.every_row:
        make_latent_banks(demo)
        model = train_system(demo, "latents", "latents_without", memory_input="latents")
        results["latents"] = {}
        for bank in BANKS:
            results["latents"][bank] = evaluate_system(demo, f"latents_{bank}", *model, bank=f"latents_{bank}")
        demo.clock("evaluated")
    model, processor = train_system(demo, "tinyalign", "without")
    results["tinyalign"] = {}
    for bank in (*BANKS, *(OTHER_BANKS if demo.config.every_row else ())):
        results["tinyalign"][bank] = evaluate_system(
            demo, f"tinyalign_{bank}", model, processor, bank=bank, answer=bank in BANKS
        )
    if "random" in results["tinyalign"]:
        results["random_bank"] = {"with": results["tinyalign"]["random"]}
    model.attach_memory_bank(demo.banks["with"], tokenizer=processor.tokenizer)
    demo.clock("evaluated")
    return model, processor
