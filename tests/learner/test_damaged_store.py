"""A run whose store is damaged says so with the way out, before anything else, and the way out works."""

import dataclasses
from pathlib import Path

import pytest
import torch

from learner.control.opening import About, begun_run, found_run
from learner.runs import checkpoint
from learner.settings.run import load_config
from rewards.errors import StoreError
from rollout.adapters import digest, pack
from services.store import schema
from tests.support import store_rows

PAGE = 4096


def about(runs: Path, *settings: str) -> About:
    config = load_config(["recipe=smoke", f"run.dir={runs}", "run.name=a", *settings])
    return About(
        config=config,
        run=config.run,
        store=config.store,
        trackers=(),
        kind="run",
        task="sudoku",
        objective="agrpo",
        iterations=4,
        argv=["recipe=smoke"],
        default_recipe=None,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two iterations, the second one saved."""
    its = about(tmp_path)
    with found_run(its) as found, begun_run(its, found) as begun:
        for iteration in (1, 2):
            begun.reporter.iteration(iteration, {"reward/mean": iteration / 2})
        adapter = pack({"model.a.lora_A.weight": torch.ones(2, 6)})
        new = checkpoint.Progress.before_the_first({"ranks": 1}, {})
        progress = dataclasses.replace(new, iteration=2, adapter_digest=digest(adapter))
        saved = checkpoint.Checkpoint(progress, adapter, {"peft_type": "LORA"}, [b"shard"])
        checkpoint.save(begun.run_dir.checkpoints_dir, saved)
    return tmp_path / "a"


def not_sqlite(store: Path) -> None:
    store.write_bytes(b"this is no database at all" * 100)


def tables_overwritten(store: Path) -> None:
    """The first page is whole, so the store can still be opened."""
    whole = store.read_bytes()
    store.write_bytes(whole[:PAGE] + b"\xff" * (len(whole) - PAGE))


@pytest.mark.parametrize("damage", [not_sqlite, tables_overwritten])
def test_a_damaged_store_is_one_sentence_with_a_way_out_that_works(damage, run: Path) -> None:
    store = run / "store.sqlite"
    again = about(run.parent, "run.resume=auto")
    with found_run(again) as found:
        assert found.resumed is not None, "control: this one can be resumed"
    damage(store)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path != store}
    way_out = pytest.raises(StoreError, match="move this file aside.*metrics.jsonl")
    with way_out as refused, found_run(again) as found, begun_run(again, found):
        pass
    assert str(store) in str(refused.value) and len(str(refused.value).splitlines()) == 1
    for name in ("config.json", "metrics.jsonl", "starts.jsonl"):
        assert (run / name).read_bytes() == before[name], "nothing was changed"

    for path in run.glob("store.sqlite*"):
        path.rename(run.parent / path.name)
    with found_run(again) as found, begun_run(again, found) as begun:
        begun.take_hold()
        begun.reporter.iteration(3, {"reward/mean": 1.5})
        assert begun.reporter.flush(10)
        engine = schema.open_engine(begun.run_dir.store_url, create=False)
        kept = store_rows.metric_series(engine, "a", ["reward/mean"])["reward/mean"]
        assert kept == [(1, 0.5), (2, 1.0), (3, 1.5)]
        assert any("filled from metrics.jsonl" in event["text"] for event in store_rows.list_events(engine, "a"))
        engine.dispose()


def test_a_store_that_is_whole_is_not_filled_again(run: Path) -> None:
    again = about(run.parent, "run.resume=auto")
    with found_run(again) as found, begun_run(again, found) as begun:
        assert not begun.reporter.store.is_new


def test_a_shared_store_that_is_damaged_has_the_same_way_out(tmp_path: Path) -> None:
    shared = tmp_path / "shared.sqlite"
    not_sqlite(shared)
    its = about(tmp_path, f"store.url=sqlite:///{shared}")
    with pytest.raises(StoreError, match="move this file aside"), found_run(its) as found, begun_run(its, found):
        pass
    assert not (tmp_path / "a").exists(), "and the name is not used up"
