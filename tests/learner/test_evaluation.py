"""Settings, grid, results file and report of learner.evaluate, without Ray."""

import json
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from learner.evaluate import main
from learner.evaluation.cells import Cell, grid
from learner.evaluation.drive import result_settings
from learner.evaluation.report import cell_reports
from learner.evaluation.results import Chunk, ChunkId, ResultsFile
from learner.evaluation.settings import check_paths, load_evaluation
from learner.evaluation.subject import evaluated_problems, lora_spec, problems_that_fit, read_adapter, trained_on
from learner.evaluation.table import print_table
from learner.settings.run import dump_config, load_config
from learner.supply.problems import task_problems
from rewards.errors import ConfigError, UnmaskError
from rewards.task import get_task
from rollout.models.encoding import encode_prompt, load_tokenizer
from rollout.models.lora import LoraSpec
from rollout.subject import held_out_problem
from rollout.trajectory import SamplerSpec
from tests.support.evaluations import settings, write_adapter

# ---- settings and grid


def test_default_grid_is_orders_by_steps_and_a_threshold() -> None:
    config = settings("recipe=sudoku", "decode.samples=4")
    described = [cell.describe() for cell in grid(config)]
    greedy = [(d["position_rule"], d["steps"]) for d in described if d["decoding"] == "greedy"]
    assert greedy == [(rule, steps) for rule in ("low_confidence", "random") for steps in (8, 4, 2, 1)]
    assert [(d["position_rule"], d["steps"]) for d in described if d["decoding"] == "sampled"] == greedy
    assert [d["threshold"] for d in described if d["decoding"] == "threshold"] == [0.9]
    assert config.pass_at == (1, 2, 4)
    assert len({cell.key for cell in grid(config)}) == len(grid(config))


def test_greedy_cells_are_what_a_run_evaluates_itself_with() -> None:
    config = settings("recipe=sudoku", "rollout.sampler.top_k=5", "rollout.sampler.top_p=0.9")
    cell = next(cell for cell in grid(config) if cell.decoding == "greedy" and cell.sampler.steps == 4)
    assert cell.sampler == SamplerSpec(24, 24, steps=4, position_rule="low_confidence", temperature=0.0)
    sampled = [c.sampler for c in grid(settings("recipe=sudoku", "decode.samples=2", "decode.top_k=3"))]
    assert {(sampler.temperature, sampler.top_k) for sampler in sampled} == {(0.0, None), (1.0, 3)}


def test_other_lengths_keep_the_tokens_of_a_step() -> None:
    longer = settings("recipe=sudoku", "decode.completion_length=96", "decode.block_length=24")
    assert longer.full_steps == 32 and longer.step_counts == (32, 16, 8, 4)
    assert settings("recipe=sudoku", "decode.block_length=6").step_counts == (8, 4), "4 blocks take 4 steps at least"
    assert settings("recipe=sudoku", "decode.steps=[5,24,5]").step_counts == (24, 5)


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["decode.steps=[0]"], "decode.steps"),
        (["decode.steps=[]"], "decode.steps is empty"),
        (["decode.steps=[25]"], "decode.steps holds 25"),
        (["decode.step_divisors=[3]"], "decode.step_divisors holds 3"),
        (["decode.steps=[4]", "decode.step_divisors=[2]"], "both given"),
        (["decode.completion_length=25"], "not a multiple"),
        (["decode.completion_length=10", "decode.block_length=10"], "set decode.steps"),
        (["decode.greedy=false", "decode.thresholds=[]"], "nothing to decode"),
        (["decode.thresholds=[1.5]"], "decode.thresholds"),
        (["decode.samples=4", "decode.pass_at=[8]"], "pass@8 needs decode.samples of at least 8, not 4"),
        (["decode.stepps=[4]"], "did you mean 'decode.steps'"),
        (["data.split=dev"], "data.split"),
        (["decode.position_rules=[best]"], "decode.position_rules"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], fragment: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings("recipe=sudoku", *arguments)
    assert fragment in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_wrong_arguments_end_with_2_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--runs", "x"], ["--run"], ["--run", "/nowhere"], ["--run", "a", "recipe=sudoku"], ["sudoku"]):
        assert main(argv) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("error: ") and len(told.err.splitlines()) == 1, argv
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "decode.thresholds=[0.9]" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path, tiny_model: str) -> Path:
    """What a run leaves behind, as far as an evaluation looks at it."""
    folder = tmp_path / "runs" / "a"
    (folder / "checkpoints").mkdir(parents=True)
    config = load_config(["recipe=smoke", f"model.path={tiny_model}", "evaluation.problems=5", "run.seed=3"])
    (folder / "config.json").write_text(dump_config(config))
    write_adapter(folder / "adapter", tiny_model)
    return folder


