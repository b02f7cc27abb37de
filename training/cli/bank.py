"""The command line of memory banks: `tinyalign bank build`, `add` and what else there is."""

import argparse
import sys

BUILD_HELP = """
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

A large bank is quantized: keys of 16 bits and values of 8, which halves it and moves a trained model's loss by less
than 0.1% (docs/bank_speed.md). --quantized true does so with a small bank too, --quantized false keeps all bits.
`add`, `remove` and `merge` keep it as it is.

--ray encodes on a Ray cluster, that of RAY_ADDRESS or else this machine (docs/building_on_a_cluster.md); the bank is
the same.

Values are made by a value encoder: that of --like or --value_encoder, or a new one, trained first on captions of the
data set (docs/value_encoder.md).
"""

QUANTIZED_HELP = (
    "true: keys rounded to 16 bits and values to 8, half the disk and memory; false: 32 and 16 bits, nothing is "
    "rounded (default: true above 20,000 rows; with --like as that bank is)"
)

ADD_HELP = """
Write a new bank: the rows of a bank, and those of a data set behind them, made with the bank's own encoders.

  tinyalign bank add bank --model out/stage1 --dataset more.parquet --out larger
  tinyalign bank add bank --model out/stage1 --dataset more.json --set license=cc-by-4.0 --set source=mine --out larger

Bad rows, and those whose image is in the bank already (unless --keep_duplicates), are left out; OUT/left_out.jsonl
lists them. The data set must have the columns that the bank keeps, or --set must say what they are. Killed, the same
command goes on where it stopped.
"""

REMOVE_HELP = """
Write a new bank without some rows of another one, to answer a request for deletion say: by the picture, its name, or
what the columns hold.

  tinyalign bank remove bank --out smaller --source-id 8849bc47e2dd1229ea8bbff4d44364ac
  tinyalign bank remove bank --out smaller --image flute.png                       # the same pixels, in any format
  tinyalign bank remove bank --out smaller --where source=flickr --where license=   # of flickr, and without a licence
  tinyalign bank remove bank --out smaller --where "caption~telephone"

A condition is COLUMN=VALUE (the whole text; nothing: empty or missing) or COLUMN~TEXT (somewhere in it). Several
--where must all be true; with --source-id or --image, rows that either is true of go. The other rows are numbered
anew. BANK itself is not changed: delete it when the new one is good. On the Hub, docs/hub.md says how.
"""

MERGE_HELP = """
Make one bank of several that were made with the same encoders (`bank build --like`, `add`, `remove`, or parts of one).

  tinyalign bank merge bank more others --out all

Of an image that several of them have, the rows of the first bank are taken (--keep_duplicates: all). The
new bank is quantized if the first one is.
"""

VERIFY_HELP = """
Read a bank from end to end and name each problem: rows that are missing, numbers that are not finite, sha256 that
differ, encoders, and whether this machine's index has the keys of the bank. The exit status is 1 if there is one.

  tinyalign bank verify bank
  tinyalign bank verify bank --model out/stage1       # is it of this model's vision tower?
"""

INFO_HELP = """
Say what is in a bank: rows, sizes, tower, index, what the kept columns hold (sources, licences), and how it came
about.

  tinyalign bank info bank
"""

VIEW_HELP = """
Write a page to look at a bank with, for any browser, in one file that needs no network: rows chosen at random, the
nearest neighbours of each and of images of yours, the similarities, and a map of the keys.

  tinyalign bank view bank -o bank.html
  tinyalign bank view bank -o bank.html --row 17 --row 30 --rows 1000
  tinyalign bank view bank -o bank.html --image flute.png --model out/stage1
"""

LANCE_HELP = """
Write a bank to a LanceDB database, to be searched and read where it lies: on a disk or in an object store, larger than
memory (pip install tinyalign-vlm[lance]; docs/scale.md says from which size on).

  tinyalign bank lance bank out/lance
  tinyalign bank lance bank s3://bucket/bank --storage_option region=eu-west-1

  from tinyalign_vlm.training.bank.lance import LanceBank
  model.attach_memory_bank(LanceBank.from_pretrained("s3://bucket/bank", {"region": "eu-west-1"}))

BANK is a folder or a Hub repository. Credentials are looked for where LanceDB does: AWS_ACCESS_KEY_ID and the like.
"""


