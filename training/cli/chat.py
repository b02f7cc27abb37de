"""`tinyalign chat`."""

import argparse

from .options import add_model_to_ask

SUMMARY = "ask about pictures in a terminal, and teach new ones"
HELP = """
Ask about a picture in a terminal, see the remembered examples that an answer rests on, and teach new ones.

  tinyalign chat demo/checkpoint --memory_bank demo/bank_with_heldout --image demo/query.png
  tinyalign chat org/model                                # the bank that its config names, at its commit

In the chat, /image PATH shows a picture, /teach PATH LINE remembers one by a line, at once and without training, and
/help lists the other commands. What is taught is in memory alone, until /save DIR writes a new bank. The history
of what was typed ends with the chat.

With a question it prints the answer alone, with --sources as JSON with the examples:

  tinyalign chat demo/checkpoint --memory_bank demo/bank_with_heldout --image demo/query.png "What is this?"
"""


def add_arguments(parser: argparse.ArgumentParser):
    add_model_to_ask(parser)
    parser.add_argument("question", nargs="?", help="print the answer and end")
    parser.add_argument("--image", metavar="PATH", help="the picture to begin with")
    parser.add_argument("--sources", action="store_true", help="show the examples that answers rest on")
    parser.add_argument("--memory", choices=("on", "off"), default="on", help="off: without retrieval")
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="of an answer (default: %(default)s)"
    )


def run(arguments: argparse.Namespace):
    from tinyalign_vlm.training.inference.chat import chat

    chat(**vars(arguments))