def test_a_run_brings_its_settings_adapter_and_held_out_problems(run: Path, tiny_model: str) -> None:
    for argv, given in (([], str(run)), ([f"adapter={run}"], None), ([f"adapter={run / 'adapter'}"], None)):
        config, run_dir = load_evaluation(argv, given)
        assert run_dir == run and config.run.seed == 3 and config.model.path == tiny_model
        adapter = read_adapter(config, run_dir)
        assert adapter is not None and adapter.source == run / "adapter"
        assert lora_spec(adapter, tiny_model) == LoraSpec(2, 4.0)
        problems = evaluated_problems(config, on_event=print)
        assert [problem.id for problem in problems] == [f"sudoku-test-3-{i}" for i in range(5)]
        assert trained_on(config, problems, on_event=print) == 0
        train = evaluated_problems(settings("data.split=train", run=str(run)), on_event=print)
        assert trained_on(config, train, on_event=print) == 5, "the control: problems that were trained on"
    assert load_evaluation([f"adapter={run}", "recipe=sudoku"], None)[1] is None


def test_held_out_problems_are_the_runs(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"numbers": [1, 1, 1], "target": 100}, *({"numbers": [9, 9, k], "target": 18 + k} for k in (1, 2, 3, 3))]
    rows.insert(3, {"numbers": [10**9, 10**9, 9], "target": 9})  # has no room; the run counts it among its four
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    folder = tmp_path / "runs" / "a"
    (folder / "checkpoints").mkdir(parents=True)
    paths = [f"task.{name}_path={tmp_path}/{name}.json" for name in ("train", "test")]
    room = ["task.test_size=5", "evaluation.problems=4", "task.too_long=drop"]
    run = load_config(["recipe=smoke", "task.name=countdown", f"model.path={tiny_model}", *paths, *room])
    (folder / "config.json").write_text(dump_config(run))
    config = settings("adapter=none", run=str(folder))
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    short = encode_prompt(load_tokenizer(model), get_task("countdown").messages(rows[1]))
    about = json.loads((model / "config.json").read_text()) | {"max_sequence_length": config.lengths[0] + len(short)}
    (model / "config.json").write_text(json.dumps(about))
    problems = evaluated_problems(config, on_event=lambda *said: print(*said))
    _, held_out = task_problems(run, get_task("countdown"), on_event=lambda *_: None)
    assert problems == held_out and len(problems) == 4
    assert "1 of 5 held-out problems have no solution" in capsys.readouterr().out
    fitting_ones = problems_that_fit(config, problems, str(model), on_event=lambda *said: print(*said))
    assert [problem.fields["numbers"] for problem in fitting_ones] == [[9, 9, 1], [9, 9, 2], [9, 9, 3]]
    assert "1 of 4 problems leave no room" in capsys.readouterr().out
    as_asked = held_out_problem(json.loads(dump_config(run)), 0)[1]
    assert as_asked == problems[0], "rollout.generate --problem counts the same ones"


def test_an_evaluation_can_not_change_how_the_run_was_trained(run: Path) -> None:
    settings("rollout.actors=1", "timeouts.start=9", run=str(run))
    for argument in ("task.name=countdown", "rollout.sampler.steps=4", "run.seed=1", "model.base.seed=1"):
        with pytest.raises(ConfigError, match=f"{argument.partition('=')[0]} says how a was trained"):
            settings(argument, run=str(run))
    settings("recipe=smoke", "rollout.sampler.steps=4")


def test_any_run_can_be_evaluated_in_bfloat16(run: Path) -> None:
    """Stage 0 refuses it for the sake of gradients, which an evaluation has none of."""
    assert settings("learner.dtype=bfloat16", run=str(run)).learner.dtype == "bfloat16"
    assert settings("recipe=smoke", "learner.dtype=bfloat16").learner.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="learner.zero_stage"):
        settings("recipe=smoke", "learner.zero_stage=9")


def test_adapters_that_are_not_there_or_not_plain_lora_are_refused(run: Path, tiny_model: str) -> None:
    config = settings(f"adapter={run / 'checkpoints'}", run=str(run))
    with pytest.raises(ConfigError, match="no adapter in"):
        read_adapter(config, run)
    with pytest.raises(ConfigError, match="leave nothing to evaluate"):
        read_adapter(settings("adapter=none", "base=false", run=str(run)), run)
    assert read_adapter(settings("adapter=none", run=str(run)), run) is None
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    adapter = read_adapter(settings(run=str(run)), run)
    assert adapter is not None
    with pytest.raises(ConfigError, match="use_dora=True"):
        lora_spec(adapter, tiny_model)


