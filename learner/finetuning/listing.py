"""Every setting of a fine-tuning run as JSON, for the pages: ``python -m learner.finetuning.listing recipe=NAME``."""

import sys

from learner.finetuning.settings import load_sft_config
from learner.settings.listing import main

if __name__ == "__main__":
    sys.exit(main(load_sft_config))
