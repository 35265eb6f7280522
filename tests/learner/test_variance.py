"""The variance benchmark: its exact moments against the product's own draws, and its gradients against the learner's.

Shapes: G completions, m steps, N views of a group, P parameters, D sampled draws of a group's timesteps.
"""

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from learner.bench import proposals
from learner.bench.estimators import (
    ALL_STEPS,
    Estimator,
    draw_weights,
    expected_views,
    mean_weights,
    strata_probabilities,
    weight_covariance,
)
from learner.bench.snapshot import (
    GroupGradients,
    differentiate,
    draw_graded,
    group_gradients,
    load_engine,
    read_snapshot,
)
from learner.bench.variance import analyse, grid, least_variance, main, measure, rollout_variance
from learner.likelihood.scorer import PolicyScores, score
from learner.likelihood.timesteps import (
    RowSteps,
    draw_timesteps,
    draw_uniforms,
    once_probabilities,
    step_probabilities,
    step_table,
    take_steps,
)
from learner.likelihood.views import build_batch
from learner.objectives.agrpo import Agrpo
from learner.ranks.plan import plan_update
from learner.runs import checkpoint as checkpoints
from learner.settings.methods.bounds import EspoConfig
from learner.settings.methods.states import AgrpoConfig
from learner.settings.run import dump_config, load_config
from rewards.errors import ConfigError, DataError
from rewards.task import Grade
from rewards.tasks.sudoku import Sudoku
from rollout.adapters import adapter_parameters, digest
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.trajectory import GroupSpec, SamplerSpec
from tests.support.hand_made import acting_adapter, make_group, random_group

EOS = 1
DRAWS = 1000
ESTIMATORS = [
    Estimator("uniform", 0.0, "none", 3),
    Estimator("uniform", 0.0, "group", 1),
    Estimator("uniform", 0.0, "group", 3),
    Estimator("entropy", 0.0, "none", 3),
    Estimator("entropy", 0.0, "group", 3),
    Estimator("entropy", 0.2, "none", 2),
    Estimator("entropy", 0.2, "group", 2),
    Estimator("uniform", 0.0, "row", 3),
    Estimator("entropy", 0.0, "row", 3),
    Estimator("entropy", 0.2, "row", 2),
    Estimator("uniform", 0.0, "once", 1),
    Estimator("entropy", 0.2, "once", 2),
    Estimator("entropy", 0.0, "once apart", 3),
    Estimator("entropy", 0.2, "once apart", 1),
]
by_label = partial(pytest.mark.parametrize, "estimator", ids=lambda e: e.label)


class Digits(Sudoku):
    """Sudoku with a reward that even a random model earns now and then."""

    name = "digits"
    components = ("digits",)

    def grade(self, fields, completion):
        return Grade(False, {"digits": sum(c.isdigit() for c in completion) / 8})


@pytest.fixture(scope="module")
def group():
    """Four completions of four steps; the last one was cut short, so that its two last steps can't be drawn."""
    drawn = np.ones((4, 8), bool)
    whole = random_group(3)
    drawn[3] = whole.unmask_step[3] < 2
    return make_group(
        whole.completion_ids,
        whole.unmask_step,
        steps=4,
        drawn=drawn,
        entropy=0.1 + whole.entropy,
        rewards=[[0.0], [1.0], [2.0], [3.0]],
    )


@pytest.fixture(scope="module")
def made_up(group) -> tuple[GroupGradients, np.ndarray]:
    """Synthetic gradients of every (completion, step), [G, m, P]; those that completion 0 would have are 0, as of one
    without a signal."""
    table = step_table(group, "all", (EOS,))
    gradient_GmP = np.random.default_rng(0).normal(size=(4, 4, 6))
    gradient_GmP[0] = 0.0
    return as_gradients(table, gradient_GmP), gradient_GmP


CREDIT_G1 = np.array([[0.0], [-0.5], [0.5], [1.5]])


