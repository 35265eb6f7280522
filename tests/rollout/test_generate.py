"""``python -m rollout.generate``: what it loads, writes and shows, and its one sentence where it can't."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.settings.run import dump_config, load_config
from rewards.task import Problem, get_task
from rollout.adapters import PackedTensor, digest, pack, unpack, write_peft_folder
from rollout.engines.torch import TorchEngine
from rollout.generate import main
from rollout.models.encoding import encode_prompt
from rollout.models.lora import LoraSpec
from rollout.trajectory import GroupSpec
from rollout.unmasking import printable
from tests.support.learner_ranks import acting_adapter

R, ALPHA = 4, 8.0
SAID = "Puzzle: 0321003004002100"
SETTINGS = ["recipe=smoke", f"lora.r={R}", f"lora.alpha={ALPHA}"]


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> TorchEngine:
    return TorchEngine(model_path=tiny_model, lora=LoraSpec(R, ALPHA), max_rows=8)


@pytest.fixture(scope="module")
def adapter(engine: TorchEngine) -> dict[str, PackedTensor]:
    return dict(acting_adapter(engine.model, scale=1.0))


def write_adapter(folder: Path, adapter: dict[str, PackedTensor], base: str, **about: Any) -> Path:
    folder.mkdir(parents=True)
    write_peft_folder(folder, adapter, {"r": R, "lora_alpha": ALPHA, "base_model_name_or_path": base, **about})
    return folder


def other(adapter: dict[str, PackedTensor], factor: float) -> dict[str, PackedTensor]:
    return pack({name: factor * unpack(tensor) for name, tensor in adapter.items()})


@pytest.fixture
def run(tmp_path: Path, adapter: dict[str, PackedTensor], tiny_model: str) -> Path:
    """A finished run on a base that its adapter names alone, as with a small base."""
    path = tmp_path / "runs" / "r"
    write_adapter(path / "adapter", adapter, tiny_model)
    write_adapter(path / "checkpoints" / "iteration-000002" / "adapter", other(adapter, 2.0), tiny_model)
    (path / "config.json").write_text(dump_config(load_config(SETTINGS)))
    return path


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The answer in JSON."""
    status = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0 and err == "", err
    return json.loads(out, parse_constant=pytest.fail)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, err
    return err


# ---- what is written


def test_a_run_writes_as_its_engine_does_greedily(run, engine, adapter, tiny_model, capsys) -> None:
    answer = asked(capsys, "--run", run, SAID)
    settings = load_config(SETTINGS)
    sampler = settings.rollout.sampler.spec().greedy(steps=8, position_rule=settings.evaluation.position_rule)
    prompt = encode_prompt(engine.tokenizer, [{"role": "user", "content": SAID}])
    engine.load_adapter(0, adapter, digest(adapter))
    (group,) = engine.generate([GroupSpec(0, Problem("p", {}), 1, 0)], [prompt], sampler)
    assert answer["prompt"]["ids"] == prompt and answer["prompt"]["text"].endswith("assistant<|end_header_id|>\n\n")
    assert answer["model"] == tiny_model and answer["adapter"]["folder"] == str(run / "adapter")
    assert answer["adapter"]["digest"] == digest(adapter)
    assert answer["sampler"]["temperature"] == 0 and answer["sampler"]["position_rule"] == "low_confidence"
    (completion,) = answer["completions"]
    assert [token["id"] for token in completion["tokens"]] == group.completion_ids[0].tolist()
    assert [token["step"] for token in completion["tokens"]] == (group.unmask_step[0] + 1).tolist()
    logps = [token["logp"] for token in completion["tokens"]]
    assert logps == pytest.approx(group.logp[0], abs=1e-5) and completion["logp"] == pytest.approx(sum(logps), abs=1e-4)
    assert completion["steps"] == 8
    special = engine.tokenizer.all_special_ids
    assert completion["text"] == "".join(token["text"] for token in completion["tokens"] if token["id"] not in special)


