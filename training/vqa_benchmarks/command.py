"""`tinyalign evaluate`: its settings checked, its variants answered, its report written."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from loguru import logger

from ...hub_cards.cards import write_card
from ...hub_cards.facts import Evaluation, read_facts
from .benchmarks import BENCHMARKS
from .report import REPORT, write_report
from .run import run_benchmarks, variants_of
from .samples import samples_path
from .tasks import Questions


def evaluate_checkpoint(
    model: str,
    banks: Sequence[str] = (),
    memory: str = "on",
    shuffled: bool = False,
    against: Sequence[str] = (),
    tasks: Sequence[str] = ("gqa",),
    data: str | None = None,
    limit: int | None = None,
    images: str | None = None,
    judge: str | None = None,
    exclude: bool = False,
    card: bool = False,
    batch_size: int = 8,
    output: str = "evaluation",
    **unused,
):
    """Answer the benchmarks `tasks` and report; the arguments are those of `tinyalign evaluate --help`."""
    logger.remove()  # lmms-eval's, which tells of each task at length
    logger.add(sys.stderr, level="WARNING")
    if "mmvet" in tasks and not (judge and os.environ.get("OPENAI_API_KEY")):
        raise ValueError(
            "mmvet is scored by a judge: pass --judge MODEL, and set OPENAI_API_KEY (and OPENAI_BASE_URL)."
        )
    if "vqav2_val" in tasks and images is None:
        raise ValueError(
            "vqav2_val has images of the usual training data: pass --images FILE with the ids of those to ask about, "
            "of COCO's val2017 say, one a line."
        )
    if card and not Path(model).is_dir():
        raise ValueError(
            f"--card writes into a checkpoint's folder, but {model} is none: evaluate it before the push."
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 image or more.")
    variants = variants_of(model, banks, memory == "off", shuffled, against)
    asked = []
    for name in tasks:
        ids = set(map(int, Path(images).read_text().split())) if name == "vqav2_val" else None
        asked.append(Questions(name, data and Path(data), limit, ids, judge if name == "mmvet" else None))
    folder = Path(output)
    run_benchmarks(variants, asked, folder, batch_size)
    if not PartialState().is_main_process:
        return
    paths = [("", samples_path(folder, variant.name, task)) for variant in variants for task in tasks]
    results = write_report(paths, folder, exclude)
    if card:
        write_results_card(Path(model), results, [variant.name for variant in variants if variant.checkpoint == model])
    print(f"{folder / REPORT} has the results.")


def compare_folders(folders: Sequence[Path], output: Path, exclude: bool = False):
    """Report on all variants that folders have, compared with the first one of the first folder."""
    names = [folder.name for folder in folders]
    paths = []
    for number, folder in enumerate(folders):
        found = sorted(folder.glob("samples/*/*.parquet"), key=lambda path: path.stat().st_mtime_ns)
        if not found:
            raise ValueError(f"{folder} has no samples/VARIANT/BENCHMARK.parquet, expected a folder of results.")
        prefix = f"{names[number]}: " if names.count(names[number]) == 1 else f"{names[number]} ({number + 1}): "
        paths += [(prefix, path) for path in found]
    write_report(paths, output, exclude)
    print(f"{output / REPORT} has the results.")


def write_results_card(checkpoint: Path, results: dict[str, dict], own: list[str]):
    """Write the results into the checkpoint's card: a table of all variants, and those of `own` as its model-index."""
    metrics, systems = {}, {}
    for benchmark, result in results.items():
        for name, entry in result["variants"].items():
            if "value" in entry:
                metrics[benchmark] = BENCHMARKS[benchmark].title
                systems.setdefault(name, {})[benchmark] = entry["value"]
    evaluation = Evaluation(
        dataset="lmms-lab-encoder",
        dataset_name="the paper's benchmarks",
        split="test",
        metrics=metrics,
        systems=systems,
        this_model=[name for name in own if name in systems],
    )
    write_card(checkpoint, replace(read_facts(checkpoint), evaluation=evaluation))
