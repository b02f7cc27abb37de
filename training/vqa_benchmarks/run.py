"""Runs of the benchmarks: a checkpoint answers, with one bank, another or none; what is on disk is not asked again."""

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...modeling_tinyalign import MemoryBank, TinyAlignConfig
from ...modeling_tinyalign.row_encoder import image_source_id
from ...processing.images import decode_image
from ..data.features import hash_weights
from ..disk import save_file
from ..hub.run_facts import versions
from ..models import load_to_answer
from .answering import answer_chats, batches_by_length
from .report import write_comparison, write_results_card
from .samples import NEIGHBOUR, file_name, is_answered, samples_path, save_samples
from .tasks import Questions

REVISIONS = "revisions.json"  # commits of the data, by repository: the first run writes it, later ones obey
MAX_DEPTH = 32  # of the folders that a variant is named by, where their last names are the same
IMAGE_NAME = re.compile(r"(?:.*/)?(?:[A-Za-z][\w-]*?)?(\d+)(?:\.[A-Za-z]+)?\s*")
ANSWERING_PACKAGES = ("tinyalign-vlm", "lmms-eval", "transformers", "torch", "datasets")


@dataclass(frozen=True)
class Variant:
    """A way in which a checkpoint answers.

    Attributes:
        bank: folder or repository, None for the one that the config names.
        shuffled: every key of the bank leads to another row: the control.
    """

    checkpoint: str
    bank: str | None = None
    memory: str = "on"
    shuffled: bool = False
    name: str = ""

    def named(self, depth: int) -> "Variant":
        """Return it with a name of the last `depth` names of its paths: what is above them is this machine's."""
        paths = [Path(path).resolve() for path in (self.checkpoint, self.bank) if path]
        words = ["/".join(path.parts[-depth:]) for path in paths] + ["shuffled"] * self.shuffled
        return replace(self, name=", ".join([*words, *["memory off"] * (self.memory == "off")]))


def run_command(options: argparse.Namespace):
    """Answer what `tinyalign evaluate` asks for with these options, and report."""
    variants = variants_of(options.model, options.banks, options.memory == "off", options.shuffled, options.against)
    output, asked = Path(options.output), []
    output.mkdir(parents=True, exist_ok=True)
    pinned = output / REVISIONS
    revisions = json.loads(pinned.read_text()) if pinned.exists() else {}
    for name in options.tasks:
        images = image_ids(Path(options.images)) if name == "vqav2_val" else None
        folder, judge = options.data and Path(options.data), options.judge if name == "mmvet" else None
        asked.append(Questions(name, folder, options.limit, images, judge, revisions))
    if revisions and PartialState().is_main_process:
        save_file(pinned, json.dumps(revisions, indent=2).encode())
    run_benchmarks(variants, asked, output, options.batch_size)
    if PartialState().is_main_process:
        paths = [("", samples_path(output, variant.name, name)) for variant in variants for name in options.tasks]
        results = write_comparison(paths, output, options.exclude)
        if options.card:
            write_results_card(Path(options.model), results, variants[0].name)


def image_ids(path: Path) -> set[int]:
    """Return COCO's ids of the images in a list, one a line: `139`, or `val2017/000000000139.jpg`."""
    found = set()
    for number, line in enumerate(path.read_text().splitlines() or [""], 1):
        name = IMAGE_NAME.fullmatch(line)
        if name is None:
            raise ValueError(f"{path}, line {number}, is {line!r}, expected the id or the file name of one image.")
        found.add(int(name[1]))
    return found


