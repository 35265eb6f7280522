"""What a process asks of its GPU, by the calls: there is none here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from learner.finetuning.rank import SftRank
from learner.finetuning.settings import SftConfig
from learner.planning.remedy import remedy
from learner.ranks import group
from learner.ranks.rank import rank_manners
from learner.reporting.workers import Workers
from learner.settings.run import RunConfig, load_config
from learner.supply import actors
from rewards.errors import OutOfMemory
from rewards.task import Problem
from rollout.actor import ActorSettings, RolloutActor
from rollout.engines.torch import TorchEngine
from rollout.gpu import CUDA_ALLOWANCE, NCCL_ALLOWANCE, GpuManners
from rollout.models import layers
from rollout.trajectory import GroupSpec, SamplerSpec
from rollout.usage import process_usage

TOTAL = 24 << 30
FULL = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1 is free."


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of CUDA, and of torch about determinism."""
    asked: list[Any] = []

    def recorded(name: str, answer: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            asked.append((name, *args, *kwargs.values()))
            return answer

        return call

    for name in ("set_per_process_memory_fraction", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, recorded(name))
    for name in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, recorded(name))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", recorded("deterministic"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL // 2, TOTAL))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return asked


def on_a_shared_gpu(*settings: str) -> RunConfig:
    return load_config(["recipe=llada_gsm8k_24gb", *settings])


def test_a_process_keeps_to_its_share_and_gives_back_what_it_does_not_use(calls: list[Any]) -> None:
    for manners, beside in (
        (GpuManners(0.4), CUDA_ALLOWANCE),
        (GpuManners(0.6, several=True), CUDA_ALLOWANCE + NCCL_ALLOWANCE),
    ):
        manners.begin()
        manners.rest()
        ((name, fraction), rested) = calls
        assert name == "set_per_process_memory_fraction" and rested == ("empty_cache",)
        assert fraction * TOTAL == pytest.approx(manners.share * TOTAL - beside)
        calls.clear()
    for manners in (GpuManners(1.0), GpuManners(2.0), GpuManners()):
        manners.begin()
        manners.rest()
    assert calls == [], "control: a whole GPU, several, and none"


