"""`tinyalign bank merge`."""

import argparse

from .options import add_out

SUMMARY = "make one bank of several"
HELP = """
Make one bank of several that were made with the same encoders (`bank build --like`, `add`, `remove`, or parts of one).

  tinyalign bank merge bank more others --out all

Of an image that several of them have, the rows of the first bank are taken (--keep_duplicates: all). The
new bank is quantized if the first one is.
"""


def add_arguments(parser: argparse.ArgumentParser):
    """Add the banks, and where the new one goes."""
    parser.add_argument("banks", nargs="+", metavar="BANK", help="their folders")
    add_out(parser)
    parser.add_argument("--keep_duplicates", action="store_true", help="also images that an earlier bank has")


def run(arguments: argparse.Namespace):
    """Write the new bank."""
    from tinyalign_vlm.training.bank.merge import merge_banks

    merge_banks(arguments.banks, arguments.out, arguments.keep_duplicates)
