"""What each metric of a run is, what is healthy, and what to do when it is not.

The one table of it: the pages take it from the API, and docs are made from it. ``{...}`` in a name stands for a part
that differs from run to run. A test compares the names with those that the code writes.
"""

import re
from dataclasses import dataclass
from typing import Literal

Group = Literal["learning", "policy health", "throughput", "internals"]


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them."""

    name: str
    group: Group
    what: str
    """One sentence."""
    healthy: str = ""
    act: str = ""
    """What to do when it isn't; empty where nothing is to be done."""
    unit: str = ""

    @property
    def pattern(self) -> str:
        """A regular expression that matches all of its names, whole; the same in Python and JavaScript."""
        parts = re.split(r"\{[^}]*\}", self.name)
        return "^" + ".+".join(part.replace(".", r"\.") for part in parts) + "$"


def describe(name: str) -> Metric | None:
    """The entry of a metric; None for one that the table lacks (a task's or a tracker's own)."""
    exact = next((metric for metric in METRICS if metric.name == name), None)
    return exact or next((metric for metric in METRICS if re.match(metric.pattern, name)), None)


_LEARNING = (
    Metric(
        "reward/mean",
        "learning",
        "Mean reward of the iteration's completions, the sum of its parts.",
        "It rises over tens of iterations, with noise from one to the next.",
        "Flat from the start: see groups/no_signal_share. Falling: a lower learner.lr, from the best checkpoint.",
    ),
    Metric(
        "reward/{part}",
        "learning",
        "Mean of one part of the reward.",
        "The part that tells right from wrong rises, not only the parts for form.",
        "Only form is learned: lower the weight of its parts.",
    ),
    Metric(
        "solve_rate",
        "learning",
        "Share of the iteration's completions that are right. They are sampled, not greedy, so it lies "
        "below the held-out rate.",
        "It rises with the reward.",
        "The reward rises and this doesn't: the reward pays for something else than right answers.",
    ),
    Metric(
        "eval/{steps}/solve_rate",
        "learning",
        "Share of held-out problems that are solved greedily, in m denoising steps (those of training) or fewer.",
        "It rises from the base's value at iteration 0; within the interval drawn, a change is noise.",
        "Below its best by more than the interval: go back to the best checkpoint and lower learner.lr, or set a KL "
        "term. More problems (evaluation.problems) make the interval narrower.",
    ),
    Metric("eval/problems", "learning", "Held-out problems of the evaluation, which the intervals come from."),
    Metric(
        "loss",
        "learning",
        "The objective's loss. In reinforcement learning its gradient matters, not its value, which stays near 0; in "
        "fine-tuning it is the loss of the update's demonstrations.",
        "Finite. In fine-tuning it falls.",
        "Not a number: a lower learner.lr, or learner.dtype=float32.",
    ),
    Metric(
        "held_out/loss",
        "learning",
        "Loss of the held-out demonstrations, divided as in training.",
        "It falls, then levels off.",
        "It rises while the loss falls: the demonstrations are learnt by heart; sft.adapter=best takes the best.",
    ),
    Metric("held_out/nll_masked", "learning", "The same for a masked token, without weights.", "It falls.", "", "nats"),
    Metric("nll_masked", "learning", "Negative log-likelihood of a masked token.", "It falls.", "", "nats"),
    Metric("epoch", "learning", "How often the demonstrations have been gone through."),
)

