"""Options that several commands have."""

import argparse

# An option that takes several values and may be repeated.
SEVERAL = {"nargs": "+", "action": "extend", "default": []}


def add_model_to_ask(parser: argparse.ArgumentParser):
    """Add the model that answers, its bank, and where it runs."""
    parser.add_argument("model", help="folder or Hub repository of a TinyAlign model with its processor")
    parser.add_argument("--revision", default="main", help="of the model's repository (default: %(default)s)")
    parser.add_argument("--memory_bank", metavar="BANK", help="folder or repository (default: what the config names)")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ... (default: %(default)s)")


def add_row_options(parser: argparse.ArgumentParser):
    """Add the fields of `RowSettings`, and `--ray`."""
    parser.add_argument(
        "--ray",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="on a Ray cluster, with N actors (no N: one for each GPU)",
    )
    group = parser.add_argument_group("the model, whose vision tower makes the keys")
    group.add_argument("--model", metavar="MODEL", help="a TinyAlign checkpoint: folder or repository; or")
    group.add_argument("--vision_model", metavar="MODEL", help="a vision tower and")
    group.add_argument("--language_model", metavar="MODEL", help="a language model, to compose one, with")
    group.add_argument("--model_kwargs", metavar="JSON", help='fields of its config: {"num_latents": 8}')
    group.add_argument("--batch_size", type=int, metavar="N", help="images at once (default: 8 on a CPU, else 64)")
    group = parser.add_argument_group("the data set")
    group.add_argument("--dataset", required=True, metavar="DATA", help="files, folder or repository")
    group.add_argument("--dataset_config", metavar="NAME", help="of a repository")
    group.add_argument("--dataset_revision", metavar="REVISION", help="of a repository: branch, tag or commit")
    group.add_argument(
        "--dataset_split", default="train", metavar="SPLIT", help="of a folder or repository (default: %(default)s)"
    )
    group.add_argument("--image_folder", metavar="DIR", help="what paths of images are relative to")
    group.add_argument("--image_column", metavar="COLUMN", help="images or paths (default: image or images)")
    group.add_argument("--caption_column", metavar="COLUMN", help="(default: caption or txt, else the chat's answer)")
    group.add_argument("--messages_column", metavar="COLUMN", help="(default: messages or conversations)")
    group.add_argument("--set", metavar="COLUMN=VALUE", help="a column of all rows", **SEVERAL)
    group.add_argument("--rows", type=int, metavar="N", help="choose N rows at random (default: all)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: %(default)s)")
    group.add_argument("--keep_duplicates", action="store_true", help="do not leave out images that come again")
