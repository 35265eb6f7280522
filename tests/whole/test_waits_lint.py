"""No wait without an end: a lint over our packages, and its control."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("services", "learner", "rollout", "rewards")
WAITS = ROOT / "rollout" / "waits.py"  # the one place for ray.get and ray.wait

# Method -> position of its timeout among the arguments. The join of a string and the get of a table have a positional
# argument; without one they are a thread's or a queue's.
METHODS = {"result": 0, "join": 0, "wait": 0, "get": 0, "communicate": 1}
FUNCTIONS = {
    *("subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output"),
    *("torch.distributed.init_process_group", "dist.init_process_group", "deepspeed.init_distributed"),
}


def endless_waits(source: str) -> list[tuple[int, str]]:
    """(line, call) of each wait that could last for ever."""
    found = []
    nodes = list(ast.walk(ast.parse(source)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    awaited = [call.args[0] for call in calls if ast.unparse(call.func) == "asyncio.wait_for" and len(call.args) == 2]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "ray":
            found += [(node.lineno, f"from ray import {a.name}") for a in node.names if a.name in ("get", "wait")]
        if not isinstance(node, ast.Call) or node in awaited:
            continue
        name = ast.unparse(node.func)
        bounded = any(keyword.arg in ("timeout", None) for keyword in node.keywords)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        endless = name in ("ray.get", "ray.wait") or (name in FUNCTIONS and not bounded)
        endless |= method in METHODS and len(node.args) <= METHODS[method] and not bounded
        if endless:
            found.append((node.lineno, name))
    return sorted(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_endless_waits(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}: {call}"
        for path in (ROOT / package).rglob("*.py")
        if path != WAITS
        for line, call in endless_waits(path.read_text(encoding="utf-8"))
    }
    assert not found, "waits without a timeout; use rollout.waits or give one:\n" + "\n".join(sorted(found))


@pytest.mark.parametrize(
    "bad",
    [
        "ray.get(ref)",
        "ray.get(ref, timeout=3)",  # bounded, but its error names nobody
        "ray.wait(refs, timeout=3)",
        "from ray import get",
        "future.result()",
        "thread.join()",
        "self._queue.get()",
        "jobs.get(block=True)",
        "stop.wait()",
        "process.wait()",
        "process.communicate()",
        "process.communicate(data)",
        "subprocess.run(['ls'])",
        "deepspeed.init_distributed('gloo')",
        "asyncio.wait_for(changed.wait())",
    ],
)
def test_lint_finds(bad: str) -> None:
    assert endless_waits(f"def f():\n    {bad}\n")


@pytest.mark.parametrize(
    "good",
    [
        "future.result(timeout=3)",
        "future.result(3)",
        "', '.join(names)",
        "table.get(key)",
        "jobs.get(timeout=1.0)",
        "stop.wait(1.0)",
        "process.communicate(data, timeout=2)",
        "process.communicate(data, 2)",
        "subprocess.run(['ls'], timeout=9)",
        "ray.get_runtime_context()",
        "thread.join(timeout=left)",
        "asyncio.wait_for(changed.wait(), 3)",
    ],
)
def test_lint_lets_pass(good: str) -> None:
    assert not endless_waits(good)