def as_gradients(table, gradient_GmP: np.ndarray) -> GroupGradients:
    live_Gm = table.eligible_Gm & gradient_GmP.any(axis=(1, 2))[:, None]
    rows_N, steps_N = np.nonzero(live_Gm)
    gradient_NP = gradient_GmP[rows_N, steps_N]
    return GroupGradients(
        table=table,
        rows_N=rows_N,
        steps_N=steps_N,
        credit_Gm=CREDIT_G1 * live_Gm,
        gram_NN=gradient_NP @ gradient_NP.T,
        mean_P=mean_weights(table)[rows_N, steps_N] @ gradient_NP,
        forwards=4.0,
        correct=0.0,
    )


def drawn_steps(estimator: Estimator, table, rng: np.random.Generator) -> list[RowSteps]:
    law = estimator.sampling, estimator.weight_floor
    if estimator.once:
        p_Gm = once_probabilities(table, sizes(table), estimator.k, *law)
        return take_steps(table, p_Gm, estimator.k, rng, together=estimator.design == "once")
    return draw_timesteps(table, draw_uniforms(rng, len(table.eligible_Gm), estimator.k, strata=estimator.design), *law)


def sizes(table) -> np.ndarray:
    return np.abs(CREDIT_G1) * table.eligible_Gm


def product_draws(estimator: Estimator, table, *, seed: int = 0, draws: int = DRAWS, weighted: bool = True):
    """[D, G, m] factors of the views' gradients, and [D, G] views, as the product's own functions draw them."""
    rng, (G, m), k = np.random.default_rng(seed), table.eligible_Gm.shape, estimator.k
    factor_DGm, views_DG = np.zeros((draws, G, m)), np.zeros((draws, G))
    for d in range(draws):
        for row, drawn in enumerate(drawn_steps(estimator, table, rng)):
            factor_DGm[d, row, drawn.steps] = (drawn.weights if weighted else drawn.counts) / (G * k)
            views_DG[d, row] = len(drawn.steps)
    return factor_DGm, views_DG


