"""What a resume leaves behind: there until its first checkpoint is whole, wherever the process dies."""

import json
import os
from pathlib import Path

import pytest

from learner.runs import aside, checkpoint
from learner.runs.aside import discard, put_aside, put_back
from learner.runs.directory import RunDirectory
from learner.runs.start import open_run
from learner.settings.run import load_config
from learner.settings.saved import checkpoints_in, saved_settings
from learner.settings.sections import RunPlace
from rewards.errors import ConfigError


def save(run: RunDirectory, iteration: int, text: str) -> None:
    folder = checkpoint.place(run.checkpoints_dir, iteration)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with checkpoints of iterations 2, 3 and 4, and a copy of the third that somebody made."""
    found = RunDirectory(tmp_path / "a")
    found.samples_dir.mkdir(parents=True)
    found.write_config(json.dumps({"learner": {"lr": 0.5}}))
    for iteration in (2, 3, 4):
        save(found, iteration, "old")
    (found.checkpoints_dir / "iteration-000003-keep").mkdir()
    found.metrics_path.write_text("".join(json.dumps({"iteration": i}) + "\n" for i in range(5)))
    found.samples_path.write_text("old\n")
    return found


def contents(run: RunDirectory) -> dict[str, str]:
    return {
        str(path.relative_to(run.path)): path.read_text() if path.is_file() else ""
        for path in sorted(run.path.rglob("*"))
    }


def go_on(run: RunDirectory) -> None:
    """What a resume after iteration 2 does when its first iteration is done."""
    put_aside(run, 2)
    run.metrics_path.write_text('{"iteration": 3, "new": 1}\n')
    run.samples_path.write_text("new\n")
    run.write_config(json.dumps({"learner": {"lr": 0.25}}))


def test_until_the_first_checkpoint_a_resume_can_be_undone(run: RunDirectory) -> None:
    before = contents(run)
    go_on(run)
    assert [path.name for path in checkpoints_in(run.checkpoints_dir)] == ["iteration-000002"]
    assert (run.checkpoints_dir / "iteration-000003-keep").is_dir(), "somebody's copy"
    assert saved_settings(run.path) == {"learner": {"lr": 0.5}}, "a resume that is as good as none"
    assert put_back(run) == 2
    assert contents(run) == before
    assert put_back(run) is None and contents(run) == before


def test_with_its_first_checkpoint_a_resume_counts(run: RunDirectory) -> None:
    go_on(run)
    save(run, 3, "new")  # and killed before anything was deleted
    assert saved_settings(run.path) == {"learner": {"lr": 0.25}}
    assert put_back(run) is None
    found = contents(run)
    assert found["checkpoints/iteration-000003/state.json"] == "new" and found["metrics.jsonl"].count("new") == 1
    assert not any("iteration-000004" in name or "set-aside" in name for name in found)


def test_a_process_may_die_at_any_step(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rename and write of both directions fails once, as if the process ended there."""
    before = contents(run)
    steps = 0

    class Died(Exception):
        pass

    def dying(original, after: int):
        def call(*arguments, **named):
            nonlocal steps
            steps += 1
            if steps == after:
                raise Died
            return original(*arguments, **named)

        return call

    def at(after: int, action) -> bool:
        nonlocal steps
        steps = 0
        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (aside.shutil, "rmtree")):
                patch.setattr(module, name, dying(getattr(module, name), after))
            try:
                action()
            except Died:
                return True
        return False

    deaths = 0
    for after in range(1, 30):
        died = at(after, lambda: put_aside(run, 2))
        deaths += died
        assert saved_settings(run.path) == {"learner": {"lr": 0.5}}
        at(after, lambda: put_back(run))
        put_back(run)
        found = {name: text for name, text in contents(run).items() if not Path(name).name.startswith(".")}
        assert {name: text for name, text in found.items() if "/." not in name and name[0] != "."} == before, after
    assert deaths >= 4


def test_what_is_not_ours_is_not_deleted(run: RunDirectory) -> None:
    (run.path / "set-aside").mkdir()
    (run.path / "set-aside" / "notes.txt").write_text("mine")
    discard(run)
    assert put_back(run) is None
    assert (run.path / "set-aside" / "notes.txt").read_text() == "mine"


def test_the_next_start_puts_back_what_was_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "a")
    run.samples_dir.mkdir(parents=True)
    run.write_config(json.dumps(load_config(["learner.lr=0.5"]).model_dump(mode="json")))
    for iteration in (2, 4):
        save(run, iteration, "{}")
    put_aside(run, 2)
    run.write_config(json.dumps(load_config(["learner.lr=0.25"]).model_dump(mode="json")))
    assert load_config([f"run.dir={tmp_path}", "resume=auto"]).learner.lr == 0.5
    with pytest.raises(ConfigError, match="there are iteration-000002, iteration-000004"):
        open_run(RunPlace(resume=str(run.checkpoints_dir / "iteration-000003")), kind="run", label="x")
    assert "the resume after iteration 2 ended before its first checkpoint and is undone" in capsys.readouterr().out
    assert json.loads(run.config_path.read_text())["learner"]["lr"] == 0.5
