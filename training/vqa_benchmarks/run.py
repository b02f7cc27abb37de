"""Runs of the benchmarks: a checkpoint answers, with one bank, another or none; what is on disk is not asked again."""

import argparse
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from loguru import logger
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign import MemoryBank, TinyAlignConfig
from ...modeling_tinyalign.row_encoder import image_source_id
from ..models import load_to_answer
from .answering import answer_chats, batches
from .report import write_report, write_results_card
from .samples import NEIGHBOUR, is_complete, samples_path, save_samples
from .tasks import Questions

PACKAGES = ("tinyalign-vlm", "lmms-eval", "transformers", "torch", "datasets")


@dataclass(frozen=True)
class Variant:
    """
    A way in which a checkpoint answers.

    Attributes:
        bank: folder or repository, None for the one that the config names.
        shuffled: every key of the bank leads to another row: the control.
    """

    name: str
    checkpoint: str
    bank: str | None = None
    memory: str = "on"
    shuffled: bool = False


def run_command(options: argparse.Namespace):
    """Answer what `tinyalign evaluate` asks for with these options, and report."""
    logger.remove()  # lmms-eval's, which tells of each task at length
    logger.add(sys.stderr, level="WARNING")
    variants = variants_of(options.model, options.banks, options.memory == "off", options.shuffled, options.against)
    asked = []
    for name in options.tasks:
        images = set(map(int, Path(options.images).read_text().split())) if name == "vqav2_val" else None
        folder = options.data and Path(options.data)
        asked.append(Questions(name, folder, options.limit, images, options.judge if name == "mmvet" else None))
    output = Path(options.output)
    run_benchmarks(variants, asked, output, options.batch_size)
    if PartialState().is_main_process:
        paths = [("", samples_path(output, variant.name, name)) for variant in variants for name in options.tasks]
        results = write_report(paths, output, options.exclude)
        if options.card:
            write_results_card(Path(options.model), results, variants[0].name)


def variants_of(
    checkpoint: str,
    banks: Sequence[str] = (),
    memory_off: bool = False,
    shuffled: bool = False,
    against: Sequence[str] = (),
) -> list[Variant]:
    """Return the variants that a command asks for, the one that the others are compared with first."""
    name = Path(checkpoint).name
    if TinyAlignConfig.from_pretrained(checkpoint).num_neighbours == 0:
        if banks or memory_off or shuffled:
            raise ValueError(f"{checkpoint} is a model without memory: leave out --bank, --memory and --shuffled.")
        variants = [Variant(name, checkpoint)]
    else:
        variants = [Variant(f"{name}, {Path(bank).name}", checkpoint, bank) for bank in banks]
        variants = variants or [Variant(name, checkpoint)]
        if shuffled:
            first = variants[0]
            variants.append(Variant(f"{first.name}, shuffled", checkpoint, first.bank, shuffled=True))
        if memory_off:
            variants.append(Variant(f"{name}, memory off", checkpoint, memory="off"))
    for other in against:
        variants += variants_of(other)
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ValueError(f"Variants are called {names}, expected names that differ: rename a folder.")
    return variants


def run_benchmarks(variants: Sequence[Variant], asked: Sequence[Questions], output: Path, batch_size: int = 8):
    """
    Answer all questions in all ways, and write the answers that `output` does not have yet.

    A file of answers counts if weights, bank, prompts and settings are those of now. Several processes share the work.
    """
    checkpoint, model, state = None, None, PartialState(cpu=not torch.cuda.is_available())
    for variant in variants:
        if variant.checkpoint != checkpoint:
            model = None  # two may not fit
            checkpoint, device = variant.checkpoint, "auto" if state.num_processes == 1 else str(state.device)
            model, processor = load_to_answer(checkpoint, memory="off", device=device)
            weights = weights_sha256(model)
        bank = _attach(model, processor, variant)
        for questions in asked:
            facts = {
                **asdict(variant),
                "benchmark": questions.name,
                "source": questions.source,
                "split": questions.split,
                "data_version": questions.version,
                "questions": questions.fingerprint,
                "weights": weights,
                "bank_rows": bank and bank.folder.name,
                "judge": questions.judge,
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            }
            path = samples_path(output, variant.name, questions.name)
            if is_complete(path, facts):
                continue
            desc = f"{questions.benchmark.title}, {variant.name}"
            samples = answer_questions(model, processor, questions, variant.memory, bank, batch_size, desc)
            if state.is_main_process:
                save_samples(path, samples, facts)
            state.wait_for_everyone()


def _attach(model: PreTrainedModel, processor: ProcessorMixin, variant: Variant) -> MemoryBank | None:
    """Attach the bank of a variant and return it, None where nothing is retrieved."""
    if variant.memory == "off" or model.config.num_neighbours == 0:
        return None
    bank = model.memory_bank if variant.bank is None else MemoryBank.from_pretrained(variant.bank)
    if bank is None:
        raise ValueError(f"{variant.checkpoint} retrieves neighbours, but its config names no bank: pass --bank.")
    bank = bank.shuffled() if variant.shuffled else bank
    model.attach_memory_bank(bank, tokenizer=processor.tokenizer)
    return bank


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Questions,
    memory: str,
    bank: MemoryBank | None,
    batch_size: int,
    desc: str,
) -> list[dict]:
    """Return a sample for each question, by row; each process answers its share."""
    state, numbers = PartialState(), questions.numbers
    lengths = [len(questions.prompts[number]) for number in numbers]
    shares = list(batches(lengths, [questions.generation] * len(numbers), batch_size))
    samples = []
    for batch in tqdm(shares[state.process_index :: state.num_processes], desc, unit="batch"):
        rows = [questions.row(numbers[place]) for place in batch]
        chats = [questions.chat(row) for row in rows]
        answers = answer_chats(model, processor, chats, questions.generation, memory)
        for place, row, chat, answer in zip(batch, rows, chats, answers, strict=True):
            images = [image_source_id(part["image"]) for part in chat[0]["content"] if part["type"] == "image"]
            sample = {
                "row": numbers[place],
                "question_id": str(row.get("question_id", row.get("id"))),
                "unit": questions.units[numbers[place]],
                "categories": questions.benchmark.categories(row),
                "prompt": questions.prompts[numbers[place]],
                "answer": answer.text.strip(),
                "target": questions.target(row),
                "score": questions.score(row, answer.text.strip()),
                "images": images,
                "in_bank": bank is not None and any(len(bank.ids_of(image)) for image in images),
                "neighbours": [{name: found.get(name) for name in NEIGHBOUR.names} for found in answer.neighbours],
            }
            samples.append(sample)
    return sorted(gather_object(samples), key=lambda sample: sample["row"])


def weights_sha256(model: PreTrainedModel) -> str:
    """Return a hash of a model's weights and settings, but not of where they are."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "memory_bank", "memory_bank_revision", "transformers_version"):
        config.pop(name, None)
    content = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()
