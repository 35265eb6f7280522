"""In which dtype gradients add up over ranks: float32, also where forwards are in bfloat16."""

from collections.abc import Iterator

import pytest

from learner.ranks.optim import deepspeed_config
from rollout.adapters import AdapterState
from tests.support.learner_ranks import (
    ProbedGroup,
    adamw_steps,
    draw_batch,
    importing_ray,
    put,
    random_adapter,
    settings,
)

BFLOAT16 = {"learner__dtype": "bfloat16", "learner__ranks": 2, "learner__views_per_forward": 8}


def test_deepspeed_is_told_to_add_up_in_float32() -> None:
    whole = deepspeed_config(zero_stage=1, dtype="float32", max_grad_norm=1.0, trained=10)
    halved = deepspeed_config(zero_stage=1, dtype="bfloat16", max_grad_norm=1.0, trained=10)
    assert halved["communication_data_type"] == halved["data_types"]["grad_accum_dtype"] == "fp32"
    assert {"bf16", "data_types", "communication_data_type"} == set(halved) - set(whole), "float32 needs no word of it"


@pytest.fixture(scope="module")
def pair(tiny_model: str) -> Iterator[ProbedGroup]:
    with importing_ray(cpus=2):
        group = ProbedGroup(settings(**BFLOAT16, learner__zero_stage=1), tiny_model)
        try:
            yield group
        finally:
            group.close()


@pytest.fixture(scope="module")
def adapter(tiny_model: str) -> AdapterState:
    return random_adapter(tiny_model, settings(**BFLOAT16, learner__zero_stage=1))


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_cross_ranks_in_float32(
    pair: ProbedGroup, tiny_model: str, adapter: AdapterState, stage: int
) -> None:
    config = settings(**BFLOAT16, learner__zero_stage=stage)
    refs = put(draw_batch(tiny_model, config, adapter))
    crossed = []
    for told in (True, False):
        pair.ask("tell_deepspeed", {} if told else {"communication_data_type": None})
        pair.restart(config, adapter)
        first, second = pair.ask("reduced_in_an_update", refs, 1e-3)
        assert first and first == second and adamw_steps(pair) == {1}
        crossed.append(first)
    print(f"stage {stage}: {crossed}")
    assert {dtype for _, dtype in crossed[0]} == {"float32"}
    assert {dtype for _, dtype in crossed[1]} == {"bfloat16"}, "control: without the setting"
