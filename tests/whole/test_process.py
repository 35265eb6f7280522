"""What a process of ours sets for itself, before it loads torch: its commands and Ray's workers do, no import does."""

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.whole.test_command_lines import entry_points

ROOT = Path(__file__).parents[2]
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

LOOK = """
import gc, json, logging, os
def look():
    return [list(gc.get_threshold()), dict(os.environ), logging.getLogger("bitsandbytes").level]
"""

# Runs each command up to its end or to the first import of a heavy library, whichever comes first. In a child each.
UNTIL_TORCH = """
import os, runpy, sys
class Seen:
    def find_spec(name, path=None, target=None):
        if name in ("torch", "ray", "transformers"):
            tell(name)
def tell(when):
    prepared = [gc.get_threshold()[0] == 20_000, "GOMP_SPINCOUNT" in os.environ]
    os.write(answers, (json.dumps([command, name, when, prepared]) + chr(10)).encode())
    os._exit(0)
sys.meta_path.insert(0, Seen)
answers, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
os.dup2(null, 1), os.dup2(null, 2)
for name in ("__main__", "imported"):
    for command in sys.argv.pop().split():
        child = os.fork()
        if not child:
            sys.argv[1:] = ["--help"]
            try:
                runpy.run_module(command, run_name=name, alter_sys=True)
            except SystemExit:
                pass
            tell("its end")
        os.waitpid(child, 0)
"""


def in_fresh_process(program: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP}
    request = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(request, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_our_packages_sets_nothing_for_the_process() -> None:
    program = f"""{LOOK}
before = look()
import learner, learner.main, rollout, rollout.generate
imported = look()
rollout.process.prepare_process()
print(json.dumps([before, imported, look()]))
"""
    before, imported, prepared = json.loads(in_fresh_process(program))
    assert imported == before
    threshold, environment, level = prepared
    assert threshold[0] == 20_000 and level == logging.ERROR, "the control"
    assert environment == before[1] | {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def test_what_the_user_sets_for_openmp_stays() -> None:
    program = f"""{LOOK}
os.environ["GOMP_SPINCOUNT"] = "7"
from rollout.process import prepare_process
prepare_process()
print(look()[1]["GOMP_SPINCOUNT"])
"""
    assert in_fresh_process(program).strip() == "7"


@pytest.mark.slow
def test_every_command_is_prepared_before_it_loads_torch() -> None:
    ours = sorted(name for name in entry_points() if name.startswith(("learner.", "rollout.")))
    modules = [f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name for name in ours]
    found = in_fresh_process(LOOK + UNTIL_TORCH, " ".join(modules), " ".join(modules))
    told = {(command, name): (when, prepared) for command, name, when, prepared in map(json.loads, found.splitlines())}
    assert len(told) == 2 * len(modules)
    for command in modules:
        assert told[command, "__main__"][1] == [True, True], (command, told[command, "__main__"])
        assert told[command, "imported"][1] == [False, False], "the control: a module that is only imported"


def in_a_worker() -> tuple[Any, ...]:
    """What an actor of a local Ray finds, that has variables of its own as ours have."""
    import ray

    from learner.runs.local_ray import local_ray

    class Looking:
        def look(self) -> tuple[Any, ...]:
            return (
                gc.get_threshold()[0],
                *map(os.environ.get, (*OPENMP, "OMP_NUM_THREADS")),
                logging.getLogger("bitsandbytes").level,
                "torch" in sys.modules,
            )

    with local_ray(num_cpus=1, logging_level="ERROR"):
        own: dict[str, Any] = {"env_vars": {"OMP_NUM_THREADS": "3"}}
        actor: Any = ray.remote(Looking).options(runtime_env=own).remote()
        return ray.get(actor.look.remote(), timeout=120)


@pytest.mark.slow
def test_rays_workers_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPENMP:
        monkeypatch.delenv(name, raising=False)  # what starts Ray hands its environment on
    assert in_a_worker() == (20_000, "PASSIVE", "1000", "3", logging.ERROR, False)
    monkeypatch.setattr("learner.runs.local_ray.for_ray_workers", dict)
    assert in_a_worker() == (700, None, None, "3", logging.NOTSET, False), "the control"
