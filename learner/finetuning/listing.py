"""Every setting of a fine-tuning run as JSON, for the pages: ``python -m learner.finetuning.listing recipe=NAME``."""

import sys

from learner.finetuning.settings import load_sft_config
from learner.settings.listing import main
from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()
    sys.exit(main(load_sft_config))
