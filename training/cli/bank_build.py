"""`tinyalign bank build`."""

import argparse

from .options import add_row_options

SUMMARY = "build a bank of a data set"
HELP = """
Build a memory bank of the images of a data set and their captions.

  tinyalign bank build --model out/stage1 --dataset pairs.parquet --out bank
  tinyalign bank build --model org/model --dataset chats.json --image_folder images --rows 100000 --out bank
  tinyalign bank build --vision_model google/siglip-base-patch16-224 \\
      --language_model HuggingFaceTB/SmolLM2-135M-Instruct --dataset "shards/*.tar" --keep source license --out bank
  tinyalign bank build --model out/stage1 --dataset more.parquet --like bank --out more     # can be merged with bank

The data set: JSON, JSON lines, Parquet or WebDataset (.tar) files, a folder, or a Hub repository (pin it with
--dataset_revision), in the formats of `tinyalign data check --help`. A row is an image with its caption: the column
`caption`, `txt` or --caption_column, or else the first answer of the row's chat. Nothing is copied; local files are
read once before, to count the rows.

Rows that are bad, or whose image another row has, pixel for pixel, are left out, counted, and listed in
OUT/left_out.jsonl. Killed, the same command goes on where it stopped, and ends with the same bank, byte for byte (on
the same machine; what is done so far is in .OUT.build beside it). OUT is there when it is complete, and not before.

A large bank is quantized: keys of 16 bits and values of 8, which halves it (docs/bank_speed.md). --quantized true does
so with a small bank too, --quantized false keeps all bits.
`add`, `remove` and `merge` keep it as it is.

--ray encodes on a Ray cluster, that of RAY_ADDRESS or else this machine (docs/building_on_a_cluster.md); the bank is
the same.

A model that reads latents (its memory_input is "latents" or "both"; by default it is "captions") needs values, made by
a value encoder: that of --like or --value_encoder, or a new one, trained first on 1,024 images of the data set.
"""

QUANTIZED_HELP = (
    "true: keys rounded to 16 bits and values to 8, half the disk and memory; false: 32 and 16 bits, nothing is "
    "rounded (default: true above 20,000 rows; with --like as that bank is)"
)


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    add_row_options(parser)
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="keep these columns: source, license")
    parser.add_argument("--like", metavar="BANK", help="with the encoders, columns and thumbnail size of this bank")
    parser.add_argument("--value_encoder", metavar="BANK", help="use that of this bank, or of a folder, with new keys")
    parser.add_argument(
        "--value_encoder_steps", type=int, default=1000, metavar="N", help="to train a new one (default: %(default)s)"
    )
    parser.add_argument("--key_grid", type=int, default=1, metavar="N", help="keys of N x N cells (default: 1)")
    parser.add_argument("--whiten_dim", type=int, metavar="N", help="whiten keys to N dimensions (default: do not)")
    parser.add_argument("--quantized", type=str.lower, choices=("true", "false"), help=QUANTIZED_HELP)
    parser.add_argument(
        "--thumbnail_size", type=int, default=64, metavar="PIXELS", help="0: keep none (default: %(default)s)"
    )


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.bank.from_files import BuildSettings, build_from_files

    options = vars(arguments)
    out, ray = options.pop("out"), options.pop("ray")
    options["quantized"] = {"true": True, "false": False, None: None}[arguments.quantized]
    build_from_files(BuildSettings(**options), out, ray)