def add_bank_commands(commands: argparse._SubParsersAction, calibrate_help: str) -> argparse.ArgumentParser:
    """Puts the commands into the parser of `tinyalign bank`; returns that of `calibrate`, which main.py runs."""

    def command(name: str, help: str, description: str, **more) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=help, description=description, formatter_class=formatter, **more)

    build = command("build", "build a bank of a data set", BUILD_HELP)
    build.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    _add_row_options(build)
    build.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="keep these columns: source, license")
    build.add_argument(
        "--like",
        metavar="BANK",
        help="use the encoders, columns and thumbnail size of this bank: folder or repository",
    )
    build.add_argument("--value_encoder", metavar="BANK", help="use that of this bank, or of a folder, with new keys")
    build.add_argument(
        "--value_encoder_steps", type=int, default=1000, metavar="N", help="to train a new one (default: %(default)s)"
    )
    build.add_argument("--key_grid", type=int, default=1, metavar="N", help="keys of N x N cells (default: 1)")
    build.add_argument("--whiten_dim", type=int, metavar="N", help="whiten keys to N dimensions (default: do not)")
    build.add_argument("--quantized", type=_boolean, metavar="true|false", help=QUANTIZED_HELP)
    build.add_argument(
        "--thumbnail_size", type=int, default=64, metavar="PIXELS", help="0: keep none (default: %(default)s)"
    )
    add = command("add", "add the rows of a data set", ADD_HELP)
    add.add_argument("bank", help="its folder or repository")
    add.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    _add_row_options(add)
    remove = command("remove", "remove rows", REMOVE_HELP)
    remove.add_argument("bank", help="its folder or repository")
    remove.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    names = {"nargs": "+", "action": "extend", "default": []}
    remove.add_argument("--source-id", "--source_id", dest="source_ids", metavar="ID", help="names of images", **names)
    remove.add_argument("--image", dest="images", metavar="FILE", help="pictures of rows to remove", **names)
    remove.add_argument("--where", metavar="CONDITION", help="COLUMN=VALUE or COLUMN~TEXT", **names)
    merge = command("merge", "make one bank of several", MERGE_HELP)
    merge.add_argument("banks", nargs="+", metavar="BANK", help="their folders")
    merge.add_argument("--out", required=True, metavar="DIR", help="the folder of the new bank")
    merge.add_argument("--keep_duplicates", action="store_true", help="also images that an earlier bank has")
    verify = command("verify", "name all that is wrong with it", VERIFY_HELP)
    verify.add_argument("bank", help="its folder")
    verify.add_argument("--model", metavar="MODEL", help="must have the tower of the bank: folder or repository")
    command("info", "say what is in it", INFO_HELP).add_argument("bank", help="its folder")
    view = command("view", "write a page to look at it with", VIEW_HELP)
    view.add_argument("bank", help="its folder")
    view.add_argument("-o", "--out", default="bank.html", metavar="FILE", help="the page (default: %(default)s)")
    view.add_argument("--rows", type=int, default=300, metavar="N", help="how many (default: %(default)s)")
    view.add_argument("--row", dest="wanted", type=int, metavar="ID", help="this one, too", **names)
    view.add_argument("--image", dest="images", metavar="FILE", help="show its neighbours; needs --model", **names)
    view.add_argument("--model", metavar="MODEL", help="whose vision tower the bank has: folder or repository")
    view.add_argument("--top_k", type=int, default=5, metavar="K", help="neighbours of each (default: %(default)s)")
    view.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice (default: %(default)s)")
    lance = command("lance", "write it to a LanceDB database", LANCE_HELP)
    lance.add_argument("bank", help="its folder or repository")
    lance.add_argument("uri", help="the database: a folder, s3://..., gs://... or az://...")
    lance.add_argument("--storage_option", metavar="NAME=VALUE", help="of LanceDB, for an object store", **names)
    lance.add_argument("--index", help="exact, IVF_RQ or IVF_SQ (default: by the number of rows)")
    return command(
        "calibrate",
        "choose the similarity below which neighbours are not used",
        calibrate_help,
        usage="tinyalign bank calibrate FILE.yaml [FILE.yaml ...] [--min_agreement SHARE] [--FIELD VALUE ...]",
        add_help=False,
    )