def test_who_writes_is_the_runs_adapter_a_checkpoint_or_the_bare_base(run, adapter, tmp_path, tiny_model, capsys):
    def ids(*arguments: object) -> tuple[list[int], Any]:
        answer = asked(capsys, *arguments, SAID)
        return [token["id"] for token in answer["completions"][0]["tokens"]], answer["adapter"]

    checkpoint = run / "checkpoints" / "iteration-000002"
    plain = write_adapter(tmp_path / "elsewhere", adapter, tiny_model)
    of_run, of_checkpoint, base = (
        ids("--run", run),
        ids("--adapter", checkpoint),
        ids("--run", run, "--adapter", "none"),
    )
    assert of_run[0] != base[0] and base[1] is None
    assert of_checkpoint[1]["folder"] == str(checkpoint / "adapter")
    assert of_checkpoint[1]["digest"] != of_run[1]["digest"]
    assert ids("--run", run, "--adapter", plain)[0] == of_run[0]
    assert ids("--adapter", plain, "--completion-length", 24, "--block-length", 24, "--steps", 8)[0] == of_run[0]
    assert ids("--model", tiny_model, *("--completion-length", 24, "--block-length", 24, "--steps", 8))[0] == base[0]


def test_of_a_run_that_has_not_finished_the_newest_checkpoint_writes(run, adapter, tiny_model, capsys) -> None:
    (run / "adapter").rename(run / "checkpoints" / "adapter")
    for name in ("iteration-000010", "iteration-000009", "iteration-best", "iteration-000011.tmp"):
        write_adapter(run / "checkpoints" / name / "adapter", adapter, tiny_model)
    (run / "checkpoints" / "iteration-000012").mkdir()  # a checkpoint that is just being made has no adapter yet
    folder = asked(capsys, "--run", run, SAID)["adapter"]["folder"]
    assert folder == str(run / "checkpoints" / "iteration-000010" / "adapter")


def test_an_adapter_of_another_dtype_is_taken_in_the_runs(run, adapter, tmp_path, tiny_model, capsys) -> None:
    """PEFT saves float32 by default, whatever the run was in."""
    text = dump_config(load_config([*SETTINGS, "learner.dtype=bfloat16", "learner.zero_stage=1"]))
    (run / "config.json").write_text(text)
    answer = asked(capsys, "--run", run, SAID)
    assert answer["adapter"]["digest"] != digest(adapter), "the same values, in fewer bits"


def test_the_sampler_is_the_runs_but_for_what_is_said(run, capsys) -> None:
    options = ("--temperature", 0.7, "--top-k", 9, "--top-p", 0.9, "--position-rule", "random", "--steps", 24)
    answer = asked(capsys, "--run", run, *options, "--samples", 3, "--seed", 5, SAID)
    said = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "position_rule": "random", "steps": 24}
    assert answer["sampler"].items() >= (said | {"completion_length": 24, "block_length": 24}).items()
    texts = [completion["text"] for completion in answer["completions"]]
    assert len(texts) == 3 and len(set(texts)) > 1
    same = asked(capsys, "--run", run, *options, "--samples", 3, "--seed", 5, SAID)
    assert same == answer
    assert asked(capsys, "--run", run, *options, "--samples", 3, "--seed", 6, SAID) != answer
    few = asked(capsys, "--run", run, "--threshold", 0.001, SAID)["completions"][0]
    assert few["steps"] < 8 and max(token["step"] for token in few["tokens"]) == few["steps"]


def test_prompts_are_messages_a_text_or_a_problem_of_the_run(run, engine, capsys) -> None:
    tokenizer = engine.tokenizer
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SAID}]
    answer = asked(capsys, "--run", run, "--messages", json.dumps(messages))
    assert answer["prompt"]["ids"] == encode_prompt(tokenizer, messages)
    raw = "<|startoftext|>Numbers: 1"
    answer = asked(capsys, "--run", run, "--raw", raw)
    assert answer["prompt"]["ids"] == tokenizer.encode(raw) and len(answer["prompt"]["ids"]) == 3
    answer = asked(capsys, "--run", run, "--problem", 3)
    problem = get_task("sudoku").problems("test", seed=0, size=16)[3]
    assert problem.fields["puzzle"] in answer["prompt"]["text"]
    (completion,) = answer["completions"]
    grade = get_task("sudoku").grade(problem.fields, completion["text"])
    assert completion["grade"] == {"correct": grade.correct, "components": grade.components, "error": grade.error}


