"""The policy that acts: models, denoising, engines, actors, ledger and replay."""

import logging

# Where bitsandbytes is installed, PEFT imports it, and it advertises kernels from the hub on each such import.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
