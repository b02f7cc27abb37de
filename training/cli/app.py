"""`tinyalign app`."""

import argparse

from .options import add_model_to_ask

SUMMARY = "ask, teach and look into the memory in a browser"
HELP = """
Open a page in the browser, on this machine alone, to see what a model with a memory does:

  Ask    about a picture: uploaded, pasted, from the webcam or one of eight. The answer with memory stands beside the
         one without, and below them the examples that it rests on. Click one: it is left out, and the question asked
         again.
  Teach  a new thing with one picture and one line, or many with a zip file or folder with a CSV (image,caption). It is
         known at once, nothing is trained, and it can be forgotten. Save the bank, or push it to the Hub.
  Bank   search captions, search by picture, see where the keys lie and how similar they are.

  tinyalign app demo/checkpoint --memory_bank demo/bank_with_heldout
  tinyalign app org/model                                  # the bank that its config names, at its commit
  tinyalign app demo/checkpoint --memory_bank bank --port 7861 --visitors_may teach

Everybody who opens the page has lessons of their own, in memory alone and until the page is closed. Where only this
machine can open the page, visitors may save banks, in new folders below the current one, and push them by your token.
With another --host they may only ask, unless --visitors_may says more; there is no password: put a proxy that has one
in front. No code of the checkpoint is run and no URL is fetched. Needs the extra `app`: pip install tinyalign-vlm[app]
"""


def add_arguments(parser: argparse.ArgumentParser):
    add_model_to_ask(parser)
    parser.add_argument(
        "--visitors_may",
        choices=("ask", "teach", "save"),
        help="save: also save and push banks (default: save on this machine alone, else ask)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.inference.app import start_app

    start_app(**vars(arguments))