def test_what_was_filled_in_behind_the_end_has_no_step(run, engine, tiny_model, tmp_path, capsys) -> None:
    """A base that ends every block at once."""
    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "ends"
    base.mkdir()
    for path in Path(tiny_model).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["model.transformer.ln_f.weight"] = torch.zeros_like(weights["model.transformer.ln_f.weight"])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})  # all logits equal: the first token, EOS
    answer = asked(capsys, "--model", base, "--completion-length", 24, "--block-length", 12, "--steps", 8, SAID)
    (completion,) = answer["completions"]
    assert completion["text"] == "" and completion["steps"] == 4
    assert [token["step"] is None for token in completion["tokens"]] == [False] * 12 + [True] * 12
    assert [token["logp"] is None for token in completion["tokens"]] == [False] * 12 + [True] * 12


# ---- what is shown


def test_without_a_terminal_each_step_is_a_line_and_the_text_comes_last(run, capsys) -> None:
    assert main(["--run", str(run), SAID]) == 0
    out, err = capsys.readouterr()
    *steps, empty, text = out.splitlines()
    assert [line.split("  ")[0] for line in steps] == [f"step {n}/8" for n in range(1, 9)] and empty == ""
    assert [line.count("░") for line in steps] == [21, 18, 15, 12, 9, 6, 3, 0]
    assert steps[-1].split("  ", 1)[1] == text.replace("\n", "\\n")
    assert "greedily: 8 steps, low_confidence" in err and "8 steps, 24 tokens, log-probability -" in err
    assert text == asked(capsys, "--run", run, SAID)["completions"][0]["text"]


def test_on_a_terminal_it_is_redrawn_in_place(run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("rollout.unmasking.ALL_STEPS_S", 0.0)
    assert main(["--run", str(run), "--problem", "0"]) == 0
    out, err = capsys.readouterr()
    frames = out.split("\r")
    assert len(frames) >= 9 and "step 1/8" not in out
    assert "\x1b[2m░" in frames[1], "what is masked"
    assert "\x1b[1;32m" in out, "what is new"
    assert "░" not in frames[-1]
    assert err.splitlines()[-1].startswith(("right", "wrong")) and "reward" in err.splitlines()[-1]


def test_a_text_whose_judge_fails_is_shown_all_the_same(run, capsys) -> None:
    judge = ["task.judge.model=m", "task.judge.rubric=Good.", "task.judge.url=http://127.0.0.1:1/v1"]
    judge += ["task.judge.tries=1", "rollout.grade_timeout_s=70", f"task.judge.cache_dir={run}"]
    assert main(["--run", str(run), "--problem", "0"]) == 0
    shown = capsys.readouterr().out
    (run / "config.json").write_text(dump_config(load_config([*SETTINGS, *judge])))
    assert main(["--run", str(run), "--problem", "0"]) == 1
    out, err = capsys.readouterr()
    assert out == shown and err.splitlines()[-1].startswith("error: judge m at http://127.0.0.1:1/v1: ConnectError")


def test_a_completion_can_not_command_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07\tb\n\u202e é 漢") == "a\\x1b]0;title\\x07\tb\n\\u202e é 漢"


