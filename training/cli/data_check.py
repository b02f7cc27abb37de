"""`tinyalign data check`."""

import argparse
import sys

SUMMARY = "name every row that cannot be trained on"
HELP = """
Name every row that cannot be trained on, and why. `tinyalign train` does the same before its first step; it skips
and counts these rows, or stops with --strict.

  tinyalign data check chats.json --image_folder images            # all but the length of the rows
  tinyalign data check stage1.yaml qwen2-0.5b-siglip.yaml          # as `tinyalign train` would with these files

JSON, JSON lines, Parquet, WebDataset (.tar), a folder or a Hub repository, of rows with

  image, conversations       LLaVA's: turns with `from` and `value`; <image> anywhere in a question
  images, messages           TRL's: turns with `role` and `content`, text or a list of text and image parts
  images, prompt, completion
  image, and any column with answers to one prompt: --answer_column caption --prompt "Describe the image."

Rows may have several images, or none. The exit status is 1 if a row is bad.
"""


def add_arguments(parser: argparse.ArgumentParser):
    """Say that files and fields are taken, which main.py reads."""
    parser.usage = "tinyalign data check DATASET | FILE.yaml [FILE.yaml ...] [--FIELD VALUE ...]"


def run(arguments: argparse.Namespace):
    """Print the bad rows and their number; the exit status is 1 if there is one."""
    from tinyalign_vlm.training.data.check import check_data

    found = check_data(arguments.files, arguments.fields)
    print(*found.lines(), found, sep="\n")
    if found.problems:
        sys.exit(1)
