"""Training, evaluation, banks and the command line; see docs/index.md for its rooms."""

import logging
from importlib import import_module

# transformers imports PEFT with its trainers, and PEFT imports bitsandbytes, which warns on many CPUs that its kernels
# for 4 bits on a CPU are missing. Here, 4 bits are for CUDA only (tune_language_model: qlora).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Imported when they are asked for: they bring transformers' and TRL's trainers.
MODULES = {
    "AlignmentConfig": "arguments.alignment",
    "AlignmentTrainer": "stages.trainers",
    "InstructionConfig": "arguments.instruction",
    "InstructionTrainer": "stages.trainers",
}
__all__ = list(MODULES)


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f".{MODULES[name]}", __name__))[name]
