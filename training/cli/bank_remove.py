"""`tinyalign bank remove`."""

import argparse

from .options import SEVERAL

SUMMARY = "remove rows"
HELP = """
Write a new bank without some rows of another one, to answer a request for deletion say: by the picture, its name, or
what the columns hold.

  tinyalign bank remove bank --out smaller --source-id 8849bc47e2dd1229ea8bbff4d44364ac
  tinyalign bank remove bank --out smaller --image flute.png                       # the same pixels, in any format
  tinyalign bank remove bank --out smaller --where source=flickr --where license=   # of flickr, and without a licence
  tinyalign bank remove bank --out smaller --where "caption~telephone"

A condition is COLUMN=VALUE (the whole text; nothing: empty or missing) or COLUMN~TEXT (somewhere in it). Several
--where must all be true. Rows that --source-id or --image names go as well, whatever --where says. The other rows are
numbered anew. BANK itself is not changed: delete it when the new one is good. On the Hub, docs/hub.md says how.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("bank", help="its folder or repository")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    parser.add_argument(
        "--source-id", "--source_id", dest="source_ids", metavar="ID", help="names of images", **SEVERAL
    )
    parser.add_argument("--image", dest="images", metavar="FILE", help="pictures of rows to remove", **SEVERAL)
    parser.add_argument("--where", metavar="CONDITION", help="COLUMN=VALUE or COLUMN~TEXT", **SEVERAL)


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.bank.changes import remove_rows

    remove_rows(arguments.bank, arguments.out, arguments.source_ids, arguments.images, arguments.where)