def _boolean(text: str) -> bool:
    choices = {"true": True, "false": False}
    if text.lower() not in choices:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")
    return choices[text.lower()]


def _add_row_options(parser: argparse.ArgumentParser):
    """The fields of `RowSettings`."""
    model = parser.add_argument_group("the model, whose vision tower makes the keys")
    model.add_argument("--model", metavar="MODEL", help="a TinyAlign checkpoint: folder or repository; or")
    model.add_argument("--vision_model", metavar="MODEL", help="a vision tower and")
    model.add_argument("--language_model", metavar="MODEL", help="a language model, to compose one, with")
    model.add_argument("--model_kwargs", metavar="JSON", help='fields of its config: {"num_latents": 8}')
    model.add_argument("--batch_size", type=int, metavar="N", help="images at once (default: 8 on a CPU, else 64)")
    data = parser.add_argument_group("the data set")
    data.add_argument("--dataset", required=True, metavar="DATA", help="files, folder or repository")
    data.add_argument("--dataset_config", metavar="NAME", help="of a repository")
    data.add_argument("--dataset_revision", metavar="REVISION", help="of a repository: branch, tag or commit")
    data.add_argument(
        "--dataset_split", default="train", metavar="SPLIT", help="of a folder or repository (default: %(default)s)"
    )
    data.add_argument("--image_folder", metavar="DIR", help="what paths of images are relative to")
    data.add_argument("--image_column", metavar="COLUMN", help="images or paths (default: image or images)")
    data.add_argument("--caption_column", metavar="COLUMN", help="(default: caption or txt, else the chat's answer)")
    data.add_argument("--messages_column", metavar="COLUMN", help="(default: messages or conversations)")
    data.add_argument("--set", action="append", default=[], metavar="COLUMN=VALUE", help="a column that all rows have")
    data.add_argument("--rows", type=int, metavar="N", help="choose N rows at random (default: all)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: %(default)s)")
    data.add_argument("--keep_duplicates", action="store_true", help="do not leave out images that come again")
    parser.add_argument(
        "--ray",
        nargs="?",
        type=int,
        const=0,
        metavar="ACTORS",
        help="encode on a Ray cluster (default: an actor for each GPU, or CPU)",
    )


def run_bank_command(arguments: argparse.Namespace):
    """Runs what was asked for, except `calibrate`."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "subcommand")}
    if arguments.subcommand == "build":
        from ..bank.from_files import BuildSettings, build_from_files

        out, ray = options.pop("out"), options.pop("ray")
        build_from_files(BuildSettings(**options), out, ray)
    elif arguments.subcommand == "add":
        from ..bank.from_files import RowSettings, add_from_files

        bank, out, ray = options.pop("bank"), options.pop("out"), options.pop("ray")
        add_from_files(RowSettings(**options), bank, out, ray)
    elif arguments.subcommand == "remove":
        from ..bank.changes import remove_rows

        remove_rows(options.pop("bank"), options.pop("out"), **options)
    elif arguments.subcommand == "merge":
        from ..bank.merge import merge_banks

        merge_banks(arguments.banks, arguments.out, arguments.keep_duplicates)
    elif arguments.subcommand == "verify":
        from ...modeling_tinyalign import TinyAlignForConditionalGeneration
        from ..bank.verify import bank_problems

        model = None
        if arguments.model is not None:
            model = TinyAlignForConditionalGeneration.from_pretrained(arguments.model)
        problems = list(bank_problems(arguments.bank, model))
        print(*problems or [f"{arguments.bank}: OK"], sep="\n")
        sys.exit(1 if problems else 0)
    elif arguments.subcommand == "view":
        from ..bank.view import view_bank

        view_bank(options.pop("bank"), options.pop("out"), **options)
    elif arguments.subcommand == "lance":
        from ...modeling_tinyalign import MemoryBank
        from ..bank.lance import write_lance

        for option in arguments.storage_option:
            if option.find("=") < 1:
                raise ValueError(f"--storage_option is {option!r}, expected NAME=VALUE, region=eu-west-1 say.")
        settings = dict(option.partition("=")[::2] for option in arguments.storage_option)
        bank = MemoryBank.from_pretrained(arguments.bank)
        print(f"{arguments.uri}: {write_lance(bank, arguments.uri, settings or None, arguments.index)}")
    else:
        from ..bank.info import bank_info

        print(bank_info(arguments.bank))
