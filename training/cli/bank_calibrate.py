"""`tinyalign bank calibrate`."""

import argparse

SUMMARY = "find out how probably a neighbour is right, and that none is"
HELP = """
Find out how probably a neighbour is right, and that none is, by how similar they are, on rows whose answers say what
is right. It is kept with the bank, a folder, and model.retrieve() gives the probabilities from then on.

  tinyalign bank calibrate stage2.yaml --model out/stage2              # takes all that `tinyalign train` takes
  tinyalign bank calibrate stage2.yaml --dataset validation.json --min_agreement 0.5
  tinyalign bank calibrate stage2.yaml --model out/stage2 --min_probability 0.2

A neighbour is right if the words of its caption agree with the row's answer by --min_agreement, 0 (no word shared) to
1 (the same words, the default). An image's own rows of the bank are left out. With --min_probability the model's
retrieval_threshold is set as well, the similarity below which it does without a neighbour: see docs/keys.md.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.usage = "tinyalign bank calibrate FILE.yaml [FILE.yaml ...] [--min_agreement SHARE] [--FIELD VALUE ...]"
    parser.add_argument(
        "--min_agreement", type=float, default=1.0, metavar="SHARE", help="of a right neighbour's words"
    )
    parser.add_argument("--min_probability", type=float, metavar="P", help="of a neighbour that the model reads")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.bank.calibration import calibrate_from_files

    calibrate_from_files(arguments.files, arguments.fields, arguments.min_agreement, arguments.min_probability)
