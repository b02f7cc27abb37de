"""`tinyalign neighbours`."""

import argparse

SUMMARY = "look up the neighbours of a data set's images, once"
HELP = """
Look up the neighbours of a data set's images in the memory bank, once: `tinyalign train` with the same files finds
them again, in this run and in others. Otherwise it does this itself, before its first step.

  tinyalign neighbours stage1.yaml qwen2-0.5b-siglip.yaml              # takes all that `tinyalign train` takes
  torchrun --nproc_per_node 8 -m tinyalign_cli neighbours stage1.yaml     # 8 GPUs

They are a Parquet file under HF_HOME/tinyalign/neighbours, named by the fingerprints of the data and of the bank: for
each image source_id, own_rows (rows of the bank that are the image itself and were left out), memory_ids and
memory_scores, best first, twice as many as the model reads. A run that is killed goes on where it stopped.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.usage = "tinyalign neighbours FILE.yaml [FILE.yaml ...] [--FIELD VALUE ...]"


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.data.preparation import find_neighbours_from_files

    find_neighbours_from_files(arguments.files, arguments.fields)
