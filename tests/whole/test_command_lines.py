"""Every command has the same head: wrong arguments end with 2 and one sentence, ``--help`` with 0."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A mistake of each kind that the command can tell before it works: an option that isn't there, a setting, a value.
MISTAKES: dict[str, list[list[str]]] = {
    "learner.main": [["--wrong"], ["run.nonsense=1"], ["word"], ["recipe=smoke", "run.iterations=many"]],
    "learner.sft": [["--wrong"], ["run.nonsense=1"], ["recipe=sudoku"]],
    "learner.evaluate": [["--wrong"], ["--run"], ["--run", "/nowhere"], ["decode.stepps=[1]"]],
    "learner.plan": [["--wrong"], ["run.nonsense=1"], ["--gpus", "none"], ["--gpu", "H100"]],
    "learner.simulate": [
        ["--wrong"],
        ["run.nonsense=1"],
        ["actors=none"],
        ["--run", "/nowhere"],
        ["--gpu", "abacus"],
    ],
    "learner.compare": [
        ["--wrong"],
        [],
        ["plan=nothing"],
        ["plan=smoke", "budget=many"],
        ["plan=smoke", "--parallel", "0"],
    ],
    "learner.reproduce": [["--wrong"], ["seeds=one"], ["recipes=nothing"], ["run.nonsense=1"]],
    "learner.verify": [["--wrong"], ["--device", "abacus"], ["--golden", "/nowhere"]],
    "learner.evaluation.best_of_n": [["--wrong"], [], ["x"], ["x", "--base", "/nowhere"]],
    "learner.export": [["--wrong"], [], ["--adapter", "x", "--out", str(ROOT)]],
    "learner.reporting.curves": [["--wrong"], []],
    "learner.reporting.plots": [["--wrong"], []],
    "learner.small_base.base_model": [["--wrong"], ["run.nonsense=1"]],
    "learner.ranks.build_ops": [["--wrong"], ["word"]],
    "learner.bench": [["--wrong"], ["--only", "nothing"]],
    "learner.bench.choice": [["--wrong"]],
    "learner.bench.control": [["--wrong"]],
    "learner.bench.gradient_noise": [
        ["--wrong"],
        ["run.nonsense=1"],
        ["--batches", "1"],
        ["objective.type=dtm", "objective.buffer_prompts=16"],
        ["rollout.max_staleness=1"],
    ],
    "learner.bench.gpu": [["--wrong"], ["--all", "nothing"]],
    "learner.bench.overlap": [["--wrong"]],
    "learner.bench.packing": [["--wrong"]],
    "learner.bench.planned": [["--wrong"]],
    "learner.bench.scaling": [["--wrong"]],
    "learner.bench.steps": [["--wrong"]],
    "learner.bench.vllm": [["--wrong"]],
    "learner.bench.proposals": [["--wrong"], ["x", "--out", "y", "--groups", "1"]],
    "learner.bench.variance": [["--wrong"], ["x", "--out", "y", "--groups", "1"], ["x", "--out", "y", "--k", "some"]],
    "rewards.grade": [["--wrong"], [], ["--task", "nothing"]],
    "rewards.throughput": [["--wrong"], []],
    "rewards.data.make_reactions": [["--wrong"], [], ["--vocabulary", "/nowhere", "--out", "x"]],
    "rollout.models.from_wheel": [
        ["--wrong"],
        [],
        ["nothing", "--out", "x"],
        ["rxnfp"],
        ["rxnfp", "--out", str(ROOT)],
        ["rxnfp", "--out", "x", "--wheel", "/nowhere"],
    ],
    "rollout.generate": [["--wrong"], [], ["--run", "/nowhere", "word"], ["--model", ".", "--steps", "none", "word"]],
    "services.dashboard": [["--wrong"], ["--port", "x"], ["--store", "postgresql://me:secret@host/runs"]],
    "services.store": [["--wrong"], [], ["prune"], ["prune", "x", "--keep-samples", "some"]],
}

NO_COMMANDS = {
    "learner.bench.first_minutes": "a step of learner.bench.gpu --all",
    "learner.bench.step_memory": "a process that measures for learner.bench.steps",
    "rewards.maths.symbolic_worker": "the grader's helper",
    "learner.settings.listing": "what the dashboard's form of a new run is made of",
    "learner.finetuning.listing": "the same of a fine-tuning run",
    "rollout.template_worker": "the tokenizer's helper",
    "rollout.weights_worker": "what reads a pickle for rollout.models.from_wheel",
}

RUN_EACH = """
import contextlib, io, json, runpy, sys
for command, *arguments in json.loads(sys.argv.pop()):
    sys.argv[1:], out, err, status = arguments, io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def entry_points() -> set[str]:
    """Every module that does something when it is run."""
    found = set()
    for package in ("learner", "rollout", "rewards", "services"):
        for path in (ROOT / package).rglob("*.py"):
            if any(isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test) for node in _body(path)):
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    return found


