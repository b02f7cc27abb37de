"""`tinyalign push`."""

import argparse

SUMMARY = "push a checkpoint and its memory bank to the Hub"
HELP = """
Push a checkpoint, its memory bank, or both to the Hub, with the cards that their folders have the facts for.

  tinyalign push model org/model --bank bank org/bank     # the bank first; the model names it at that commit
  tinyalign push model org/model                          # the model names the bank that its config names
  tinyalign push --bank bank org/bank
  tinyalign push model org/model --space org/demo         # and a Space to chat with it, at that commit

You must be logged in (hf auth login), or HF_TOKEN be set.
"""


def add_arguments(parser: argparse.ArgumentParser):
    parser.usage = (
        "tinyalign push [FOLDER REPOSITORY] [--bank FOLDER REPOSITORY] [--space REPOSITORY] [--private] "
        "[--revision BRANCH]"
    )
    parser.add_argument("model", nargs="*", metavar="FOLDER REPOSITORY", help="the checkpoint with its processor")
    parser.add_argument("--bank", nargs=2, metavar=("FOLDER", "REPOSITORY"), help="the memory bank")
    parser.add_argument("--space", metavar="REPOSITORY", help="a demo Space for the checkpoint")
    parser.add_argument("--private", action="store_true", default=None, help="new repositories are private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to push to (default: main)")


def run(arguments: argparse.Namespace):
    if len(arguments.model) not in (0, 2) or not (arguments.model or arguments.bank):
        raise ValueError(
            f"push has {' '.join(arguments.model) or 'nothing to push'}, expected the checkpoint's folder and its "
            "repository, or --bank with the bank's folder and its repository, or both."
        )
    from tinyalign_vlm.training.disk import full_disk_advice
    from tinyalign_vlm.training.hub.push import push as push_to_hub

    folders = " and ".join([*arguments.model[:1], *(arguments.bank or [])[:1]])
    with full_disk_advice(folders, "what is pushed"):
        push_to_hub(arguments.model or None, arguments.bank, arguments.private, arguments.revision, arguments.space)
