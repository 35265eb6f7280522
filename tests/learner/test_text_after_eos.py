"""Completions that say something behind their first EOS are counted: programs that cut there score other texts."""

import pytest

from learner.objectives.agrpo import Agrpo
from learner.ranks.plan import plan_update
from learner.settings.methods.states import AgrpoConfig
from tests.support.hand_made import make_group

EOS = 1


@pytest.mark.parametrize(
    "completions, share",
    [
        ([[2, 3, EOS, EOS], [EOS] * 4], 0.0),
        ([[2, EOS, 3, EOS], [2, 2, 2, 2]], 0.5),
        ([[EOS, 2, 2, 2], [2, EOS, EOS, 3]], 1.0),
    ],
)
def test_text_behind_the_first_end_is_counted(completions: list[list[int]], share: float) -> None:
    group = make_group(completions, [[0, 1, 2, 3]] * 2, steps=4, rewards=[[1.0], [0.0]])
    objective = Agrpo(AgrpoConfig())
    update = plan_update(
        [group], objective=objective, run_seed=0, update_index=0, eos_ids=(EOS,), ranks=1, views_per_forward=8
    )
    assert update.statistics["text_after_eos"] == share
