"""The AGRPO loss: recorded reference losses, clipping, the KL term, and sums that don't depend on the layout."""

import dataclasses

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.timesteps import draw_timesteps, step_table
from learner.likelihood.views import ViewBatch, build_batch, step_view
from learner.objectives import make_objective
from learner.objectives.agrpo import Agrpo
from learner.objectives.statistics import Statistics
from learner.ranks.plan import plan_update
from learner.settings.methods.states import AgrpoConfig
from tests.support.hand_made import make_group, random_group, recorded_case

EOS = 1
RECORDED = ["01", "03", "05", "07", "11", "13"]


def build(views, groups) -> ViewBatch:
    return build_batch(views, groups, mask_id=99, pad_id=98)


def scored(logp_N: torch.Tensor, reference_N: torch.Tensor | None = None) -> PolicyScores:
    """Scores whose supports hold all of the law."""
    reference = None if reference_N is None else Scores(reference_N, torch.ones_like(reference_N))
    return PolicyScores(Scores(logp_N, torch.ones_like(logp_N)), reference=reference)


def one_token(advantage: float, ratio: float, weight: float = 1.0, **config) -> tuple[float, float]:
    """Loss of one token and its derivative by the log-prob."""
    group = make_group([[5]], [[0]], steps=1, rewards=[[0.0]])
    batch = build([step_view(group, 0, 0, 0, advantage, weight)], [group])
    logp = torch.tensor([-1.0 + np.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, _ = Agrpo(AgrpoConfig(**config)).loss(scored(logp), batch)
    loss.backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize("number", RECORDED)
def test_recorded_reference_losses(number):
    """Each Monte-Carlo sample's loss and clip fractions, from the recorded log-probs; then all samples merged."""
    group, arrays, settings = recorded_case(number)
    k, divisor = settings["k"], settings["k"] * settings["G"]
    clip_high = settings["eps_high"] or settings["eps"]
    agrpo = Agrpo(AgrpoConfig(k=k, clip_low=settings["eps"], clip_high=clip_high))
    new_logp_GC = np.zeros(group.completion_ids.shape, dtype=np.float32)
    for draw in range(k):
        np.put_along_axis(new_logp_GC, arrays["mc_positions"][draw], arrays["new_logps"][draw], axis=1)

    def loss_of(views):
        batch = build(views, [group])
        rows = np.array([view.row for view in views])[batch.view_of_score]
        return agrpo.loss(scored(torch.from_numpy(new_logp_GC[rows, batch.position])), batch)

    for draw in range(k):
        weights, steps = arrays["importance_weights"][:, draw], arrays["mc_steps"][:, draw]
        views = [
            step_view(group, 0, row, int(steps[row]), float(arrays["advantages"][row]), float(weights[row]))
            for row in range(group.size)
        ]
        loss, figures = loss_of(views)
        assert loss.item() / divisor == pytest.approx(arrays["loss_per_mc_sample"][draw], abs=2e-6)
        assert figures.values()["clip_fraction/low"] == pytest.approx(arrays["low_clip"][draw], abs=1e-6)
        assert figures.values()["clip_fraction/high"] == pytest.approx(arrays["high_clip"][draw], abs=1e-6)
    table = step_table(group, "until_last_token", (settings["eos"],))
    drawn = draw_timesteps(table, arrays["u"].astype(np.float64), settings["importance_sampling"])
    merged = [
        step_view(group, 0, row, int(step), float(arrays["advantages"][row]), float(weight))
        for row in range(group.size)
        for step, weight in zip(drawn[row].steps, drawn[row].weights, strict=True)
    ]
    assert len(merged) < group.size * k, "control: some draws of the case do repeat"
    assert loss_of(merged)[0].item() / divisor == pytest.approx(arrays["loss_per_mc_sample"].sum(), abs=5e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.1, -2.2, -2.2),
        (2.0, 1.5, -2.6, 0.0),  # clipped at 1 + 0.3
        (2.0, 0.5, -1.0, -1.0),  # the minimum keeps the worse value
        (-2.0, 0.95, 1.9, 1.9),
        (-2.0, 0.5, 1.8, 0.0),  # clipped at 1 - 0.1
        (-2.0, 1.5, 3.0, 3.0),
        (2.0, 1.0, -2.0, -2.0),
    ],
)
def test_asymmetric_clip(advantage, ratio, loss, slope):
    assert one_token(advantage, ratio, clip_low=0.1, clip_high=0.3) == pytest.approx((loss, slope))
    weighted = one_token(advantage, ratio, weight=2.5, clip_low=0.1, clip_high=0.3)
    assert weighted == pytest.approx((2.5 * loss, 2.5 * slope))