def test_the_steps_that_are_told_are_those_of_the_trajectory(engine, adapter) -> None:
    engine.load_adapter(0, adapter, digest(adapter))
    seen: dict[int, list[np.ndarray]] = {}

    def step(index: int, ids: np.ndarray, masked: np.ndarray) -> None:
        seen.setdefault(index, []).append(np.where(masked, -1, ids))

    specs = [GroupSpec(n, Problem(f"p{n}", {}), 3, seed=n) for n in range(4)]  # more completions than places
    sampler = load_config(SETTINGS).rollout.sampler.spec()
    groups = engine.generate(specs, [[2, 5, 9]] * 4, sampler, on_step=step)
    for index, frames in seen.items():
        group, row = groups[index // 3], index % 3
        for number, frame in enumerate(frames):
            known = group.unmask_step[row] <= number
            assert np.array_equal(frame, np.where(known, group.completion_ids[row], -1))
    assert len(seen) == 12


# ---- what is refused


def test_what_is_not_there_is_one_sentence(run, tmp_path, adapter, tiny_model, capsys) -> None:
    nowhere = tmp_path / "nowhere"
    assert "no run at" in refused(capsys, "--run", nowhere, SAID)
    assert "no adapter in" in refused(capsys, "--adapter", nowhere, SAID)
    assert "no adapter in" in refused(capsys, "--run", run, "--adapter", nowhere, SAID)
    assert "the base /gone is not there" in refused(capsys, "--run", run, "--model", "/gone", SAID)
    unnamed = write_adapter(tmp_path / "unnamed", adapter, "")
    assert "doesn't name its base" in refused(capsys, "--adapter", unnamed, SAID)
    rs = write_adapter(tmp_path / "rs", adapter, tiny_model, use_rslora=True)
    assert "use_rslora=True" in refused(capsys, "--run", run, "--adapter", rs, SAID)
    assert "--problem 16 is none of the run's 16" in refused(capsys, "--run", run, "--problem", 16)
    assert "positions of the model; shorten" in refused(capsys, "--run", run, "a" * 9000)
    (run / "config.json").write_text('{"run": {}}')
    assert "config.json is not of a run (no 'model')" in refused(capsys, "--run", run, SAID)
    (run / "config.json").write_text("{")
    assert "can't be read" in refused(capsys, "--run", run, SAID)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([SAID], "--run RUN, --adapter FOLDER or --model BASE"),
        (["--adapter", "none", SAID], "--run RUN, --adapter FOLDER or --model BASE"),
        (["--run", "r"], "one of the arguments"),
        (["--run", "r", "--raw", "a", SAID], "not allowed with"),
        (["--run", "r", " "], "the prompt is empty"),
        (["--run", "r", "--raw", ""], "--raw is empty"),
        (["--run", "r", "--messages", "x"], "--messages is not JSON"),
        (["--run", "r", "--messages", "[]"], "no conversation"),
        (["--run", "r", "--messages", '[{"role": "user"}]'], "no conversation"),
        (["--run", "r", "--messages", '[{"role": "user", "content": 1}]'], "no conversation"),
        (["--model", "m", "--problem", "1"], "--problem is a held-out problem of a run"),
        (["--run", "r", "--top-k", "5", SAID], "give --temperature above 0"),
        (["--run", "r", "--steps", "0", SAID], "0 is not a whole number of 1 or more"),
        (["--run", "r", "--temperature", "-1", SAID], "-1 is not a number of 0 or more"),
        (["--run", "r", "--temperature", "nan", SAID], "nan is not a number of 0 or more"),
        (["--run", "r", "--top-p", "1.5", "--temperature", "1", SAID], "1.5 is not a number above 0 and at most 1"),
        (["--run", "r", "--position-rule", "luck", SAID], "invalid choice"),
        (["--run", "/nowhere", SAID], "no run at /nowhere"),
        (["--model", "/nowhere", "--steps", "3", SAID], "the base /nowhere is not there"),
        (["--model", ".", "--steps", "3", SAID], "3 denoising steps can't be shared by 4 blocks"),
        (["--model", ".", "--completion-length", "20", SAID], "not a multiple of block_length 32"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_loaded(arguments, says, capsys) -> None:
    assert says in refused(capsys, *arguments)


def test_help_loads_no_torch() -> None:
    code = "import sys; from rollout.generate import main\n"
    code += "try: main(['--help'])\nfinally: print({'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: python -m rollout.generate ") and done.stdout.endswith("set()\n")
