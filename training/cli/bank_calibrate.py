"""`tinyalign bank calibrate`."""

import argparse

SUMMARY = "choose the similarity below which neighbours are not used"
HELP = """
Choose retrieval_threshold, the similarity below which a model does without a neighbour: print how much the captions of
training rows' neighbours agree with the rows' answers, against similarity, and set it in the config of `model`.

  tinyalign bank calibrate stage2.yaml --model out/stage2              # takes all that `tinyalign train` takes
  tinyalign bank calibrate stage2.yaml --model out/stage2 --min_agreement 0.5

A neighbour must be expected to agree by --min_agreement, 0 (no word shared) to 1 (the same words). The default is
half-way from chance to what the most similar tenth of the neighbours has. Train with memory_dropout, so that the model
can do without neighbours: see docs/method.md.
"""


def add_arguments(parser: argparse.ArgumentParser):
    """Add the agreement that is asked for, beside the files and fields that main.py reads."""
    parser.usage = "tinyalign bank calibrate FILE.yaml [FILE.yaml ...] [--min_agreement SHARE] [--FIELD VALUE ...]"
    parser.add_argument("--min_agreement", type=float, metavar="SHARE", help="expected of a neighbour, 0 to 1")


def run(arguments: argparse.Namespace):
    """Print how agreement depends on similarity, and set the model's threshold."""
    from tinyalign_vlm.training.bank.calibration import calibrate_from_files

    calibrate_from_files(arguments.files, arguments.fields, arguments.min_agreement)