def variants_of(
    checkpoint: str,
    banks: Sequence[str] = (),
    memory_off: bool = False,
    shuffled: bool = False,
    against: Sequence[str] = (),
) -> list[Variant]:
    """Return the variants that a command asks for, the one that the others are compared with first.

    Args:
        against: other checkpoints. Those with memory read the first of the banks, or without one their own.

    Raises:
        ValueError: a model has no memory, or no bank; or two variants are the same.
    """
    config = TinyAlignConfig.from_pretrained(checkpoint)
    has_bank = bool(banks) or config.memory_bank is not None
    if config.num_neighbours == 0:
        if memory_off or shuffled or (banks and not against):
            raise ValueError(f"{checkpoint} is a model without memory: leave out --bank, --memory and --shuffled.")
        variants = [Variant(checkpoint)]
    elif not has_bank and (shuffled or not memory_off):
        raise ValueError(f"{checkpoint} retrieves neighbours, but its config names no bank: pass --bank.")
    else:
        named = list(banks) or [None]
        variants = [Variant(checkpoint, bank) for bank in named] * has_bank
        variants += [Variant(checkpoint, named[0], shuffled=True)] * shuffled
        variants += [Variant(checkpoint, memory="off")] * memory_off
    for other in against:
        has_memory = TinyAlignConfig.from_pretrained(other).num_neighbours > 0
        variants += variants_of(other, banks[:1] if has_memory else ())
    for depth in range(1, MAX_DEPTH):  # of a/stage2 and b/stage2 two names, say
        variants = [variant.named(depth) for variant in variants]
        if len({file_name(variant.name) for variant in variants}) == len(variants):
            return variants
    names = [variant.name for variant in variants]
    raise ValueError(f"Variants are called {names}, expected names that differ: name each model and bank once.")


def run_benchmarks(variants: Sequence[Variant], asked: Sequence[Questions], output: Path, batch_size: int = 8):
    """Answer all questions in all ways, and write the answers that `output` does not have yet.

    A file of answers counts if weights, bank, prompts and settings are those of now. Several processes share the work.
    """
    checkpoint, model, state = None, None, PartialState(cpu=not torch.cuda.is_available())
    for variant in variants:
        if variant.checkpoint != checkpoint:
            model = None  # two may not fit
            checkpoint, device = variant.checkpoint, "auto" if state.num_processes == 1 else str(state.device)
            model, processor = load_to_answer(checkpoint, memory="off", device=device)
            weights = weights_sha256(model, processor)
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
                "key_space": bank and bank.config.key_encoder.key_space,
                "is_whole": len(questions.numbers) == len(questions.rows),
                "judge": questions.judge,
                "versions": versions(ANSWERING_PACKAGES),
            }
            path = samples_path(output, variant.name, questions.name)
            if is_answered(path, facts, len(questions.numbers)):
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
    lengths = [len(questions.prompts[number]) for number in numbers]  # in letters, near enough to pad little
    shares = list(batches_by_length(lengths, [questions.generation] * len(numbers), batch_size))
    samples = []
    for batch in tqdm(shares[state.process_index :: state.num_processes], desc, unit="batch"):
        rows, chats = zip(*(questions.ask(numbers[place]) for place in batch), strict=True)
        answers = answer_chats(model, processor, chats, questions.generation, memory)
        for place, row, text, found, too_long in zip(batch, rows, *answers, strict=True):
            number, text = numbers[place], text.strip()
            pictures = [value for value in row.values() if isinstance(value, Image.Image)]  # a chat's are RGB
            images = [image_source_id(decode_image(picture)) for picture in pictures]
            sample = {
                "row": number,
                "question_id": str(row.get("question_id", row.get("id"))),
                "unit": questions.units[number],
                "categories": questions.benchmark.categories(row),
                "prompt": questions.prompts[number],
                "answer": text,
                "target": questions.target(row),
                "score": questions.score(row, text),
                "images": images,
                "too_long": too_long,
                "in_bank": bank is not None and any(len(bank.ids_of(image)) for image in images),
                "neighbours": [{name: one.get(name) for name in NEIGHBOUR.names} for one in found],
            }
            samples.append(sample)
    return sorted(gather_object(samples), key=lambda sample: sample["row"])


def weights_sha256(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """Return a hash of a model's weights and of all settings that change its answers, but not of where they are."""
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    for name in ("_name_or_path", "memory_bank", "memory_bank_revision", "transformers_version"):
        config.pop(name, None)
        generation.pop(name, None)
    tokens = processor.tokenizer.backend_tokenizer.to_str()
    settings = [config, generation, processor.to_dict(), processor.chat_template, tokens]
    content = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    hash_weights(content, model)
    return content.hexdigest()
