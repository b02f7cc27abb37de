"""`tinyalign bank view`."""

import argparse

from .options import SEVERAL

SUMMARY = "write a page to look at it with"
HELP = """
Write a page to look at a bank with, for any browser, in one file that needs no network: rows chosen at random, the
nearest neighbours of each and of images of yours, the similarities, and a map of the keys.

  tinyalign bank view bank -o bank.html
  tinyalign bank view bank -o bank.html --row 17 --row 30 --rows 1000
  tinyalign bank view bank -o bank.html --image flute.png --model out/stage1
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("bank", help="its folder or repository")
    parser.add_argument("-o", "--out", default="bank.html", metavar="FILE", help="the page (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=300, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--row", dest="wanted", type=int, metavar="ID", help="this one, too", **SEVERAL)
    parser.add_argument("--image", dest="images", metavar="FILE", help="show its neighbours; needs --model", **SEVERAL)
    parser.add_argument("--model", metavar="MODEL", help="whose vision tower the bank has: folder or repository")
    parser.add_argument("--top_k", type=int, default=5, metavar="K", help="neighbours of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice (default: %(default)s)")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.bank.view import view_bank

    options = vars(arguments)
    view_bank(options.pop("bank"), options.pop("out"), **options)