def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def test_no_command_is_left_out() -> None:
    assert entry_points() == MISTAKES.keys() | NO_COMMANDS.keys()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[int, str, str]]:
    """(status, stdout, stderr) by command line. All in one process: torch takes seconds to import."""
    folder = tmp_path_factory.mktemp("elsewhere")
    lines = [[command, *arguments] for command, mistakes in MISTAKES.items() for arguments in [["--help"], *mistakes]]
    request = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", RUN_EACH, json.dumps(lines)]
    done = subprocess.run(request, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(folder.iterdir()) == [], "something was started"
    answers = map(json.loads, done.stdout.splitlines())
    return {tuple(line): tuple(answer) for line, answer in zip(lines, answers, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(MISTAKES))
def test_a_mistake_ends_with_2_and_one_sentence(command: str, ends: dict) -> None:
    for arguments in MISTAKES[command]:
        status, out, err = ends[command, *arguments]
        assert status == 2 and out == "", (arguments, out, err)
        assert len(err.splitlines()) == 1 and err.startswith("error: "), (arguments, err)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(MISTAKES))
def test_help_ends_with_0(command: str, ends: dict) -> None:
    status, out, err = ends[command, "--help"]
    assert status == 0 and err == "" and out.startswith(f"usage: python -m {command} "), (status, out[:200], err)


@pytest.mark.parametrize("command", [*(name for name in sorted(MISTAKES) if "bench" not in name), "rollout.generate"])
def test_help_needs_no_torch(command: str) -> None:
    """It takes seconds to import."""
    if command in ("learner.reporting.plots", "learner.small_base.base_model", "learner.ranks.build_ops"):
        pytest.skip("a developer's command")
    program = f"""
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", *({{"torch", "ray", "transformers"}} & sys.modules.keys()), file=sys.stderr))
sys.argv[1:] = ["--help"]
runpy.run_module("{command}", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.strip() == "loaded:", done.stderr


# ---- what the pages name

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^(?:```bash\n(.*?)^```|((?: {4}[^\n]*\n)+))", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python3? -m ([\w.]+)")
NAMED = {"recipe": "learner/recipes", "plan": "learner/comparison/plans"}
"""Arguments that name a shipped file, and where those are."""


def named_commands(text: str) -> list[tuple[str, list[str]]]:
    """Each command of a page's blocks, with its arguments: without what follows a comment, a pipe or a redirection."""
    lines = [line for fenced, indented in BLOCK.findall(text) for line in (fenced or indented).splitlines()]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if at := COMMAND.search(line):
            words = shlex.split(re.split(r"\s[#<>|&]", line[at.end() :])[0], comments=True)
            found.append((at[1], words))
    return found


def unknown(command: str, words: list[str], told: str) -> list[str]:
    """Of a command's arguments, options and keys that its help doesn't tell, and files that don't ship."""
    wrong = []
    for word in words:
        key, _, value = word.partition("=")
        if word.startswith("--"):
            wrong += [word] * (not re.search(rf"(?<![\w-]){key}(?![\w-])", told))
        elif key in NAMED and value.isidentifier() and not value.isupper():
            wrong += [word] * (not (ROOT / NAMED[key] / f"{value}.yaml").is_file())
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)*=.*", word) and key not in (*NAMED, "resume"):
            wrong += [word] * (not re.search(rf"^ +{key} |(?<![\w.]){key}=", told, re.MULTILINE))
    return wrong


@pytest.mark.slow
def test_pages_name_options_and_keys_that_commands_have(ends: dict) -> None:
    of_main = ends["learner.main", "--help"][1]
    wrong, seen = [], 0
    for page in PAGES:
        for command, words in named_commands(page.read_text(encoding="utf-8")):
            if command not in MISTAKES or command == "services.store":  # its options are those of its subcommands
                continue
            told = ends[command, "--help"][1]
            told += of_main if "learner.main" in told else ""  # whose settings it takes too
            seen += 1
            wrong += [f"{page.name}: {command} {word}" for word in unknown(command, words, told)]
    assert wrong == [] and seen > 60
    (line,) = named_commands("\n    python -m learner.main recipe=no lr=1 learner.lr=1 --dry --dry-run # --x\n\n")
    assert unknown(*line, of_main) == ["recipe=no", "lr=1", "--dry"], "the control"
