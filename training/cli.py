"""The command line: `tinyalign demo` and `tinyalign train`."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError

TRAIN_HELP = """
Train one stage, as a YAML file says. A rerun goes on where the last one stopped.

  tinyalign train stage1.yaml                          # the connectors; the language model is frozen
  tinyalign train stage2.yaml                          # then connectors and language model
  tinyalign train stage1.yaml --learning_rate 5e-4     # any field can be set here too, and wins over the file
  tinyalign train stage1.yaml --help                   # all fields of that stage

A file, complete:

  stage: 1
  vision_model: google/siglip-base-patch16-224         # or `model:`, a TinyAlign checkpoint, to go on with
  language_model: HuggingFaceTB/SmolLM2-135M-Instruct
  model_kwargs: {memory_top_k: 5}                      # fields of TinyAlignConfig; 0 is the baseline without memory
  memory_bank: bank                                    # folder or Hub repository (MemoryBank.build makes one)
  lexicon: true                                        # a new model reads the bank's words, see docs/value_encoder.md
  dataset: pairs.parquet                               # or JSON, JSON lines, a folder, a Hub repository
  answer_column: caption                               # or a column `messages` with chats
  prompt: Describe the image briefly.
  output_dir: out/stage1

The visual features and the neighbours of all rows are computed once, before training. output_dir gets the model and
its processor, ready for from_pretrained and for stage 2. stage1.yaml and stage2.yaml with the paper's settings are in
CONFIGS.
"""


def main(argv: list[str] | None = None):
    """Runs a command line, `sys.argv` by default."""
    parser = argparse.ArgumentParser(
        prog="tinyalign", description="A small vision-language model that retrieves similar examples for every image."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train, evaluate and report on real images, on this machine")
    demo.add_argument("--output", default="demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a small run of five minutes, to see that it works")
    train = commands.add_parser(
        "train",
        help="train a stage, as a YAML file says",
        description=TRAIN_HELP.replace("CONFIGS", str(Path(__file__).parent / "configs")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="tinyalign train FILE.yaml [--FIELD VALUE ...]",
        add_help=False,
    )
    train.add_argument("config", nargs="?", metavar="FILE.yaml", help="settings of the run")
    arguments, fields = parser.parse_known_args(argv)
    if arguments.command == "demo":
        if fields:
            parser.error(f"unknown arguments: {' '.join(fields)}")
        with plain_errors():
            from .demo import run_demo

            run_demo(arguments.output, arguments.quick)
    elif arguments.config is None:
        train.print_help()
        sys.exit(0 if {"-h", "--help"} & set(fields) else 2)
    else:
        with plain_errors():
            from .run import train_from_file

            train_from_file(arguments.config, fields)


@contextmanager
def plain_errors() -> Iterator[None]:
    """A mistake in files, settings, data or the installation ends the program with a message, not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError, yaml.YAMLError) as error:
        sys.exit(f"tinyalign: {error}")