_HEALTH = (
    Metric(
        "entropy",
        "policy health",
        "Mean entropy of the law that each token was drawn from.",
        "It falls slowly and stays above 0.",
        "Near 0 within tens of iterations: the policy has collapsed and draws the same all the time; a lower "
        "learner.lr, a higher temperature, or a KL term.",
        "nats a token",
    ),
    Metric(
        "position_entropy",
        "policy health",
        "Mean entropy of the law that the next position was chosen from.",
        "It falls slowly.",
        "As for entropy.",
        "nats a choice",
    ),
    Metric(
        "groups/no_signal_share",
        "policy health",
        "Share of prompts whose completions all have the same reward, so that nothing can be learned from them.",
        "Below about a half.",
        "Near 1 from the start: the task is too hard or too easy for the base; easier problems, a larger "
        "rollout.group_size, or fine-tuning first. Near 1 at the end: it is solved.",
    ),
    Metric(
        "clip_fraction/low",
        "policy health",
        "Share of scored actions whose ratio lies below the clip range while their advantage is negative.",
        "A few percent at most; 0 where each batch gives one update.",
        "Tens of percent: fewer updates a batch, less staleness, or a lower learner.lr.",
    ),
    Metric(
        "clip_fraction/high",
        "policy health",
        "Share of scored actions whose ratio lies above the clip range while their advantage is positive.",
        "As for clip_fraction/low.",
        "As for clip_fraction/low.",
    ),
    Metric(
        "ratio/mean",
        "policy health",
        "Mean ratio of the new policy's probability to that of the policy that drew the batch.",
        "Near 1; exactly 1 in the first update of a synchronous batch.",
        "Away from 1 by a tenth: as for clip_fraction/low.",
    ),
    Metric("ratio/max", "policy health", "The largest such ratio.", "Single digits.", "As for clip_fraction/low."),
    Metric(
        "ratio/beyond_clip",
        "policy health",
        "Share of scored actions whose ratio lies beyond the clip range, whatever their advantage.",
        "About twice clip_fraction/low and clip_fraction/high together.",
        "As for clip_fraction/low.",
    ),
    Metric(
        "ratio/unupdated_beyond_clip",
        "policy health",
        "The same about weights that weren't updated in between: what rounding alone would clip.",
        "0 in float32. Below a percent in bfloat16 is expected; it was never measured on a GPU.",
        "Percents: part of the gradient is lost to rounding. Wider clip, or learner.dtype=float32.",
    ),
    Metric(
        "log_ratio/rms",
        "policy health",
        "Root mean square of the log of that ratio.",
        "0 in the first update of a synchronous batch, hundredths afterwards.",
        "As for clip_fraction/low.",
        "nats",
    ),
    Metric("log_ratio/abs_max", "policy health", "The largest log-ratio, by size.", "Below about 2.", "", "nats"),
    Metric(
        "log_ratio/unupdated_abs_max",
        "policy health",
        "How far learner and rollout are apart about weights that weren't updated in between; it should be rounding.",
        "Below learner.log_ratio_alarm.",
        "Their dtype, kernels or chat template differ: learner.verify finds where.",
        "nats",
    ),
    Metric(
        "kl",
        "policy health",
        "Estimate (k3) of the KL divergence from the reference.",
        "It grows slowly.",
        "It jumps: a lower learner.lr or a larger objective.beta.",
        "nats",
    ),
    Metric(
        "importance_weight/max",
        "policy health",
        "Largest importance weight of a sampled denoising step; steps of an even share have 1.",
        "It stays where it was at the start.",
        "Hundreds: few steps carry the gradient; a larger objective.k.",
    ),
    Metric(
        "grad_norm",
        "policy health",
        "Norm of the gradient before it is clipped.",
        "The same order of size throughout, above 0.",
        "It grows tenfold: a lower learner.lr. Exactly 0: no group had a signal.",
    ),
    Metric("lr", "policy health", "Learning rate of the update.", "As the schedule says."),
    Metric(
        "staleness/mean",
        "policy health",
        "Versions of the weights between the drawing of a group and learning from it, on average.",
        "0 in a synchronous run; at most rollout.max_staleness.",
        "At its bound all the time: actors are ahead; fewer of them will do.",
        "versions",
    ),
    Metric("staleness/max", "policy health", "The same, of the iteration's oldest group.", "", "", "versions"),
    Metric(
        "completion_length",
        "policy health",
        "Mean number of tokens of a completion that are no end-of-text token.",
        "It changes slowly.",
        "It runs to the limit, or to almost nothing: the reward pays for length; look at samples.",
        "tokens",
    ),
    Metric("distinct_share", "policy health", "Different completions per completion of a prompt.", "Well above 1/G."),
    Metric(
        "eos_rate",
        "policy health",
        "Share of completions that have an end-of-text token.",
        "It rises to near 1.",
        "It falls: completions are cut off; a larger rollout.sampler.completion_length.",
    ),
    Metric(
        "text_after_eos",
        "policy health",
        "Share of completions with text behind an end-of-text token.",
        "It falls towards 0.",
        "It stays high: positions behind the end are filled on their own; semi-autoregressive blocks avoid it.",
    ),
    Metric(
        "all_eos_completions",
        "policy health",
        "Completions of end-of-text tokens alone.",
        "None.",
        "Many: the policy writes nothing; a reward below 0, or no reward, for empty answers.",
    ),
    Metric("ess", "policy health", "Effective number of completions of a group under its weights.", "Well above 1."),
    Metric("threshold", "policy health", "Mean threshold that completions were drawn with.", "", "", "probability"),
    Metric(
        "support_mass",
        "policy health",
        "Share of the policy's probability on the tokens that the rollout could have drawn (top-k, top-p).",
        "Near 1.",
        "It falls: the truncation leaves out what the policy wants; a larger top_p.",
    ),
    Metric("teacher/kl", "policy health", "KL divergence of the policy from the phase's target.", "It falls."),
)

