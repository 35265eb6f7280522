"""The policy that acts: models, denoising, engines, actors, ledger and replay."""

import gc
import logging

# Where bitsandbytes is installed, PEFT imports it, and it advertises kernels from the hub on each such import.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Importing torch, transformers and Ray makes half a million objects that stay, and Python's collector looks for garbage
# among them after every 700: a seventh of the CPU time that a process of ours takes to start.
gc.set_threshold(20_000)
