"""`tinyalign evaluate`."""

import argparse
import os

SUMMARY = "answer the paper's eight benchmarks, and compare with and without memory"
HELP = """
Answer the paper's benchmarks with a checkpoint: with its bank, with others, without, and beside another checkpoint.
lmms-eval asks and scores; DIR/report.md has the numbers, their intervals, and which differences are more than noise.

  tinyalign evaluate out/stage2 --bank bank --limit 8            # eight images of each: to see that it works
  tinyalign evaluate out/stage2 --bank bank --memory off --shuffled   # three variants: the bank, none, a random one
  tinyalign evaluate out/stage2 --bank bank --bank bank-300k --tasks gqa pope mme
  tinyalign evaluate me/model --against out/baseline             # with the bank that its config names
  tinyalign evaluate --compare runs/a runs/b                     # what is on disk; no model is loaded
  torchrun --nproc_per_node 8 -m tinyalign_cli evaluate out/stage2 --bank bank   # 8 GPUs

A variant whose answers are in DIR already is not asked again: the same command goes on from where it was stopped.
--card replaces the results that the checkpoint's card has.
The default is all but MM-Vet (mmvet), which needs --judge, and VQAv2 (vqav2_val, vqav2_testdev). Install it with
pip install tinyalign-vlm[eval] and then pip install --no-deps lmms-eval==0.7.3. docs/evaluation.md says what it costs.
"""
USUAL_BENCHMARKS = ("gqa", "pope", "mme", "scienceqa", "textvqa", "textvqa_without_ocr", "mmmu")
OTHER_BENCHMARKS = ("mmvet", "vqav2_val", "vqav2_testdev")


def add_arguments(parser: argparse.ArgumentParser):
    several = {"action": "append", "default": []}
    parser.add_argument("model", nargs="?", metavar="CHECKPOINT", help="folder or repository")
    parser.add_argument("--bank", dest="banks", metavar="BANK", **several, help="a memory bank; may be repeated")
    parser.add_argument("--memory", choices=("on", "off"), default="on", help="off: also answer without retrieval")
    parser.add_argument("--shuffled", action="store_true", help="also answer with the bank's keys shuffled")
    parser.add_argument("--against", metavar="CHECKPOINT", **several, help="also ask this one; may be repeated")
    names = {"choices": (*USUAL_BENCHMARKS, *OTHER_BENCHMARKS), "default": USUAL_BENCHMARKS, "metavar": "NAME"}
    parser.add_argument("--tasks", nargs="+", **names, help=f"of {', '.join(names['choices'])}")
    parser.add_argument("--data", metavar="FOLDER", help="NAME.parquet files (default: lmms-lab-encoder's on the Hub)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask about N images of each; N a category of MME")
    parser.add_argument("--images", metavar="FILE", help="ids or file names of images, one a line: vqav2_val's")
    parser.add_argument("--judge", metavar="MODEL", help="of mmvet, asked at OPENAI_BASE_URL with OPENAI_API_KEY")
    parser.add_argument("--exclude", action="store_true", help="leave out questions about an image that a bank has")
    parser.add_argument("--card", action="store_true", help="write the results into the checkpoint's card")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="(default: evaluation, with --compare comparison)")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="report on folders of answers; no model is loaded")


def run(arguments: argparse.Namespace):
    from pathlib import Path

    check(arguments)
    if arguments.output is None:
        arguments.output = "comparison" if arguments.compare else "evaluation"
    if arguments.compare:
        from tinyalign_vlm.training.vqa_benchmarks.report import compare_folders

        compare_folders(list(map(Path, arguments.compare)), Path(arguments.output), arguments.exclude)
        return
    from tinyalign_vlm.training.vqa_benchmarks.run import run_command

    run_command(arguments)


def check(arguments: argparse.Namespace):
    """Refuse what cannot be done before anything is loaded."""
    model, tasks = arguments.model, arguments.tasks
    if (model is None) == (arguments.compare is None):
        raise ValueError("evaluate needs a checkpoint, or --compare with folders of answers: one of them.")
    if arguments.compare:
        usual = {"memory": "on", "tasks": USUAL_BENCHMARKS, "batch_size": 8}
        options = vars(arguments) | {"bank": arguments.banks}
        names = "bank memory shuffled against tasks data limit images judge card batch_size".split()
        given = [name for name in names if options[name] and options[name] != usual.get(name)]
        if given:
            raise ValueError(f"--compare reads what is on disk: leave out --{', --'.join(given)}.")
    if "mmvet" in tasks and not (arguments.judge and os.environ.get("OPENAI_API_KEY")):
        raise ValueError("mmvet is scored by a judge: pass --judge MODEL, and set OPENAI_API_KEY and OPENAI_BASE_URL.")
    if arguments.images is not None and "vqav2_val" not in tasks:
        raise ValueError("--images are those of vqav2_val: leave it out, or add vqav2_val to --tasks.")
    if "vqav2_val" in tasks and arguments.images is None:
        raise ValueError(
            "vqav2_val has images that the usual training data have, too: pass --images FILE with those to ask about. "
            "COCO's val2017 has none of train2017, which LLaVA's data name: ls val2017 > FILE."
        )
    for name, unit in (("limit", "image"), ("batch_size", "question")):
        value = vars(arguments)[name]
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected 1 {unit} or more.")
    if not arguments.card:
        return
    narrowed = [f"--{name}" for name in ("limit", "exclude", "data", "images") if vars(arguments)[name]]
    if narrowed:
        raise ValueError(f"card is for whole benchmarks of the Hub: leave it out, or {', '.join(narrowed)}.")
    if not os.path.isfile(os.path.join(arguments.model, "card_facts.json")):  # its README.md would be overwritten
        raise ValueError(f"card is made of card_facts.json, which {arguments.model} lacks: leave out --card.")
    if set(arguments.tasks) == {"vqav2_testdev"}:
        raise ValueError("card is for scores, and only EvalAI has those of vqav2_testdev: leave out --card.")