_THROUGHPUT = (
    Metric(
        "machine/tokens_per_s",
        "throughput",
        "Tokens of the iteration's completions over its seconds.",
        "Steady.",
        "It falls: see the seconds by stage, and the workers' page for restarts.",
        "tokens/s",
    ),
    Metric(
        "tokens_per_forward",
        "throughput",
        "Tokens of text that a denoising step reveals, on average.",
        "Steady, or rising where speed is rewarded.",
    ),
    Metric(
        "forward_equivalents",
        "throughput",
        "What the iteration's rollouts and updates cost, whatever the method: a forward of one sequence counts 1, its "
        "backward 2 more. Their sum is an axis for comparing runs.",
        "Steady; methods that learn in phases cost more where a phase begins.",
    ),
    Metric("machine/to_go_s", "throughput", "Seconds until the last iteration, by this start's mean.", unit="s"),
    Metric(
        "machine/gpu_reserved_gib/{kind}",
        "throughput",
        "Most memory that torch has held on a GPU for a process of this kind, an actor or a rank, since its start. The "
        "plan's peak counts 0.75 GiB for CUDA beside it, and 0.5 for NCCL.",
        "Below the plan's peak.",
        "Far above machine/gpu_allocated_gib: memory is fragmented. Near the process's share: see learner.plan.",
        "GiB",
    ),
    Metric("machine/gpu_allocated_gib/{kind}", "throughput", "Most of it that was in use at once.", unit="GiB"),
    Metric("time/iteration_s", "throughput", "Seconds of the iteration, evaluations not counted.", "Steady.", "", "s"),
    Metric(
        "time/rollout_wait_s",
        "throughput",
        "Seconds that the ranks waited for the iteration's groups.",
        "In an asynchronous run near 0.",
        "Most of the iteration: more actors, or rollout.max_staleness=1 so that they draw ahead.",
        "s",
    ),
    Metric("time/update_s", "throughput", "Seconds of the updates.", "", "Most of the iteration: more ranks.", "s"),
    Metric("time/publish_s", "throughput", "Seconds until actors could have the new adapter.", "A second.", "", "s"),
    Metric("time/lease/load_s", "throughput", "Mean seconds in which an actor loads a lease's weights.", "", "", "s"),
    Metric("time/lease/generate_s", "throughput", "Mean seconds in which it draws a lease's completions.", "", "", "s"),
    Metric(
        "time/lease/grade_wait_s",
        "throughput",
        "Mean seconds in which it waits for the last verdicts.",
        "Near 0: grading goes on beside drawing.",
        "A large share: more grader processes, or a faster reward.",
        "s",
    ),
)

_RATIOS = (
    "ratio/mean",
    "ratio/max",
    "ratio/beyond_clip",
    "clip_fraction/low",
    "clip_fraction/high",
    "log_ratio/rms",
    "kl",
    "bound/elbo",
)
_KINDS = {"position_": "choices of positions", "fill_": "fills of states", "threshold/": "thresholds"}

