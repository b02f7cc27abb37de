"""`tinyalign train`."""

import argparse
from pathlib import Path

from .settings_help import settings_help

SUMMARY = "train a stage, as YAML files say"
HELP = """
Train one stage, as YAML files say. A rerun goes on where the last one stopped.

  tinyalign train stage1.yaml                             # the connectors; the language model is frozen
  tinyalign train stage2.yaml                             # then connectors and language model
  tinyalign train stage1.yaml --learning_rate 5e-4        # any field can be set here too, and wins over the files
  tinyalign train stage1.yaml qwen2-0.5b-siglip.yaml      # several files: later ones win
  tinyalign train stage1.yaml --help                      # its settings; --help all: also those of transformers
  tinyalign train stage1.yaml --max_steps 10              # a short try; on little data, batch and epochs fit it
  torchrun --nproc_per_node 8 -m tinyalign_cli train stage1.yaml      # 8 GPUs, the same trajectory
  accelerate launch --config_file CONFIGS/accelerate/fsdp2.yaml -m tinyalign_cli train stage2.yaml

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


def add_arguments(parser: argparse.ArgumentParser):
    parser.usage = "tinyalign train FILE.yaml [FILE.yaml ...] [--FIELD VALUE ...]"
    package = Path(__file__).parents[1]
    # installed from a clone with `pip install -e`, or as a wheel; the package is not imported for it
    places = [package / "configs", package / "tinyalign_vlm" / "training" / "configs"]
    configs = next(place for place in places if place.is_dir())
    recipes = ", ".join(sorted(path.name for path in configs.glob("*.yaml")))
    parser.description = HELP.replace("CONFIGS", str(configs)).replace("RECIPES", recipes)


def run(arguments: argparse.Namespace):
    if {"-h", "--help"} & set(arguments.fields):
        from tinyalign_vlm.training.arguments.files import config_class_of, read_settings

        config_class = config_class_of(read_settings(arguments.files), " + ".join(arguments.files))
        print(settings_help(config_class, arguments.files, everything="all" in arguments.fields), end="")
        return
    from tinyalign_vlm.training.stages.run import train_from_files

    train_from_files(arguments.files, arguments.fields)
