"""`tinyalign data check`."""

import argparse
import sys

SUMMARY = "say which rows cannot be trained on"
HELP = """
Say which rows cannot be trained on, and why: a line for each kind. `tinyalign train` does the same before its first
step; it skips and counts these rows, or stops with --strict.

  tinyalign data check chats.json --image_folder images            # all but the length of the rows
  tinyalign data check chats.json --output_dir out                 # out/bad_rows.json names every bad row
  tinyalign data check stage1.yaml qwen2-0.5b-siglip.yaml          # as `tinyalign train` would with these files

JSON, JSON lines, CSV, TSV, Parquet, WebDataset (.tar), a folder or a Hub repository, of rows with

  image, conversations       LLaVA's: turns with `from` and `value`; <image> anywhere in a question
  images, messages           TRL's: turns with `role` and `content`, text or a list of text and image parts
  images, prompt, completion
  images, texts              the Cauldron's: pairs of `user` and `assistant`
  image, and any column with answers to one prompt: --answer_column caption --prompt "Describe the image."

Rows may have several images, or none. The exit status is 1 if a row is bad.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.usage = "tinyalign data check DATASET | FILE.yaml [FILE.yaml ...] [--FIELD VALUE ...]"


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.data.check import check_data

    found = check_data(arguments.files, arguments.fields)
    print(*found.lines(), found, sep="\n")
    if found.problems:
        sys.exit(1)
