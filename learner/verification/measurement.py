"""Errors measured by ``learner.verify``, and the bounds on them by quantity, device and dtype.

float32: what the recorded cases suggest (for AGRPO 1e-5 for log-probs, 2e-6 for losses and gradients, 1e-5 relative for
importance weights); on CUDA twice that or more, because other kernels add in another order (chosen, not measured).
bfloat16: two to three times the largest error measured on the recorded cases (CPU). The records come from float32
weights, and rounding weights and activations to 8 bits moves every log-prob by some hundredths, kept sets at their
edge, and single tokens across the clip: a bound there tells a right sign and scale from wrong ones, no more. What
doesn't depend on the model is float64 arithmetic on recorded numbers and has one bound.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Metric = Literal["absolute", "relative"]


class Bound(NamedTuple):
    """The largest error allowed."""

    metric: Metric
    cpu: float
    """float32 on a CPU"""
    cuda: float
    """float32 on a GPU, TF32 off"""
    bf16: float
    bf16_metric: Metric | None = None
    """where it is another than in float32"""

    def at(self, device: str, dtype: str) -> tuple[Metric, float]:
        if dtype == "bfloat16":
            return self.bf16_metric or self.metric, self.bf16
        return self.metric, self.cuda if device.startswith("cuda") else self.cpu


def _everywhere(metric: Metric, limit: float) -> Bound:
    return Bound(metric, limit, limit, limit)


_LOGP = Bound("absolute", 1e-5, 2e-5, 0.3)
_ENTROPY = Bound("absolute", 1e-5, 2e-5, 0.2)
_LOSS = Bound("absolute", 2e-6, 4e-6, 0.01)
_CLIPPED = Bound("absolute", 1e-6, 1e-6, 0.4)
_SCALED_LOSS = Bound("relative", 2e-6, 4e-6, 0.08)

BOUNDS = {
    "replayed log-probs": Bound("absolute", 1e-5, 2e-5, 0.2),
    "replayed choices": Bound("absolute", 1e-5, 2e-5, 0.2),
    "expected gradient": _everywhere("relative", 1e-6),
    "logits": Bound("absolute", 1e-5, 4e-5, 0.6),
    "schedule": _everywhere("absolute", 0.0),
    "advantages": _everywhere("absolute", 1e-6),
    "last_step": _everywhere("absolute", 0.0),
    "step_probs": _everywhere("absolute", 1e-6),
    "step_cdf": _everywhere("absolute", 1e-6),
    "mc_steps": _everywhere("absolute", 0.0),
    "importance_weights": _everywhere("relative", 1e-5),
    "mc_positions": _everywhere("absolute", 0.0),
    "old_logps_at_step": _everywhere("absolute", 0.0),
    "sampling_masks": Bound("relative", 0.0, 0.002, 0.15),
    "old_logps": _LOGP,
    "new_logps": _LOGP,
    "ref_logps": _LOGP,
    "old_entropies": _ENTROPY,
    "kls": _LOSS,
    "low_clip": _CLIPPED,
    "high_clip": _CLIPPED,
    "loss_per_mc_sample": _LOSS,
    "loss_passed_to_backward": _LOSS,
    "cum_grad_norm": Bound("absolute", 1e-5, 2e-5, 0.5, "relative"),
    "gradient": Bound("absolute", 2e-6, 4e-6, 1.5, "relative"),
    "whole gradient": Bound("relative", 1e-5, 2e-5, 0.75),
    "merged draws": Bound("relative", 1e-5, 2e-5, 0.06),
    "completion_ids": Bound("absolute", 1e-5, 4e-5, 0.3),
    "unmask_steps": Bound("absolute", 1e-5, 4e-5, 0.3),
    "logps": _LOGP,
    "entropies": _ENTROPY,
    "masks": _everywhere("absolute", 0.0),
    "likeliest fills": Bound("absolute", 0.0, 0.002, 0.15),
    "token log-probs": Bound("absolute", 1e-4, 2e-4, 0.5),
    "ratios": Bound("relative", 1e-4, 2e-4, 0.4),
    "row values": _SCALED_LOSS,
    "clip fraction": Bound("absolute", 1e-6, 1e-6, 0.8),
    "loss": _SCALED_LOSS,
    "gradient of the loss": Bound("relative", 1e-5, 2e-5, 0.4),
    "ELBO log-probs": Bound("absolute", 2e-5, 4e-5, 1.5),
    "ELBO": Bound("absolute", 5e-5, 1e-4, 2.0),
    "weights": Bound("absolute", 2e-5, 4e-5, 0.5),
    "ELBO differences": Bound("absolute", 1e-4, 2e-4, 0.7),
    "ELBO loss": Bound("relative", 5e-6, 1e-5, 0.25),
    "gradient of the ELBO loss": Bound("relative", 1e-4, 2e-4, 4.0),
}
"""By quantity. Of ``sampling_masks`` the share of kept tokens, of ``schedule`` a count of positions. From ``masks`` on:
of the recorded cases of other methods; what they suggest for losses and gradients is relative to a scale, see
``Meter.scaled``. The six of bounds and their weights are those of cases of ESPO and DMPO."""


@dataclass(frozen=True)
class Measurement:
    """The largest error of one quantity."""

    quantity: str
    where: str
    """The array, and the element or tensor of it, that has this error; or what was compared."""
    absolute: float
    """Largest |ours - recorded|; inf when one of the two isn't a number."""
    relative: float
    """Of gradients, the L2 norm of the difference over that of the record. Of other arrays, the largest |ours -
    recorded| / |recorded| over the elements, where an element below a thousandth of the largest counts as that. Of
    losses, row values and gradients of other methods than AGRPO, |ours - recorded| over the scale of ``scaled``."""
    metric: Metric
    """Which of the two is judged."""
    bound: float
    control: bool = False
    """A negative control: the error must be above the bound."""
    parts: tuple["Measurement", ...] = ()
    """Per tensor, for gradients."""

    @property
    def passed(self) -> bool:
        """The judged error is within its bound; a control's isn't."""
        within = (self.absolute if self.metric == "absolute" else self.relative) <= self.bound
        return within != self.control

    def as_json(self) -> dict[str, object]:
        """As ``learner.verify --json`` prints it; an infinite error is null."""
        found: dict[str, object] = {
            "quantity": self.quantity,
            "where": self.where,
            "absolute": self.absolute if np.isfinite(self.absolute) else None,
            "relative": self.relative if np.isfinite(self.relative) else None,
            "metric": self.metric,
            "bound": self.bound,
            "control": self.control,
            "passed": self.passed,
        }
        return {**found, "parts": [part.as_json() for part in self.parts]} if self.parts else found


