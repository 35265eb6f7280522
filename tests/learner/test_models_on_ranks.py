"""The other families under ZeRO-3 on two ranks: every gathering is collective, so a mixture's experts must run on all
ranks alike, whatever tokens each has."""

from collections.abc import Iterator

import pytest

from learner.bench.first_minutes import ranks
from learner.ranks.group import LearnerGroup
from rollout.adapters import digest
from tests.support.learner_ranks import (
    draw_batch,
    importing_ray,
    plain_gradient,
    put,
    random_adapter,
    relative,
    settings,
)
from tests.support.published import write_published

pytestmark = pytest.mark.slow

COMPLETIONS, K = 16, 4
TARGETS = {"dream": {}, "llada_moe": {"lora__target_modules": "[q_proj, up_proj]"}}  # with adapters on the experts


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with importing_ray(cpus=4):
        yield


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=pytest.mark.heavy) if one == "llada_moe" else one for one in TARGETS]
)
def test_zero_3_with_recomputed_activations_gives_the_plain_gradient(family, tmp_path):
    write_published(tmp_path, family)
    model_path = str(tmp_path)
    config = settings(
        learner__ranks=2, learner__zero_stage=3, learner__activation_checkpointing="true", **TARGETS[family]
    )
    adapter = random_adapter(model_path, config)
    batch = draw_batch(model_path, config, adapter)
    expected = plain_gradient(model_path, config, adapter, batch, normaliser=COMPLETIONS * K)
    group = LearnerGroup(config, model_path, adapter=adapter, shards=None)
    try:
        error = relative(expected, group.gradient(put(batch), 0))
        published = group.publish()
    finally:
        group.close()
    print(f"{family}: relative L2 {error:.1e}")
    assert error <= 1e-4
    assert published.digest == digest(adapter)
    assert any(".experts." in name for name in published.state) == (family == "llada_moe")


def test_two_ranks_as_the_first_minutes_on_a_gpu_have_them():
    figures, gradient = ranks.of_stage(1, gpus_per_rank=0)
    measured = {figure.figure: figure.measured for figure in figures}
    assert measured["updates applied, stage 1"] == 1 and measured["s an update, stage 1"] > 0
    assert ranks.relative(gradient, gradient) == 0.0