def test_kl_is_the_current_policys_in_value_and_gradient():
    """T6, V = 3: the sum over tokens of p_old * rho * k3 is KL(current || reference), and so is its gradient."""
    rng = np.random.default_rng(0)
    theta = torch.tensor(rng.normal(size=3), requires_grad=True)
    old, reference = (torch.tensor(rng.normal(size=3)).log_softmax(0) for _ in range(2))
    group = make_group(np.arange(3)[:, None], np.zeros((3, 1)), steps=1)
    batch = build([step_view(group, 0, v, 0, 0.0, float(old[v].exp())) for v in range(3)], [group])
    batch = dataclasses.replace(batch, logp=old.numpy())
    beta = 0.3
    loss, figures = Agrpo(AgrpoConfig(beta=beta)).loss(scored(theta.log_softmax(0), reference), batch)
    (ours,) = torch.autograd.grad(loss, theta)
    current = theta.log_softmax(0)
    kl = (current.exp() * (current - reference)).sum()
    (exact,) = torch.autograd.grad(kl, theta)
    assert loss.item() == pytest.approx(beta * kl.item(), rel=1e-12)
    np.testing.assert_allclose(ours, beta * exact, rtol=1e-10)
    assert "kl" in figures.values()

    current = theta.log_softmax(0)
    d = reference - current
    detached = (old.exp() * (current - old).exp().detach() * (d.exp() - d - 1)).sum()
    (wrong,) = torch.autograd.grad(detached, theta)
    assert not np.allclose(wrong, exact, rtol=0.05), "control: with the ratio detached the gradient is another"


def test_the_reference_is_asked_for_only_with_a_kl_term():
    assert not Agrpo(AgrpoConfig()).needs.reference
    assert make_objective(AgrpoConfig(beta=0.1)).needs.reference


def table_gradient(groups, *, ranks: int, views_per_forward: int, per_forward_divisor: bool = False):
    """Gradient of a table of token logits that stands in for the model, summed over ranks; with the merged figures."""
    agrpo = Agrpo(AgrpoConfig(k=3, timestep_sampling="entropy", weight_floor=0, beta=0.05))
    plan = plan_update(
        groups,
        objective=agrpo,
        run_seed=1,
        update_index=0,
        eos_ids=(EOS,),
        ranks=ranks,
        views_per_forward=views_per_forward,
    )
    theta = torch.tensor(np.random.default_rng(0).normal(size=(8, 10)) * 0.1, requires_grad=True)
    figures = []
    for forward in (forward for rank in plan.forwards for forward in rank):
        if forward.is_pad:
            continue
        batch = build(forward.views, groups)
        logp_NV = theta.log_softmax(1)[batch.position]
        logp_N = logp_NV.gather(1, torch.from_numpy(batch.targets)[:, None]).squeeze(1)
        loss, part = agrpo.loss(scored(logp_N, torch.full_like(logp_N, -2.0)), batch)
        (loss / (len(forward.views) if per_forward_divisor else plan.normaliser)).backward()
        figures.append(part)
    return theta.grad.numpy(), Statistics.merged(figures).values()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("views_per_forward", [1, 5, 8])
def test_gradient_and_figures_do_not_depend_on_the_layout(ranks, views_per_forward):
    groups = [random_group(i, prompt=3 + i) for i in range(4)]
    whole, figures = table_gradient(groups, ranks=1, views_per_forward=1000)
    ours, ours_figures = table_gradient(groups, ranks=ranks, views_per_forward=views_per_forward)
    assert np.linalg.norm(ours - whole) <= 1e-12 * np.linalg.norm(whole)
    assert ours_figures == pytest.approx(figures)
    assert {
        "ratio/mean",
        "ratio/max",
        "log_ratio/rms",
        "log_ratio/abs_max",
        "clip_fraction/low",
        "kl",
    } <= figures.keys()


def test_control_a_divisor_per_forward_depends_on_the_layout():
    groups = [random_group(i) for i in range(4)]
    whole, _ = table_gradient(groups, ranks=1, views_per_forward=1000, per_forward_divisor=True)
    ours, _ = table_gradient(groups, ranks=2, views_per_forward=5, per_forward_divisor=True)
    assert np.linalg.norm(ours - whole) > 1e-2 * np.linalg.norm(whole)


def test_statistics_of_parts_add_up():
    parts = [
        Statistics({"a": (1.0, 2.0)}, {"b": (9.0, 1.0)}, {"c": -3.0}, {"d": 1.0}),
        Statistics({"a": (4.0, 3.0)}, {"b": (16.0, 3.0)}, {"c": -5.0}, {"d": 2.0}),
        Statistics(),
    ]
    assert Statistics.merged(parts).values() == {"a": 1.0, "b": 2.5, "c": -3.0, "d": 3.0}
