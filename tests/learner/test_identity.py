"""What makes a run another one is refused before anything is touched, and in a sentence; all else may change."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from learner.control.opening import FoundRun
from learner.control.subject import Grounds, grounds_of, subject_of
from learner.reporting.reporter import best_words
from learner.runs import identity
from learner.runs.checkpoint import Checkpoint, Progress, layout_of
from learner.runs.directory import RunDirectory
from learner.runs.start import finished, require_adapter_fits, starting_adapter
from learner.settings.run import RunConfig, dump_config, load_config
from learner.settings.sections import LoraSection
from rewards.errors import CheckpointError, ConfigError, UnmaskError
from rollout.adapters import pack
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.lora import LoraSpec, adapter_shapes
from rollout.models.tokenizer import build_tokenizer

SMALL = ("recipe=smoke", "task.train_size=8", "task.test_size=4", "evaluation.problems=4", "lora.r=4", "lora.alpha=4")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=32,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=64,
        vocab_size=len(tokenizer),
        max_sequence_length=512,
        init_std=0.1,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LLaDAModelLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Started:
    """A run of these settings, as it stands after two iterations."""

    def __init__(self, folder: Path, base: Path, *changes: str) -> None:
        self.arguments = [*SMALL, f"run.dir={folder}", "run.name=mine", f"model.path={base}", *changes]
        config = load_config(self.arguments)
        run_dir = RunDirectory(folder / "mine")
        run_dir.path.mkdir()
        run_dir.write_config(dump_config(config))
        self.new = FoundRun(run_dir, None, 0.0)
        grounds = grounds_of(config, subject_of(config, self.new), self.new)
        progress = Progress.before_the_first(layout_of(config.learner), grounds.identity)
        progress = dataclasses.replace(progress, iteration=2, evaluated_at=2)
        progress = Progress(**json.loads(json.dumps(dataclasses.asdict(progress))))  # as state.json brings it back
        self.found = FoundRun(run_dir, Checkpoint(progress, {}, {}, [b""]), 0.0)

    def goes_on(self, *changes: str) -> Grounds:
        return self.with_settings(load_config([*self.arguments, *changes]))

    def with_settings(self, config: RunConfig) -> Grounds:
        return grounds_of(config, subject_of(config, self.found), self.found)


@pytest.fixture
def started(tmp_path: Path, base: Path) -> Started:
    return Started(tmp_path, base)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("run.seed=7",), "run.seed=7 would make mine another run, which was started with 0"),
        (("lora.r=8",), "lora.r=8"),
        (("lora.alpha=8",), "lora.alpha=8.0"),
        (("lora.include_head=true",), "lora.include_head=true"),
        (("lora.target_modules=[q_proj]",), r'lora.target_modules=\["q_proj"\]'),
        (("task.name=countdown",), 'task.name="countdown"'),
        (("model.quantization=nf4",), 'model.quantization="nf4"'),
        (("lora.adapter=/an/adapter",), 'lora.adapter="/an/adapter"'),
        (("model.base.seed=1",), "model.base.seed=1"),
        (("run.seed=7", "lora.r=8"), "lora.r=8(.|\n)*run.seed=7|run.seed=7(.|\n)*lora.r=8"),
        (("task.train_size=6",), "training data are not those"),
        (("learner.ranks=2",), "learner.ranks=1, this run has 2"),
        (("learner.dtype=bfloat16", "learner.zero_stage=1"), "learner.zero_stage=0, this run has 1"),
    ],
)
def test_what_makes_another_run_is_refused(started: Started, changes: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UnmaskError, match=sentence) as caught:
        started.goes_on(*changes)
    assert isinstance(caught.value, ConfigError | CheckpointError)
    assert "lora.adapter=<checkpoint>/adapter" in str(caught.value), "the way on"


def test_what_does_not_may_change(started: Started) -> None:
    grounds = started.goes_on("learner.lr=0.5", "run.iterations=9", "objective.k=2", "evaluation.problems=2")
    held = started.found.resumed.progress.identity
    assert {key: held[key] for key in held if held[key] != grounds.identity[key]} == {"evaluated": held["evaluated"]}


def test_another_judge_measures_something_else_where_the_verdicts_are_its_own() -> None:
    judged = [*SMALL, "task.judge.model=a", "task.judge.rubric=Good.", "rollout.grade_timeout_s=70"]

    def digest(*changes: str) -> str:
        return identity.evaluation_digest(load_config([*judged, *changes]), [])

    assert digest() == digest("task.judge.model=b") == identity.evaluation_digest(load_config(SMALL), []), (
        "the task's verdicts"
    )
    of_a = digest("task.judge.right_from=4")
    assert of_a == digest("task.judge.right_from=4", "task.judge.timeout_s=50", "task.judge.cache=false")
    for change in ("task.judge.model=b", "task.judge.rubric=Bad.", "task.judge.highest=6", "task.judge.right_from=3"):
        assert digest("task.judge.right_from=4", change) not in (of_a, digest())


def test_a_learned_law_goes_on_over_the_thresholds_that_it_is_of(tmp_path: Path, base: Path) -> None:
    learned = ("objective.type=diffpo", "objective.threshold_lr=1e-3", "rollout.sampler.threshold=[0.5,0.9]")
    started = Started(tmp_path, base, *learned)
    started.goes_on("objective.threshold_lr=1e-2")
    started.goes_on("objective.threshold_lr=null", "rollout.sampler.threshold=0.9")
    for other in ("[0.9,0.5]", "[0.5,0.7]", "[0.5,0.7,0.9]"):
        with pytest.raises(ConfigError, match=r"rollout.sampler.threshold=.*started with \[0.5, 0.9\]"):
            started.goes_on(f"rollout.sampler.threshold={other}")


PHASES = ("objective.type=dtm", "objective.phase_iterations=4", "objective.buffer_prompts=6")
PHASES += ("rollout.prompts_per_iteration=2", "rollout.groups_per_lease=2", "rollout.group_size=3")


@pytest.mark.parametrize(
    "change",
    [
        *("objective.phase_iterations=3", "objective.buffer_prompts=8", "objective.ema=0.5"),
        *("rollout.prompts_per_iteration=4", "rollout.group_size=4", "rollout.sampler.temperature=0.5"),
        "learner.updates_per_batch=3",
    ],
)
def test_what_would_not_fit_the_buffer_or_the_weights_of_a_phase_is_refused(
    tmp_path: Path, base: Path, change: str
) -> None:
    started = Started(tmp_path, base, *PHASES)
    started.goes_on("learner.lr=0.5", "objective.tilt_step=1", "objective.completions=4")
    with pytest.raises(ConfigError, match=f"{change} would make mine another run"):
        started.goes_on(change)


def test_groups_in_numbers_that_were_used_are_refused(started: Started) -> None:
    def after(iterations: int, groups: int) -> None:
        ledger = {"last_iteration": iterations - 1, "last_group_id": groups - 1}
        progress = dataclasses.replace(started.found.resumed.progress, ledger=ledger)
        started.found = started.found._replace(resumed=dataclasses.replace(started.found.resumed, progress=progress))

    fewer = ("rollout.prompts_per_iteration=2", "rollout.groups_per_lease=2")
    after(iterations=2, groups=4)
    started.goes_on(*fewer)
    after(iterations=2, groups=5)
    with pytest.raises(ConfigError, match="prompts_per_iteration=2 would draw groups again .* 2 iterations .*; take 3"):
        started.goes_on(*fewer)
    started.goes_on("rollout.prompts_per_iteration=3", "rollout.groups_per_lease=2")


def test_a_component_that_the_reward_lacks_is_refused_before_anything_is_built(tmp_path: Path, base: Path) -> None:
    started = Started(tmp_path, base, "objective.type=egspo", "objective.step_reward=cells")
    with pytest.raises(
        ConfigError, match="objective.step_reward=nope is no component of sudoku's reward; take .*cells"
    ):
        started.goes_on("objective.step_reward=nope")


def test_another_base_of_the_same_shape_is_refused_and_the_same_elsewhere_is_not(
    started: Started, base: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    started.goes_on(f"model.path={moved}")
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="the base model's files are not those"):
        started.goes_on(f"model.path={moved}")
    shutil.copy(base / "model.safetensors", moved)
    (moved / "tokenizer.json").write_text((moved / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="the base model's files are not those"):
        started.goes_on(f"model.path={moved}")


def test_large_files_are_compared_by_pieces_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 64)
    monkeypatch.setattr(identity, "_PIECE_BYTES", 8)
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    digests = set()
    for place in (None, 0, 999, 1000):  # as it is, its first and last byte, one byte more
        data = bytearray(1000 if place != 1000 else 1001)
        if place is not None:
            data[place] ^= 1
        file.write_bytes(data)
        digests.add(identity.base_digest(str(tmp_path)))
    assert len(digests) == 4


def test_a_checkpoint_of_an_older_unmask_is_compared_with_its_runs_settings(started: Started) -> None:
    old = dataclasses.replace(started.found.resumed.progress, identity={})
    started.found = started.found._replace(resumed=dataclasses.replace(started.found.resumed, progress=old))
    started.goes_on("learner.lr=0.5")
    with pytest.raises(ConfigError, match="run.seed=7"):
        started.goes_on("run.seed=7")


def test_another_small_base_is_refused_before_it_is_built(tmp_path: Path, started: Started) -> None:
    config = load_config([*SMALL, f"run.dir={tmp_path}", f"model.cache_dir={tmp_path / 'cache'}"])
    held = started.found.resumed.progress
    held = dataclasses.replace(held, identity=held.identity | {"small_base": "sudoku-another"})
    started.found = started.found._replace(resumed=dataclasses.replace(started.found.resumed, progress=held))
    with pytest.raises(ConfigError, match="ask for the small base sudoku-.*was started on sudoku-another"):
        started.with_settings(config)
    assert not (tmp_path / "cache").exists()


def test_a_finished_run_says_so(started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, resumed = started.found.run_dir, started.found.resumed
    assert not finished(run_dir, resumed, 2), "killed before it left its results"
    run_dir.write_summary({})
    assert finished(run_dir, resumed, 2) and finished(run_dir, resumed, 1)
    assert "run mine has done 2 iterations, all of the 2" in capsys.readouterr().out
    assert not finished(run_dir, resumed, 3) and not finished(run_dir, None, 2)
    halted = dataclasses.replace(resumed.progress, evaluations={"base": {}}, evaluated_at=0)
    assert not finished(run_dir, dataclasses.replace(resumed, progress=halted), 2), "stopped in its last evaluation"


# ---- the adapter that a run starts from


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, **options: Any) -> LoraSection:
    folder.mkdir()
    tensors = {f"base_model.model.{name}": torch.full(shape, 0.1, dtype=dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none", "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return LoraSection(r=4, alpha=4.0, adapter=str(folder))


MAPS = {"x.lora_A.weight": (4, 6), "x.lora_B.weight": (6, 4)}


@pytest.mark.parametrize(
    "option",
    [
        *({"use_rslora": True}, {"use_dora": True}, {"fan_in_fan_out": True}, {"lora_bias": True}, {"bias": "all"}),
        *({"alpha_pattern": {"x": 2}}, {"rank_pattern": {"x": 2}}, {"modules_to_save": ["head"]}),
        *({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"peft_type": "LOHA"}),
        *({"layer_replication": [[0, 2]]}, {"trainable_token_indices": [1]}, {"of_a_later_peft": 3}),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    lora = write_adapter(tmp_path / "adapter", MAPS, torch.float32, **option)
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.*only plain LoRA"):
        starting_adapter(lora, "float32")


def test_an_option_that_is_off_or_of_no_effect_is_none(tmp_path: Path) -> None:
    off = {"use_rslora": False, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": "gaussian"}
    lora = write_adapter(tmp_path / "adapter", MAPS, torch.float32, task_type="CAUSAL_LM", lora_dropout=0.05, **off)
    assert len(starting_adapter(lora, "float32") or ()) == 2


def test_an_adapter_is_held_in_the_runs_dtype(tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "adapter", MAPS, torch.float32)
    wanted = pack({name: torch.full(shape, 0.1).bfloat16() for name, shape in MAPS.items()})
    found = starting_adapter(lora, "bfloat16") or {}
    assert {name: packed.data.tobytes() for name, packed in found.items()} == {
        name: packed.data.tobytes() for name, packed in wanted.items()
    }
    assert {packed.dtype for packed in found.values()} == {"bfloat16"}
    half = write_adapter(tmp_path / "half", MAPS, torch.float16)
    assert {packed.dtype for packed in (starting_adapter(half, "float32") or {}).values()} == {"float32"}


def test_an_adapter_for_other_maps_is_refused_before_anything_starts(tmp_path: Path, base: Path) -> None:
    spec = LoraSpec(4, 4.0)
    shapes = adapter_shapes(str(base), spec)
    lora = LoraSection(r=4, alpha=4.0, adapter="a")

    def refused(changed: dict[str, tuple[int, ...]], sentence: str) -> None:
        state = pack({name: torch.zeros(shape) for name, shape in changed.items()})
        with pytest.raises(ConfigError, match=sentence):
            require_adapter_fits(lora, state, str(base), spec)

    first = next(iter(shapes))
    refused({name: shape for name, shape in shapes.items() if name != first}, f"a lacks {first}.*target_modules")
    refused(shapes | {"other.lora_A.weight": (4, 4)}, "a has other.lora_A.weight")
    refused(shapes | {first: (4, 33)}, r"\[4, 33\] and this model needs \[4, 32\]")
    require_adapter_fits(lora, pack({n: torch.zeros(s) for n, s in shapes.items()}), str(base), spec)


# ---- the best checkpoint


def test_the_best_checkpoint_is_named_beside_the_last() -> None:
    places = {"last": "checkpoints/iteration-000050", "best": "checkpoints/iteration-000030"}
    best = {"iteration": 30, "solve_rate": 0.5}
    told = "the best checkpoint is {} (solve rate 0.500 after iteration 30); the last checkpoint is " + places["last"]
    assert best_words({"best": best, "checkpoints": places}) == told.format(places["best"])
    assert best_words({"best": best, "checkpoints": {"last": places["last"]}}) == told.format("not kept")
    assert "no evaluation was better than the base's (solve rate 0.500)" in best_words(
        {"best": best | {"iteration": 0}}
    )
    assert best_words({"best": {}}) == "no checkpoint was saved"
