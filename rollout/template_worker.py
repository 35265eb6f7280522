"""The helper of ``rollout.models.chat``: ``python -m rollout.template_worker CPU_S MEMORY_BYTES CHARACTERS``.

Renders conversations by transformers' own function, without torch. A line in is a JSON object with that function's
arguments, a line out one with ``text``, or with ``fault``: why the template fails, null when it is for a limit. Whoever
needs more than CPU_S seconds of CPU time for one line is ended by the kernel (SIGPROF, not caught, so it works inside
code that never returns to Python); all of them together get no more than MEMORY_BYTES above what the process started
with.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    cpu_s, memory_bytes, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # only there can a limit begin from what is in use
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        print(json.dumps(_reply(line, characters)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _reply(line: bytes, characters: int) -> dict[str, Any]:
    try:
        text = render_jinja_template(**json.loads(line))[0][0]
        return {"text": text} if len(text) <= characters else {"fault": None}
    except MemoryError:
        return {"fault": None}
    except Exception as error:  # a template may raise anything
        return {"fault": f"{type(error).__name__}: {' '.join(str(error)[:300].split())}"}


if __name__ == "__main__":
    main()
