"""`tinyalign bank lance`."""

import argparse

from .options import SEVERAL

SUMMARY = "write it to a LanceDB database"
HELP = """
Write a bank to a LanceDB database, to be searched and read where it lies: on a disk or in an object store, larger than
memory (pip install tinyalign-vlm[lance]; docs/scale.md says from which size on).

  tinyalign bank lance bank out/lance
  tinyalign bank lance bank s3://bucket/bank --storage_option region=eu-west-1

  from tinyalign_vlm.training.bank.lance import LanceBank
  model.attach_memory_bank(LanceBank.from_pretrained("s3://bucket/bank", {"region": "eu-west-1"}))

BANK is a folder or a Hub repository. Credentials are looked for where LanceDB does: AWS_ACCESS_KEY_ID and the like.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("bank", help="its folder or repository")
    parser.add_argument("uri", help="the database: a folder, s3://..., gs://... or az://...")
    parser.add_argument("--storage_option", metavar="NAME=VALUE", help="of LanceDB, for an object store", **SEVERAL)
    parser.add_argument("--index", help="exact, IVF_RQ or IVF_SQ (default: by the number of rows)")


def run(arguments: argparse.Namespace):
    settings = {}
    for option in arguments.storage_option:
        name, equals, value = option.partition("=")
        if not name or not equals:
            raise ValueError(f"--storage_option is {option!r}, expected NAME=VALUE, region=eu-west-1 say.")
        settings[name] = value
    from tinyalign_vlm import MemoryBank
    from tinyalign_vlm.training.bank.lance import write_lance

    bank = MemoryBank.from_pretrained(arguments.bank)
    print(f"{arguments.uri}: {write_lance(bank, arguments.uri, settings or None, arguments.index)}")
