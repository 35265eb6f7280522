"""The first minutes on a GPU, rehearsed on the CPU: each step gives its figures, and one that fails is told while the
others run."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from learner.bench import gpu, llada_8b, report
from learner.bench.first_minutes import estimates, rounding, speed, waits
from learner.bench.first_minutes.drive import STEPS, TABLES, TOTAL_S, Work, failed, figures_of, run_each
from learner.bench.policy import build_policy, prompt_ids
from learner.planning.hardware import GPUS
from rollout.models.head import Head

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_every_step_has_a_limit_and_all_fit_into_ten_minutes() -> None:
    assert max(step.limit_s for step in STEPS.values()) < TOTAL_S < 600


@pytest.mark.parametrize("step", [name for name in STEPS if name not in ("ranks", "verify_bf16")])
def test_a_step_gives_its_figures(step: str) -> None:
    figures = figures_of(step, small=True)
    assert figures and len({each.figure for each in figures}) == len(figures)
    told = json.loads(json.dumps([dataclasses.asdict(each) for each in figures]))
    assert all({"step", *of_figure} == set(TABLES["Figures"]) for of_figure in told)


def test_the_variant_rounds_logits_of_a_trained_models_size_and_nothing_else() -> None:
    """Logits of 16 to 32 lie 0.125 apart in bfloat16."""
    shape = llada_8b.SMALL
    model, _ = build_policy(shape, dtype=torch.bfloat16)
    head = next(module for module in model.modules() if isinstance(module, Head))
    rounding.sharpen(model, head, shape)
    ids, last = torch.from_numpy(prompt_ids(shape)).long()[None], torch.tensor([shape.prompt - 1])
    with torch.no_grad():
        exact = model(input_ids=ids, logit_rows=last).logits
        with rounding.rounded_logits(head):
            rounded = model(input_ids=ids, logit_rows=last).logits
        again = model(input_ids=ids, logit_rows=last).logits
    assert rounded.dtype == torch.bfloat16 and torch.equal(exact, again)
    assert float(exact.max()) == pytest.approx(rounding.PEAK_LOGIT, rel=0.01)
    assert 0 < float((exact - rounded.float()).abs().max()) <= 0.125


def test_waits_are_counted_by_line_on_a_gpu_alone() -> None:
    with waits.counted(torch.device("cpu")) as found:
        torch.ones(2).sum().item()
    assert not found
    figure = waits._figure("a step", waits.Counter({"a.py:3": 6, "b.py:1": 3}), 3, 8)
    assert (figure.measured, figure.expected, figure.note) == (3.0, "<= 8", "2 x a.py:3, 1 x b.py:1")


def test_what_fails_hangs_or_comes_too_late_is_told_and_the_others_run() -> None:
    figure = {"figure": "a figure", "measured": 1.5, "expected": None, "note": ""}
    good = f"print('noise'); print({json.dumps(json.dumps([figure]))})"
    programs = {
        "broken": "raise RuntimeError('CUDA out of memory')",
        "hangs": "import time; time.sleep(60)",
        "deaf": "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "good": good,
    }
    limits = {"hangs": 0.5, "deaf": 0.5}
    works = {name: Work([sys.executable, "-c", text], limits.get(name, 30.0)) for name, text in programs.items()}
    rows = run_each(works, total_s=60.0, to_clean_up_s=0.5)
    ended = {row["step"]: row["ended"] for row in rows if "ended" in row}
    assert ended == {
        "broken": "failed, status 1: RuntimeError: CUDA out of memory",
        "hangs": "past its limit of 0.5 s",
        "deaf": "past its limit of 0.5 s",
        "killed": "failed, status -9: no word",
        "good": "well",
    }
    assert [row for row in rows if "figure" in row] == [{"step": "good", **figure}]
    assert failed({"rows": rows}) == ["broken", "hangs", "deaf", "killed"]
    late = run_each({"good": works["good"]}, total_s=0.5)
    assert [row["ended"] for row in late] == ["left out: 0.5 s were over"]


def test_the_page_has_the_estimates_that_are_printed() -> None:
    """One line a GPU: forward, denoising step and tokens of the engine; the learner's forward and backward, without
    and with recomputed activations, and an update."""
    assert estimates.MEMORY_TB_S.keys() == GPUS.keys()
    for gpu_name in ("H200", "H100", "A100", "4090"):
        forward = estimates.forward_s(gpu_name, speed.ENGINE)
        step = forward + estimates.OUTSIDE_S
        plain, again = (estimates.learner_s(gpu_name, speed.LEARNER, recomputed=r) for r in (False, True))
        update = plain * speed.FORWARDS_OF_AN_UPDATE
        figures = [estimates.product_rate(gpu_name), forward, step, 48 / step, plain, again, update]
        line = " | ".join([gpu_name, *(f"{figure:.3g}" for figure in figures)])
        assert f"| {line} |" in PAGE.read_text(), line


def test_the_table_shows_figures_and_how_steps_ended(tmp_path: Path) -> None:
    rows = [
        {"step": "engine", "figure": "tokens/s", "measured": 117.0, "expected": 111.5, "note": "of 20 layers"},
        {"step": "engine", "seconds": 31.0, "limit s": 90.0, "ended": "well"},
        {"step": "learner", "seconds": 90.0, "limit s": 90.0, "ended": "past its limit of 90 s"},
    ]
    about = {"gpu": "a GPU", "torch": "2", "threads": 1, "load_average": 0.0, "when": "now", "commit": ""}
    result = {
        "benchmark": "first_minutes",
        "small": False,
        "machine": about,
        "rows": rows,
        "tables": TABLES,
        "bars": [],
    }
    report.store(tmp_path, result)
    assert report.load(tmp_path) == [result]
    text = report.render(result)
    assert "tokens/s" in text and text.count("past its limit") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--all", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "error: torch sees no GPU here; --small runs the same path on the CPU with a tiny model\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_runs_steps_and_keeps_their_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--all", "device", "--small", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "first_minutes.json").read_text())
    assert [row["ended"] for row in stored["rows"] if "ended" in row] == ["well"]
    assert "| device | FlashAttention in torch" in capsys.readouterr().out
