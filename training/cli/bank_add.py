"""`tinyalign bank add`."""

import argparse

from .options import add_row_options

SUMMARY = "add the rows of a data set"
HELP = """
Write a new bank: the rows of a bank, and those of a data set behind them, made with the bank's own encoders.

  tinyalign bank add bank --model out/stage1 --dataset more.parquet --out larger
  tinyalign bank add bank --model out/stage1 --dataset more.json --set license=cc-by-4.0 --set source=mine --out larger

Bad rows, and those whose image is in the bank already (unless --keep_duplicates), are left out; OUT/left_out.jsonl
lists them. The data set must have the columns that the bank keeps, or --set must say what they are. Killed, the same
command goes on where it stopped.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("bank", help="its folder or repository")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    add_row_options(parser)


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.bank.from_files import RowSettings, add_from_files

    options = vars(arguments)
    bank, out, ray = options.pop("bank"), options.pop("out"), options.pop("ray")
    add_from_files(RowSettings(**options), bank, out, ray)
