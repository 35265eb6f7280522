"""One step of ``learner.bench.gpu --all``: prints its figures as JSON."""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import json
import sys
from dataclasses import asdict

from learner.bench.first_minutes.drive import figures_of

if __name__ == "__main__":
    name, *more = sys.argv[1:]
    print(json.dumps([asdict(figure) for figure in figures_of(name, small=more == ["--small"])]))
