"""`tinyalign bank verify`."""

import argparse
import sys

SUMMARY = "name all that is wrong with it"
HELP = """
Read a bank from end to end and name each problem: rows that are missing, numbers that are not finite, sha256 that
differ, encoders, and whether this machine's index has the keys of the bank. The exit status is 1 if there is one.

  tinyalign bank verify bank
  tinyalign bank verify bank --model out/stage1       # is it of this model's vision tower?
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("bank", help="its folder or repository")
    parser.add_argument("--model", metavar="MODEL", help="must have the tower of the bank: folder or repository")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm import TinyAlignForConditionalGeneration
    from tinyalign_vlm.training.bank.verify import bank_problems

    model = None
    if arguments.model is not None:
        model = TinyAlignForConditionalGeneration.from_pretrained(arguments.model)
    problems = list(bank_problems(arguments.bank, model))
    print(*problems or [f"{arguments.bank}: OK"], sep="\n")
    if problems:
        sys.exit(1)
