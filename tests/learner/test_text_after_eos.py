"""Completions that say something behind their first EOS are counted: programs that cut there score other texts."""

import numpy as np
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


def test_positions_that_a_short_gap_lacks_say_nothing() -> None:
    there = np.array([[True, True, False, False]] * 2)
    group = make_group(
        np.where(there, [[5, EOS, 0, 0], [5, 5, 0, 0]], 0),
        np.where(there, [0, 1, 0, 0], -1),
        steps=4,
        drawn=there,
        rewards=[[1.0], [0.0]],
        places=np.where(there, 1 + np.arange(4), -1).astype(np.int32),
    )
    update = plan_update(
        [group], objective=Agrpo(AgrpoConfig()), run_seed=0, update_index=0, eos_ids=(EOS,), ranks=1,
        views_per_forward=8,
    )  # fmt: skip
    assert update.statistics["text_after_eos"] == 0.0