def test_what_completions_depend_on_is_in_the_key_and_nothing_else(run: Path, tiny_model: str) -> None:
    def about(*argv: str) -> dict[str, Any]:
        config = settings(*argv, run=str(run))
        return result_settings(
            config, tiny_model, read_adapter(config, run), evaluated_problems(config, on_event=print)
        )

    before = about()
    for same in ("rollout.actors=7", "out=x", "decode.steps=[1]", "decode.samples=3", "statistics.resamples=9"):
        assert about(same) == before, same
    for other in ("decode.seed=9", "data.size=4", "data.split=train", "adapter=none", "rollout.max_rows=3"):
        assert about(other) != before, other


def test_relative_paths_inside_a_ray_job_are_refused(run: Path) -> None:
    check_paths(settings(run=str(run)), run, True)
    for config in (settings("out=here", run=str(run)), settings("data.path=x.csv", run=str(run))):
        with pytest.raises(ConfigError, match="absolute path"):
            check_paths(config, run, True)
        check_paths(config, run, False)


# ---- results file and report

ABOUT: dict[str, Any] = {"model": "m", "adapter": None, "data": {"problems": 4}}


def chunk(*correct: Sequence[int], **changes: Any) -> Chunk:
    problems = [
        {
            "id": f"p{i}",
            "correct": list(right),
            "nfe": [3] * len(right),
            "tokens": [6] * len(right),
            "components": {"value": [float(r) for r in right]},
            "completions": ["text"] * len(right),
        }
        | changes
        for i, right in enumerate(correct)
    ]
    return Chunk(problems, grader_failures=0, generate_s=0.5)


def test_results_come_back_and_torn_or_damaged_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    ids = [ChunkId("cell", "base", i) for i in range(4)]
    with ResultsFile(path, ABOUT, code="c") as results:
        for at in ids:
            results.append(at, chunk([1], [0]))
        kept = dict(results.chunks)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for torn, left, dropped in (
        (whole, ids, 0),
        (whole[:-9], ids[:3], 1),
        (whole + b'{"cell"', ids, 1),
        (b"".join(lines[:2]) + b"\0\0\0\n" + b"".join(lines[3:]), [ids[0], *ids[2:]], 1),
        (lines[0][:20], [], 1),
        (b"", [], 0),
    ):
        path.write_bytes(torn)
        with ResultsFile(path, ABOUT, code="c") as results:
            assert list(results.chunks) == left and results.dropped_lines == dropped
            assert not results.other_code
            results.append(ids[3], chunk([1], [0]))
        with ResultsFile(path, ABOUT, code="other") as results:
            assert results.chunks == {at: kept[at] for at in dict.fromkeys([*left, ids[3]])}
            assert results.other_code