@dataclass(frozen=True)
class Meter:
    """Makes measurements, with the bounds of one device and dtype."""

    device: str
    dtype: str

    def elements(self, quantity: str, ours: ArrayLike, recorded: np.ndarray, array: str | None = None) -> Measurement:
        """Compare element by element; ``array`` names the record where its name isn't the quantity's."""
        theirs = np.asarray(recorded, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # what isn't finite is told apart below
            difference = np.abs(np.asarray(ours, dtype=np.float64) - theirs)
        assert difference.shape == theirs.shape, f"{quantity}: {difference.shape} against {theirs.shape}"
        difference = np.where(np.isfinite(difference), difference, np.inf)
        worst = np.unravel_index(int(difference.argmax()), difference.shape) if difference.size else ()
        largest = float(np.abs(theirs).max(initial=0.0))
        scale = np.maximum(np.abs(theirs), 1e-3 * largest)
        with np.errstate(invalid="ignore"):
            relative = np.divide(difference, scale, out=np.where(difference > 0, np.inf, 0.0), where=scale > 0)
        relative = np.where(np.isfinite(difference), relative, np.inf)
        where = f"{array or quantity}[{', '.join(str(int(i)) for i in worst)}]" if difference.any() else ""
        return self.measured(quantity, where, float(difference.max(initial=0.0)), float(relative.max(initial=0.0)))

    def norms(self, quantity: str, ours: np.ndarray, recorded: np.ndarray, array: str) -> Measurement:
        """Compare as vectors: largest difference of an element, and relative difference in the L2 norm."""
        theirs = np.asarray(recorded, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.asarray(ours, dtype=np.float64) - theirs
        if not np.isfinite(difference).all():
            return self.measured(quantity, array, np.inf, np.inf)
        size, length = float(np.linalg.norm(difference)), float(np.linalg.norm(theirs))
        relative = size / length if length else (np.inf if size else 0.0)
        return self.measured(quantity, array, float(np.abs(difference).max(initial=0.0)), relative)

    def scaled(
        self, quantity: str, ours: ArrayLike, recorded: np.ndarray, array: str, *, scale: ArrayLike | None = None
    ) -> Measurement:
        """Compare element by element, relative to ``scale``: that of the whole where it is one number, else of each
        element; None for the larger of 1 and the recorded size."""
        scale = np.maximum(1.0, np.abs(recorded)) if scale is None else np.broadcast_to(scale, recorded.shape)
        found = self.elements(quantity, ours, recorded, array)
        with np.errstate(invalid="ignore"):
            relative = np.abs(np.asarray(ours, dtype=np.float64) - recorded) / scale
        relative = np.where(np.isfinite(relative), relative, np.inf)
        return self.measured(quantity, found.where, found.absolute, float(relative.max(initial=0.0)))

    def schedule(self, breaks: np.ndarray) -> Measurement:
        """How many positions break the reference's schedule, a count and a share."""
        where = f"completion_ids, unmask_steps or fillers, at {np.argwhere(breaks)[0].tolist()}" if breaks.any() else ""
        return self.measured("schedule", where, float(breaks.sum()), float(breaks.mean()))

    def measured(self, quantity: str, where: str, absolute: float, relative: float) -> Measurement:
        """A measurement with its bound."""
        metric, bound = BOUNDS[quantity].at(self.device, self.dtype)
        return Measurement(quantity, where, absolute, relative, metric, bound)