_INTERNALS = (
    *(
        Metric(f"{prefix}{name}", "internals", f"As {name}, of {kind}.")
        for prefix, kind in _KINDS.items()
        for name in _RATIOS
        if name != "bound/elbo"
    ),
    Metric("completions", "internals", "Completions that the update learns from."),
    Metric("live_completions", "internals", "Completions with a gradient: those whose advantage isn't 0.", "Above 0."),
    Metric("scored_completions", "internals", "Completions that were scored."),
    Metric("scored_tokens", "internals", "Tokens that were scored, masked copies counted each."),
    Metric("scored_steps", "internals", "Denoising steps that were scored."),
    Metric("scored_copies", "internals", "Masked copies that were scored."),
    Metric("scored_choices", "internals", "Choices of positions that were scored."),
    Metric("scored_fills", "internals", "Fills of states that were scored."),
    Metric("scored_thresholds", "internals", "Thresholds that were scored."),
    Metric("views", "internals", "Partly masked sequences that the update runs through the model."),
    Metric("tokens", "internals", "Tokens of the update's demonstrations."),
    Metric(
        "draws_merged",
        "internals",
        "Sampled steps that were the same step of the same completion, and were scored once.",
        "The fewer, the larger the number of steps against objective.k.",
    ),
    Metric("missing_steps", "internals", "Steps that the method wanted of completions that had ended before."),
    Metric("mask_rate", "internals", "Share of positions that a masked copy hides."),
    Metric("logp/raised", "internals", "Mean log-prob of the tokens that the update makes likelier.", "", "", "nats"),
    Metric("logp/lowered", "internals", "Mean log-prob of the tokens that it makes less likely.", "", "", "nats"),
    Metric("bound/elbo", "internals", "Lower bound of a completion's log-likelihood.", "", "", "nats"),
    Metric("bound/eubo", "internals", "Upper bound of it, for completions to be made less likely.", "", "", "nats"),
    Metric("importance/mean", "internals", "Mean importance weight of the scored tokens.", "Near 1."),
    Metric("importance/capped", "internals", "Share of the weights that the cap cut.", "A few percent."),
    Metric("log_ratio/reference", "internals", "Mean log-ratio of a completion to the reference.", "", "", "nats"),
    Metric("log_ratio/centred", "internals", "Its spread over completions (root mean square).", "", "", "nats"),
    Metric("residual", "internals", "How far policy and target are apart (root mean square).", "It falls."),
    Metric("residual/target", "internals", "Size of the target itself, which the residual is measured by."),
    Metric("residual/between_masks", "internals", "Part of the residual that differs between masks of a completion."),
    Metric("residual/overshot_share", "internals", "Share of completions moved further than their target.", "Small."),
    Metric("normaliser", "internals", "Mean normaliser of a group's target."),
    Metric("reward_weight/completion", "internals", "Weight of the reward against a completion's log-ratio."),
    Metric("tilt/step", "internals", "Step of the reward's tilt in this phase."),
    Metric("tilt/target_mass", "internals", "Mean weight of a completion under the tilt; 1 without one."),
    Metric("value", "internals", "Mean value that was learned for the scored tokens."),
    Metric("value/error", "internals", "Its error (root mean square).", "Below value/target."),
    Metric("value/target", "internals", "Size of what it should be."),
    Metric("branches/reward", "internals", "Mean reward of the states that were filled at once."),
    Metric("branches/solve_rate", "internals", "Share of these fills that are right."),
    Metric("branches/missing_share", "internals", "Share of wanted states that completions didn't have.", "Near 0."),
    Metric("branches/no_signal_share", "internals", "Share of states whose fills all have the same reward."),
    Metric("updates/applied", "internals", "Updates of the iteration that changed the weights.", "All of them."),
    Metric("updates/forwards", "internals", "Forward passes of the iteration's updates, of all ranks."),
    Metric("ledger/issued", "internals", "Prompt groups planned so far; the sum of the states below."),
    Metric("ledger/pending", "internals", "Groups that wait for an actor."),
    Metric("ledger/leased", "internals", "Groups that an actor draws."),
    Metric("ledger/ready", "internals", "Groups that are drawn and wait for the learner."),
    Metric("ledger/consumed", "internals", "Groups that were learned from."),
    Metric("ledger/dropped", "internals", "Groups that were given up.", "0.", "Events of kind fault say why."),
    Metric("ledger/dropped/{reason}", "internals", "Groups given up for this reason."),
    Metric("machine/ledger_expired", "internals", "Leases that took longer than timeouts.lease.", "0.", "Raise it."),
    Metric("machine/ledger_failed", "internals", "Leases that ended with an error of their actor.", "0."),
    Metric("machine/ledger_lost", "internals", "Drawn groups that went with their node.", "0."),
    Metric("machine/ledger_refused", "internals", "Deliveries that came too late to count."),
    Metric("machine/ledger_relet", "internals", "Groups that were leased again."),
    Metric("machine/ledger_second", "internals", "Leases given to a second actor because the first is slow."),
    Metric("machine/ledger_too_stale", "internals", "Groups that were drawn again because they had become too old."),
    Metric(
        "machine/grader_failures",
        "internals",
        "Verdicts that graders failed to give so far.",
        "0, or a few of code that runs too long.",
        "Look at the events, and try the reward by hand: python -m rewards.grade.",
    ),
    Metric(
        "machine/store_lost_rows",
        "internals",
        "Rows that the run store didn't take since the last start.",
        "0.",
        "The store is locked, or its disk full; metrics.jsonl has the figures.",
    ),
    Metric("machine/failed_reports", "internals", "Reports to files and trackers that failed.", "0."),
)

METRICS: tuple[Metric, ...] = (*_LEARNING, *_HEALTH, *_THROUGHPUT, *_INTERNALS)
"""By group, the most telling first."""
