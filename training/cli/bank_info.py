"""`tinyalign bank info`."""

import argparse

SUMMARY = "say what is in it"
HELP = """
Say what is in a bank: rows, sizes, tower, index, calibration, hashes, and what the kept columns hold (sources,
licences).

  tinyalign bank info bank
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("bank", help="its folder or repository")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.bank.info import bank_info

    print(bank_info(arguments.bank))
