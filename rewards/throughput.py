r"""How many mathematical completions one core grades: ``python -m rewards.throughput --gsm8k FILE --math FILE``.

The completions are made of the files' own solutions, prose with LaTeX: half of them end with the gold answer, half with
a wrong one (another problem's, or a number close by), in a box inside an answer tag, in a box, or as "The answer is".
Prints JSON: completions graded per second of CPU time (the symbolic helper's included, its start apart), how the
verdicts were reached, and the share of right completions that were found right and of wrong ones that were not.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rewards.command import Parser, reported
from rewards.files import read_rows
from rewards.maths import equivalence, symbolic
from rewards.maths.answer_forms import read
from rewards.task import get_task
from rewards.tasks.gsm8k import WrittenMaths

SLOW: tuple[equivalence.How, ...] = ("symbolic", "timeout", "failed")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a file can't be used, 2 for wrong arguments."""
    return reported(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m rewards.throughput", description="Measures the maths graders.")
    parser.add_argument("--gsm8k", required=True, help="a file of GSM8K problems (jsonl, jsonl.gz)")
    parser.add_argument("--math", required=True, help="a file of MATH problems")
    parser.add_argument("--size", type=int, default=5000, help="completions of each task")
    options = parser.parse_args(argv)
    for name, path in (("gsm8k", options.gsm8k), ("math", options.math)):
        print(json.dumps(measure(name, path, options.size)))
    return 0


def measure(name: str, path: str, size: int) -> dict[str, Any]:
    """Grades ``size`` completions of the file's problems."""
    task = get_task(name)
    assert isinstance(task, WrittenMaths)
    completions = list(_completions(task, path, size))
    task.prepare()
    equivalence.counts.clear()
    read.cache_clear()
    begin = time.process_time()
    verdicts = [(right, task.grade(fields, completion).correct) for fields, completion, right in completions]
    own_s = time.process_time() - begin
    symbolic.stop()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    slow = sum(equivalence.counts[how] for how in SLOW)
    return {
        "task": name,
        "completions": len(completions),
        "mean_characters": round(sum(len(completion) for _, completion, _ in completions) / len(completions)),
        "per_cpu_second": round(len(completions) / own_s),
        "helper_cpu_s_with_start": round(usage.ru_utime + usage.ru_stime, 2),
        "slow_share": slow / sum(equivalence.counts.values()),
        "how": dict(equivalence.counts),
        "right_found": _share([found for right, found in verdicts if right]),
        "wrong_refused": _share([not found for right, found in verdicts if not right]),
    }


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else 1.0


def _completions(task: WrittenMaths, path: str, size: int) -> Iterator[tuple[dict[str, Any], str, bool]]:
    rng = random.Random("throughput")
    rows = [(fields, row) for _, _, row in read_rows(path) if (fields := task.fields_from_row(row)) is not None]
    for number in range(size):
        fields, row = rows[number % len(rows)]
        solution = row.get("solution") or row["answer"].rpartition("####")[0]
        right = number % 2 == 0
        answer = fields["answer"] if right else _wrong(fields["answer"], rng.choice(rows)[0]["answer"], rng)
        prose = solution.replace(r"\boxed", "")
        endings = (
            rf"<think>{prose}</think><answer>\boxed{{{answer}}}</answer>",
            rf"{prose} Therefore, the answer is $\boxed{{{answer}}}$.",
            f"<think>{prose}</think>\n<answer>The answer is ${answer}$.</answer>",
        )
        yield fields, endings[rng.randrange(len(endings))], right


def _wrong(gold: str, other: str, rng: random.Random) -> str:
    """Another answer: a number near the gold one, or that of another problem."""
    if gold.lstrip("-").isdigit() and rng.random() < 0.5:
        return str(int(gold) + rng.choice((-10, -2, -1, 1, 2, 10)))
    while equivalence.equivalent(gold, other).correct:
        other += "1"
    return other


if __name__ == "__main__":
    sys.exit(main())