def z_score(samples_D: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance of the sample mean from what is expected, in its standard errors; 0 where both are constant and
    equal."""
    error = samples_D.std(axis=0) / len(samples_D) ** 0.5
    return np.abs(samples_D.mean(axis=0) - expected) / np.maximum(error, 1e-12)


def squared_errors(factor_DGm: np.ndarray, table, gradient_GmP: np.ndarray) -> np.ndarray:
    """[D] squared distance of each drawn estimate from the gradient with every step scored."""
    centred_DGm = factor_DGm - mean_weights(table)
    return (np.einsum("dgm,gmp->dp", centred_DGm, gradient_GmP) ** 2).sum(axis=1)


# ---- the moments


@by_label(ESTIMATORS)
def test_moments_are_those_of_the_products_draws(made_up, estimator):
    """Unbiased in every cell, the variance by the Gram matrix is the one of explicit gradients, and views are counted
    as the product merges them."""
    gradients, gradient_GmP = made_up
    table = gradients.table
    factor_DGm, views_DG = product_draws(estimator, table)
    counted = sizes(table) > 0 if estimator.once else np.ones_like(table.eligible_Gm)  # others have no gradient
    assert z_score(factor_DGm, mean_weights(table) * counted).max() < 4.5
    exact = measure([gradients, gradients], [estimator]).timestep_EN[0, 0]
    assert z_score(squared_errors(factor_DGm, table, gradient_GmP), exact) < 4.5
    assert z_score(views_DG, expected_views(estimator, table, sizes(table))).max() < 4.5


def test_control_wrong_weights_are_seen_as_biased(made_up):
    table = made_up[0].table
    factor_DGm, _ = product_draws(Estimator("entropy", 0.0, "none", 3), table, weighted=False)
    assert z_score(factor_DGm, mean_weights(table)).max() > 20


def test_control_strata_matter(group):
    """Gradients that depend on the step alone: one draw in each stratum all but fixes their sum, and the formula for
    independent draws is then far off."""
    table = step_table(random_group(3), "all", (EOS,))
    gradient_GmP = np.tile(np.eye(4), (4, 1, 1))
    gradients = as_gradients(table, gradient_GmP)
    off, on = (Estimator("uniform", 0.0, strata, 3) for strata in ("none", "group"))
    variance_off, variance_on = measure([gradients, gradients], [off, on]).timestep_EN[:, 0]
    assert variance_on < 1e-12 < 0.05 < variance_off, "12 strata cut 4 equal steps evenly"
    factor_DGm, _ = product_draws(on, table, draws=50)
    assert squared_errors(factor_DGm, table, gradient_GmP).max() < 1e-12


def test_covariance_is_that_of_sampled_factors(made_up):
    """Cell by cell, off the diagonal too: the blocks of two rows are where strata show."""
    table, estimator = made_up[0].table, Estimator("entropy", 0.2, "group", 2)
    factor_DN = product_draws(estimator, table, draws=3000)[0].reshape(3000, -1)
    centred_DN = factor_DN - mean_weights(table).ravel()
    exact_NN = weight_covariance(estimator, table, sizes(table))
    products_DNN = centred_DN[:, :, None] * centred_DN[:, None, :]
    assert z_score(products_DNN, exact_NN).max() < 5
    own_NN = weight_covariance(dataclasses.replace(estimator, design="row"), table, sizes(table))
    assert z_score(products_DNN, own_NN).max() > 10, "control: strata of their own have another covariance"
    independent_NN = weight_covariance(dataclasses.replace(estimator, design="none"), table, sizes(table))
    assert z_score(products_DNN, independent_NN).max() > 10, "control: other draws have another covariance"


def test_every_step_once_leaves_nothing_random(made_up):
    gradients, _ = made_up
    measured = measure([gradients, gradients], [ALL_STEPS])
    assert not measured.timestep_EN.any() and measured.weight_E == [1.0]
    np.testing.assert_array_equal(expected_views(ALL_STEPS, gradients.table, sizes(gradients.table)), [4, 4, 4, 2])
    assert measured.views_EN[0, 0] == (4 + 4 + 2) / 4, "completion 0 has no signal, so the learner scores none of it"


def test_one_draw_is_one_view_and_a_floor_bounds_the_weight(group):
    sharp = dataclasses.replace(group, entropy=np.where(group.unmask_step == 0, 1e-9, group.entropy).astype(np.float32))
    table = step_table(sharp, "all", (EOS,))
    for law in (Estimator("entropy", 0.0, "group", 1), Estimator("entropy", 0.2, "group", 1)):
        np.testing.assert_allclose(expected_views(law, table, sizes(table)), 1.0, rtol=1e-12)
    assert draw_weights(Estimator("entropy", 0.0, "group", 1), table, sizes(table)).max() > 1e6
    assert 2 < draw_weights(Estimator("entropy", 0.2, "group", 1), table, sizes(table)).max() <= 5


def test_strata_cut_the_law_into_equal_parts(made_up):
    p_Gm = step_probabilities(made_up[0].table, "entropy", 0.1)
    strata_SGm = strata_probabilities(p_Gm, 12)
    np.testing.assert_allclose(strata_SGm.sum(axis=2), 1.0, atol=1e-12)
    np.testing.assert_allclose(strata_SGm.mean(axis=0), p_Gm, atol=1e-12)


def test_no_law_of_independent_draws_beats_the_bound(made_up):
    gradients, _ = made_up
    laws = [Estimator(law, floor, "none", 1) for law, floor in (("uniform", 0.0), ("entropy", 0.0), ("entropy", 0.3))]
    bound = least_variance(gradients)
    assert (measure([gradients, gradients], laws).timestep_EN > bound).all()
    norms_Gm = np.zeros((4, 4))
    norms_Gm[gradients.rows_N, gradients.steps_N] = np.sqrt(np.diag(gradients.gram_NN))
    best = dataclasses.replace(gradients.table, entropy_Gm=norms_Gm + 1e-6)
    reached = measure([dataclasses.replace(gradients, table=best)] * 2, [Estimator("entropy", 0.0, "none", 1)])
    assert reached.timestep_EN[0, 0] == pytest.approx(bound, rel=1e-4), "and p by the norm reaches it"


# ---- between groups


def test_rollout_variance_is_the_trace_of_the_sample_covariance():
    mean_NP = np.random.default_rng(1).normal(size=(7, 5))
    counts_RN = np.array([[1] * 7, [0, 2, 1, 1, 3, 0, 0]])
    ours = rollout_variance(mean_NP @ mean_NP.T, counts_RN)
    for variance, counts in zip(ours, counts_RN, strict=True):
        assert variance == pytest.approx(np.trace(np.cov(np.repeat(mean_NP, counts, axis=0).T)))


def test_figures_are_relative_to_the_runs_own_setting(made_up):
    gradients, gradient_GmP = made_up
    others = [as_gradients(gradients.table, gradient_GmP * factor) for factor in (1.0, -0.5, 2.0, 0.0)]
    own = Estimator.of(AgrpoConfig(k=3, timestep_sampling="uniform", weight_floor=0.5))
    assert own == Estimator("uniform", 0.0, "group", 3), "a floor means nothing to uniform sampling"
    estimators = grid([1, 2], own)
    assert len(estimators) == 5 * 2 * 4 + 2 == len(set(estimators))
    found = analyse(measure(others, estimators), own, view_cost=2.0, seed=0)
    assert (found["groups"], found["groups_with_signal"]) == (4, 3)
    rows = {(row["law"], row["design"], row["k"]): row for row in found["estimators"]}
    for name in ("timestep_x_views_ratio", "total_x_work_ratio"):
        assert rows["uniform", "group", 3][name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    off, on = rows["uniform", "none", 2], rows["uniform", "group", 2]
    expected = on["timestep_variance"]["value"] / off["timestep_variance"]["value"]
    assert on["timestep_on_over_off"]["value"] == pytest.approx(expected) and off["timestep_on_over_off"] is None
    work = found["forwards_per_completion"] + 2.0 * on["views"]["value"]
    total = found["rollout_variance"]["value"] + on["timestep_variance"]["value"]
    assert on["total_x_work"]["value"] == pytest.approx(total * work)
    with pytest.raises(DataError, match="none of the 3 groups has a signal"):
        analyse(measure(others[3:] * 3, estimators), own, view_cost=2.0, seed=0)


# ---- on a real model


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A run directory with one checkpoint, whose adapter acts."""
    folder = tmp_path_factory.mktemp("variance") / "run"
    settings = ["completion_length=8", "block_length=8", "steps=4"]
    config = load_config(
        [
            *(f"rollout.sampler.{setting}" for setting in settings),
            *("rollout.group_size=4", "lora.r=2", "task.train_size=16", "task.test_size=16", "evaluation.problems=16"),
            f"task.name={__name__}:Digits",
            f"model.path={tiny_model}",
        ]
    )
    model = attach_lora(load_model(tiny_model), policy_adapter(tiny_model), LoraSpec(2, config.lora.alpha))
    adapter = acting_adapter(model)
    progress = checkpoints.Progress(
        iteration=7,
        policy_version=7,
        adapter_digest=digest(adapter),
        updates=7,
        nonfinite_in_a_row=0,
        ledger={},
        layout={"ranks": 0},
        best={},
        evaluations={},
        evaluated_at=0,
        train_seconds=1.0,
    )
    (folder / "checkpoints").mkdir(parents=True)
    peft_config = {"base_model_name_or_path": tiny_model}
    checkpoints.save(folder / "checkpoints", checkpoints.Checkpoint(progress, adapter, peft_config, []))
    (folder / "config.json").write_text(dump_config(config))
    return folder


@pytest.mark.parametrize(
    "config",
    [AgrpoConfig(k=3, timestep_sampling="uniform"), AgrpoConfig(k=2, weight_floor=0, low_discrepancy=False, beta=0.1)],
    ids=["uniform", "entropy-kl"],
)
def test_gram_matrix_gives_the_learners_own_gradient(run, config):
    """The plan of one update, differentiated as the learner does, has the squared norm that factors and Gram matrix
    say; and with every step once it is the mean gradient."""
    snapshot = read_snapshot(run / "checkpoints" / "iteration-000007")
    engine = load_engine(snapshot, device="cpu")
    sampler = SamplerSpec(completion_length=8, block_length=8, steps=4, position_rule="random", temperature=1.0)
    problem = Sudoku().problems("train", seed=0, size=1)[0]
    (group,) = draw_graded(engine, [GroupSpec(0, problem, 4, 5)], Digits(), sampler)
    rewards = np.array([[0.0], [1.0], [0.0], [3.0]], np.float32)  # the middle of none is the mean of all
    group = dataclasses.replace(group, rewards=rewards)
    objective, eos = Agrpo(config), engine.family.eos_token_id
    gradients = differentiate(engine, group, *objective.credit([group]), objective)
    plan = plan_update(
        [group], objective=objective, run_seed=1, update_index=0, eos_ids=(eos,), ranks=1, views_per_forward=5
    )
    parameters = list(adapter_parameters(engine.model).values())
    factor_Gm = np.zeros((4, 4))
    for forward in plan.forwards[0]:
        batch = build_batch(
            forward.views, [group], mask_id=engine.family.mask_token_id, pad_id=engine.family.pad_token_id
        )
        with torch.no_grad(), engine.model.disable_adapter():
            reference = score(engine.model, batch, family=engine.family)
        scores = score(engine.model, batch, family=engine.family)
        loss, _ = objective.loss(PolicyScores(scores, reference=reference), batch)
        (loss / plan.normaliser).backward()
        for view in forward.views:
            factor_Gm[view.row, view.step] = view.weight / plan.normaliser
    squared = sum(float(p.grad.double().square().sum()) for p in parameters)
    engine.model.zero_grad()
    factor_N = factor_Gm[gradients.rows_N, gradients.steps_N]
    assert squared > 1e-8
    assert factor_N @ gradients.gram_NN @ factor_N == pytest.approx(squared, rel=1e-3)
    mean_N = mean_weights(gradients.table)[gradients.rows_N, gradients.steps_N]
    assert mean_N @ gradients.gram_NN @ mean_N == pytest.approx(float(gradients.mean_P @ gradients.mean_P), rel=1e-3)


def test_the_command_writes_table_json_and_plot(run, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path / "out"), "--groups", "3", "--k", "1,4"]) == 0
    found = json.loads((tmp_path / "out" / "variance.json").read_text())
    assert found["snapshot"]["iteration"] == 7 and found["groups"] == 3
    assert len(found["estimators"]) == 5 * 2 * 4 + 1, "the run's own k = 4 is one of them"
    assert sum(row["own"] for row in found["estimators"]) == 1
    assert (tmp_path / "out" / "variance.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "variance.md").read_text()
    assert table.count("\n| ") == 42 and "entropy, floor 0.1 (this run)" in table
    assert "Least total variance x work" in capsys.readouterr().out


def test_proposals_are_judged_on_a_run(run, tmp_path, capsys):
    assert proposals.main([str(run), "--out", str(tmp_path), "--groups", "4", "--k", "1", "--baseline", "fills"]) == 0
    found = json.loads((tmp_path / "proposals.json").read_text())
    assert found["snapshot"]["baseline"] == "fills" and len(found["proposals"]) == 2 * len(proposals.LAWS)
    assert (tmp_path / "proposals.md").read_text() == capsys.readouterr().out
    settings = json.loads((run / "config.json").read_text())
    settings["objective"]["beta"] = 0.1
    with_kl = shutil.copytree(run, tmp_path / "run")
    (with_kl / "config.json").write_text(json.dumps(settings))
    assert proposals.main([str(with_kl), "--out", str(tmp_path / "none")]) == 2
    assert "give a run with objective.beta=0" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_groups_are_a_function_of_the_seed(run):
    first, again, other = (next(group_gradients(read_snapshot(run), 1, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.mean_P, again.mean_P)
    assert first.gram_NN.shape != other.gram_NN.shape or not np.array_equal(first.gram_NN, other.gram_NN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "1,x"], "--k 1,x is not a list of draws"),
        (["--k", "0,1"], "--k 0,1 is not a list of draws"),
        (["--groups", "1"], "--groups 1 must be 2 or more"),
        (["--groups", "17"], "17 groups are more than the run's 16 training problems"),
    ],
)
def test_wrong_arguments_are_refused(run, tmp_path, arguments, message, capsys):
    assert main([str(run), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_method_is_refused(run):
    snapshot = read_snapshot(run)
    with pytest.raises(ConfigError, match=r"objective.type=espo.*give a run with objective.type=agrpo"):
        dataclasses.replace(snapshot, config=snapshot.config.model_copy(update={"objective": EspoConfig()}))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        read_snapshot(tmp_path)
