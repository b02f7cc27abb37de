"""`tinyalign bank merge`."""

import argparse

SUMMARY = "make one bank of several"
HELP = """
Make one bank of several that were made with the same encoders (`bank build --like`, `add`, `remove`, or parts of one).

  tinyalign bank merge bank more others --out all

Of an image that several of them have, the rows of the first bank are taken (--keep_duplicates: all). The
new bank is quantized if the first one is.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("banks", nargs="+", metavar="BANK", help="their folders")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    parser.add_argument("--keep_duplicates", action="store_true", help="also images that an earlier bank has")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.bank.merge import merge_banks

    merge_banks(arguments.banks, arguments.out, arguments.keep_duplicates)