def test_completions_are_the_owners_alone_unless_shared(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        (tmp_path / "there").mkdir()
        for name, shared, mode in (("own", False, 0o700), ("shared", True, 0o755), ("there", False, 0o755)):
            ResultsFile(tmp_path / name / "results.jsonl", ABOUT, code="c", shared=shared).close()
            assert (tmp_path / name).stat().st_mode & 0o777 == mode, name
    finally:
        os.umask(before)


def test_a_full_disk_is_a_sentence_and_what_was_there_stays(tmp_path: Path) -> None:
    path, first = tmp_path / "results.jsonl", ChunkId("cell", "base", 0)
    with ResultsFile(path, ABOUT, code="c") as results:
        results.append(first, chunk([1], [0]))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))
        try:
            with pytest.raises(UnmaskError, match="cannot write .*results.jsonl"):
                results.append(ChunkId("cell", "base", 1), chunk([1], [0]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with ResultsFile(path, ABOUT, code="c") as results:
        assert list(results.chunks) == [first] and results.dropped_lines == 1


def test_results_of_other_settings_or_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    ResultsFile(path, ABOUT, code="c").close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"other settings \(data\.problems 4 -> 5\).*give another out="):
        ResultsFile(path, ABOUT | {"data": {"problems": 5}}, code="c")
    with (
        ResultsFile(path, ABOUT, code="c"),
        pytest.raises(ConfigError, match=rf"by another evaluation \(process {os.getpid()} on "),
    ):
        ResultsFile(path, ABOUT, code="c")
    assert path.read_bytes() == before
    path.write_text('{"iteration": 1}\n')
    with pytest.raises(ConfigError, match="not the results of an evaluation"):
        ResultsFile(path, ABOUT, code="c")


GREEDY = Cell("greedy", SamplerSpec(24, 24, steps=8, position_rule="random", temperature=0.0))
SAMPLED = Cell("sampled", SamplerSpec(24, 24, steps=8, position_rule="random", temperature=1.0), samples=2)


def test_report_puts_base_and_adapter_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = {
        (GREEDY, "base"): [chunk([0], [0]), chunk([1], [0])],
        (GREEDY, "adapter"): [chunk([1], [1]), chunk([1], [0])],
        (SAMPLED, "base"): [chunk([0, 1], [0, 0]), chunk([1, 1], [0, 0])],
    }

    def report(**changes: Any) -> list[dict[str, Any]]:
        options: dict[str, Any] = {"pass_at": (1, 2), "confidence": 0.95, "resamples": 50, "seed": 0}
        return cell_reports(evaluated, **options | changes)

    greedy, sampled = report()
    assert (greedy["base"]["solve_rate"]["value"], greedy["adapter"]["solve_rate"]["value"]) == (0.25, 0.75)
    assert greedy["base"]["solve_rate"]["method"] == "wilson"
    assert greedy["difference"]["solve_rate"]["value"] == 0.5
    low, high = greedy["difference"]["solve_rate"]["interval"]
    assert 0.0 <= low < 0.5 < high <= 1.0, "the adapter is nowhere worse, so the paired interval has no negative part"
    assert greedy["base"]["mean_nfe"] == 3 and greedy["base"]["components"] == {"value": 0.25}
    assert sampled["base"]["solve_rate"] | {"value": 0} == sampled["base"]["pass@1"] | {"value": 0}
    assert sampled["base"]["pass@1"]["value"] == 3 / 8 and sampled["base"]["pass@2"]["value"] == 1 / 2
    assert sampled["base"]["best@1"]["value"] == 3 / 8 and sampled["base"]["best@2"]["value"] == 1 / 2
    assert sampled["base"]["solve_rate"]["method"] == "bootstrap"
    assert "adapter" not in sampled and "difference" not in sampled
    assert report() == [greedy, sampled] and report(resamples=7, seed=1) != report(resamples=7, seed=2)
    evaluated[GREEDY, "base"] = [chunk([0], [0], components={"value": [None]}), chunk([1], [0])]
    assert report()[0]["base"]["components"] == {"value": None}
    whole = {"problems": 4, "statistics": {"confidence": 0.9}, "cells": [greedy, sampled]}
    speeds = [{"cell": c.label, "policy": p, "tokens_per_s": 7.0} for c, p in evaluated]
    print_table(whole | {"machine": {"cells": speeds}}, Console(width=160))
    told = capsys.readouterr().out
    assert "90 % intervals" in told and "0.250 [0.046, 0.699]" in told and "+0.500 [" in told and "pass@2" in told


def long_cells(*policies: str) -> list[dict[str, Any]]:
    """What takes most room: the longest names, intervals on both sides of 0, figures of many digits."""
    rate = {"value": 0.25, "interval": [0.125, 0.5]}
    own = {"solve_rate": rate, "pass@1": rate, "pass@16": rate, "mean_nfe": 128.0}
    cell = {"decoding": "sampled", "samples": 16, "position_rule": "decoupled_confidence", "steps": 128}
    cell |= {"label": "s", "threshold": None}
    cell |= dict.fromkeys(policies, own)
    if len(policies) == 2:
        cell["difference"] = dict.fromkeys(own, {"value": -0.25, "interval": [-0.5, 0.375]})
    return [cell, cell | {"decoding": "threshold", "threshold": 0.95, "position_rule": None, "steps": None}]


@pytest.mark.parametrize("policies", [("base", "adapter"), ("adapter",)])
@pytest.mark.parametrize("width", [40, 80, 100, 140, 200])
def test_no_terminal_cuts_a_figure_of_the_table(width: int, policies: tuple[str, ...], capsys) -> None:
    cells = long_cells(*policies)
    speeds = [{"cell": "s", "policy": policy, "tokens_per_s": 1234567.0} for policy in policies]
    report = {"problems": 4, "statistics": {"confidence": 0.9}, "cells": cells, "machine": {"cells": speeds}}
    print_table(report, Console(width=width))
    told = capsys.readouterr().out
    lines = [line.rstrip() for line in told.splitlines()]
    assert max(map(len, lines)) <= max(width, 80) and "…" not in told
    # Four rates of each policy, and their differences.
    assert told.count("[0.125, 0.500]") == 4 * len(policies)
    assert told.count("[-0.500, +0.375]") == 4 * (len(policies) == 2)
    for name in ("decoupled_confidence", "sampled x16", "128", "threshold 0.95", "pass@16", *policies):
        assert name in told, name
    assert ("1,234,567" in told) == (width == 200 or (width >= 100 and len(policies) == 1))