def test_both_kinds_of_process_find_the_allocator_set_and_the_users_own_value_stays(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_a_shared_gpu()
    both = rank_manners(config), actors._manners(config)
    assert [manners.environment() for manners in both] == [{"PYTORCH_ALLOC_CONF": "expandable_segments:True"}] * 2
    assert [manners.share for manners in both] == [0.6, 0.4]
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:512")
        assert both[0].environment()[name] == "max_split_size_mb:512"
        assert "expandable_segments:True" not in both[0].environment().values()
    on_cpus = load_config(["recipe=sudoku", "learner.deterministic=true"])
    assert rank_manners(on_cpus).environment() == actors._manners(on_cpus).environment() == {}, "control"


def test_pool_and_ranks_give_it_to_their_processes(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(actors, "RolloutPool", lambda settings, **options: seen.update(options, settings=settings))
    actors.start_actors(on_a_shared_gpu("learner.deterministic=true"), "nowhere", None, seed=0)
    told = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert seen["environment"] == {"OMP_NUM_THREADS": "1", **told}
    assert seen["settings"].make_engine.keywords["manners"] == GpuManners(0.4, deterministic=True)
    assert "rollout.max_rows=" in seen["settings"].remedy()

    class Launched:
        def options(self, **options: Any) -> "Launched":
            seen.update(options)
            return self

        def remote(self, *args: Any) -> None: ...

    monkeypatch.setattr(group, "with_pulse", lambda rank_type: Launched())
    ranks: Any = object.__new__(group.LearnerGroup)
    ranks.config, ranks._rank_type, ranks._placement = on_a_shared_gpu(), None, None
    ranks._launch("nowhere", 0)
    assert seen["runtime_env"]["env_vars"]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUBLAS_WORKSPACE_CONFIG" not in seen["runtime_env"]["env_vars"], "control: it wasn't asked to repeat itself"


def test_a_deterministic_process_says_so_to_torch(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    manners = GpuManners(1.0, deterministic=True)
    manners.begin()
    assert calls == [
        ("deterministic", True, True),
        *((f"enable_{kernel}_sdp", False) for kernel in ("flash", "mem_efficient", "cudnn")),
    ]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert manners.environment()["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    calls.clear()
    GpuManners(1.0).begin()
    GpuManners(0.0, deterministic=True).begin()
    assert calls == [], "control: not asked for, and no GPU"


def test_a_deterministic_process_uses_no_kernel_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(1, 3, dtype=torch.int64)
    monkeypatch.setattr(layers, "has_varlen_flash", lambda device: True)
    assert isinstance(layers.visibility(mask, torch.bfloat16), layers.Sequences), "control"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert isinstance(layers.visibility(mask, torch.bfloat16), torch.Tensor)


def test_an_engine_gives_back_after_each_call(calls: list[Any], tiny_model: str) -> None:
    engine = TorchEngine(model_path=tiny_model, lora=None, max_rows=2, threads=1, manners=GpuManners(0.5))
    assert [name for name, *_ in calls] == ["set_per_process_memory_fraction"]
    sampler = SamplerSpec(8, 8, 2, "random", temperature=1.0)
    engine.generate([GroupSpec(0, Problem("p", {}), 2, 3)], [[5, 6, 7]], sampler)
    assert [name for name, *_ in calls] == ["set_per_process_memory_fraction", "empty_cache"]


def test_peaks_are_told_and_become_metrics(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    assert "gpu" not in process_usage(), "control: nothing here computes on a GPU"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a pretended one")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 << 30)
    usage = process_usage()
    assert (usage["gpu"]["peak_allocated_bytes"], usage["gpu"]["peak_reserved_bytes"]) == (3 << 30, 5 << 30)

    class Group:
        descriptions = ({"usage": {}}, {"usage": usage})

    workers: Any = Workers(None)  # type: ignore[arg-type]  # tells no store here
    assert workers.gpu_peaks() == {}, "control"
    workers.learner = Group()
    assert workers.gpu_peaks() == {"machine/gpu_allocated_gib/rank": 3.0, "machine/gpu_reserved_gib/rank": 5.0}


# ---- when it is full


def test_a_full_gpu_is_one_sentence_with_what_the_plan_changes_first(tiny_model: str) -> None:
    class Full(TorchEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError(FULL)

    config = on_a_shared_gpu()
    make_engine = partial(Full, model_path=tiny_model, lora=None, max_rows=2, threads=1)
    what = partial(remedy, config, "rollout actor")
    actor = RolloutActor("rollout-3", ActorSettings(make_engine, "gsm8k", 1, 1.0, 1.0, 0, "", remedy=what))
    actor._engine = make_engine()
    with pytest.raises(OutOfMemory) as told:
        actor._generate([], SamplerSpec(8, 8, 2, "random", temperature=1.0))
    assert str(told.value) == (
        "rollout-3 ran out of its GPU's memory: it wanted 2.50 GiB more and holds 0.00 GiB; change first: "
        "rollout.max_rows=4"
    )
    assert told.value.__suppress_context__, "its frames hold what fills the memory"


@pytest.mark.parametrize(
    "recipe, process, change",
    [
        ("llada_gsm8k", "learner rank", "learner.activation_checkpointing=true"),
        ("llada_gsm8k_24gb", "learner rank", "learner.views_per_forward=3"),
        ("llada_gsm8k", "rollout actor", "rollout.max_rows=8"),
    ],
)
def test_the_remedy_is_of_the_process_that_was_full(recipe: str, process: str, change: str) -> None:
    assert remedy(load_config([f"recipe={recipe}"]), process) == f"change first: {change}"


def test_a_rank_of_demonstrations_goes_by_the_same_order() -> None:
    class Full(SftRank):
        def _work(self, *args: Any) -> Any:
            raise torch.OutOfMemoryError(FULL)

    given: dict[str, Any] = {"data": {"train": "x.jsonl"}, "model": {"path": "x"}, "learner": {"zero_stage": 1}}
    for changes, says in (
        ({}, "learner.activation_checkpointing=true"),
        ({"learner": {"activation_checkpointing": True}, "sft": {"rows_per_forward": 4}}, "sft.rows_per_forward=2"),
        ({"sft": {"rows_per_forward": 1}}, "learner.dtype=bfloat16 learner.zero_stage=1"),
        ({"learner": {"dtype": "bfloat16"}}, "model.quantization=nf4 learner.zero_stage=1"),
    ):
        given = {key: {**given.get(key, {}), **changes.get(key, {})} for key in (*given, *changes)}
        with pytest.raises(OutOfMemory, match=f"^learner rank 1 .* change first: {says}$"):
            Full(SftConfig.model_validate(given), "x", 1, 2).update([], 0, 0.0)
