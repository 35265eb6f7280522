"""The log-prob of each written token from all others, and what an evaluation makes of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.evaluation.cells import Cell
from learner.evaluation.naturalness import Naturalness
from learner.evaluation.report import cell_reports
from learner.evaluation.results import Chunk
from learner.likelihood.pseudo import pseudo_logp
from rewards.infill import SEPARATOR
from rewards.task import Problem, get_task
from rollout.models.encoding import EncodedPrompt
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.spans import Gap
from rollout.trajectory import SamplerSpec
from tests.support.evaluations import settings
from tests.support.small_policies import FAMILIES, write_policy

PROMPT = EncodedPrompt([10, 11, 12, 13, 14], (Gap(2, (3, 5)), Gap(4, (2,))))
CONTENTS = [[20, 21, 22], [23, 24]]
TEXT = [10, 11, 20, 21, 22, 12, 13, 23, 24, 14]
WRITTEN = [2, 3, 4, 7, 8]


def by_hand(model: Any, family: Any, ids: list[int], at: int) -> float:
    """Of the token at this place, one text at a time."""
    masked = [family.mask_token_id if place == at else token for place, token in enumerate(ids)]
    rows = torch.tensor([at - family.logit_shift])
    with torch.no_grad():
        (logits_V,) = model(input_ids=torch.tensor([masked]), attention_mask=None, logit_rows=rows).logits.double()
    logits_V[family.mask_token_id] = -torch.inf
    return float(logits_V.log_softmax(0)[ids[at]])


@pytest.mark.parametrize("name", FAMILIES)
def test_each_token_is_scored_from_all_others(name: str, tmp_path: Path) -> None:
    write_policy(tmp_path, name)
    model, family = load_model(tmp_path), policy_adapter(tmp_path)
    found = pseudo_logp(model, family, PROMPT, CONTENTS, rows=2)
    np.testing.assert_allclose(found, [by_hand(model, family, TEXT, at) for at in WRITTEN], atol=1e-5)
    other_end = pseudo_logp(model, family, PROMPT._replace(ids=[10, 11, 12, 13, 15]), CONTENTS)
    assert np.abs(found - other_end).max() > 1e-3, "the text on the right counts"
    behind = pseudo_logp(model, family, EncodedPrompt(TEXT[:7]), [TEXT[7:]])
    np.testing.assert_allclose(behind, [by_hand(model, family, TEXT, at) for at in (7, 8, 9)], atol=1e-5)
    assert pseudo_logp(model, family, PROMPT, [[], []]).shape == (0,)


def test_an_evaluation_reports_it_for_each_policy_and_for_what_stood_there(tmp_path: Path) -> None:
    write_policy(tmp_path, "bert")
    problems = [Problem(f"p{n}", {"chain": "EVQLCAR" + n + "DYWGQGT", "loops": [[5, 9]]}) for n in "GS"]
    config = settings(
        "recipe=antibody_cdr", f"model.path={tmp_path}", "adapter=none", "decode.samples=3", "statistics.naturalness=2"
    )
    base = Naturalness(config, str(tmp_path), problems)
    cell = Cell("sampled", SamplerSpec(20, 20, steps=10, position_rule="random", temperature=1.0), samples=3)

    def chunk(*texts: str) -> Chunk:
        given: dict[str, Any] = {
            "correct": [0, 1, 0],
            "nfe": [5] * 3,
            "tokens": [9] * 3,
            "components": {"x": [0.0] * 3},
        }
        return Chunk([{"id": problem.id, "completions": list(texts), **given} for problem in problems], 0, 1.0)

    evaluated = {(cell, "base"): [chunk("ARDY", "GGSS", "K")], (cell, "adapter"): [chunk("ARDY", "ARDY", "")]}
    found = base.of_completions(evaluated)
    assert found[cell, "base"].shape == (2,) and (found[cell, "base"] != found[cell, "adapter"]).all()
    alone = base.of_completions({(cell, "base"): [chunk("ARDY", "ARDY", "W")]})
    np.testing.assert_array_equal(found[cell, "adapter"], alone[cell, "base"])  # the third isn't asked for
    (report,) = cell_reports(evaluated, pass_at=(1, 3), confidence=0.95, resamples=50, seed=0, naturalness=found)
    assert report["base"]["naturalness"]["value"] == pytest.approx(found[cell, "base"].mean())
    difference = found[cell, "adapter"].mean() - found[cell, "base"].mean()
    assert report["difference"]["naturalness"]["value"] == pytest.approx(difference)
    assert report["base"]["distinct_share"] == 1.0 and report["adapter"]["distinct_share"] == pytest.approx(2 / 3)
    original = base.of_originals()
    assert original is not None and -10 < original < 0


def test_a_completion_without_tokens_is_as_unnatural_as_can_be_told(tmp_path: Path) -> None:
    write_policy(tmp_path, "bert")
    problems = get_task("tests.support.gapped:Gapped").problems("test", seed=0, size=1)
    config = settings(
        "recipe=antibody_cdr",
        "task.name=tests.support.gapped:Gapped",
        f"model.path={tmp_path}",
        "adapter=none",
        "statistics.naturalness=1",
    )
    base = Naturalness(config, str(tmp_path), problems)
    cell = Cell("greedy", SamplerSpec(20, 20, steps=10, position_rule="random", temperature=0.0))
    given: dict[str, Any] = {"correct": [0], "nfe": [5], "tokens": [9], "components": {"x": [0.0]}}

    def of(text: str) -> float:
        chunk = Chunk([{"id": "test-0", "completions": [text], **given}], 0, 1.0)
        (value_N,) = base.of_completions({(cell, "base"): [chunk]}).values()
        return float(value_N[0])

    assert of(SEPARATOR) == pytest.approx(-np.log(len(base._tokenizer)))
    assert of(f"1234{SEPARATOR}567") != of(SEPARATOR) and base.of_originals() is None
