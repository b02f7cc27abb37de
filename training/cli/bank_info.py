"""`tinyalign bank info`."""

import argparse

from .options import add_bank

SUMMARY = "say what is in it"
HELP = """
Say what is in a bank: rows, sizes, tower, index, what the kept columns hold (sources, licences), and how it came
about.

  tinyalign bank info bank
"""


def add_arguments(parser: argparse.ArgumentParser):
    """Add the bank."""
    add_bank(parser)


def run(arguments: argparse.Namespace):
    """Print what is in the bank."""
    from tinyalign_vlm.training.bank.info import bank_info

    print(bank_info(arguments.bank))
