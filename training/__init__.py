"""Data, bank preparation, stages 1 and 2, evaluation and the command line."""

import logging

# transformers imports PEFT with its trainers, and PEFT imports bitsandbytes, which warns on many CPUs that its kernels
# for 4 bits on a CPU are missing. Here, 4 bits are for CUDA only (tune_language_model: qlora).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
