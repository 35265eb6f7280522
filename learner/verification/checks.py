"""What ``learner.verify`` checks, section by section."""

import importlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learner.verification import methods
from learner.verification.cases import SamplerSettings, read_case
from learner.verification.exactness import check_controls, check_enumeration
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import read_method_case
from learner.verification.parity import check_replay
from learner.verification.policy import check_probe
from learner.verification.recorded import MethodFile, Recorded
from learner.verification.sampler import check_sampler
from learner.verification.training import check_training
from rewards.errors import ConfigError, UnmaskError


@dataclass(frozen=True)
class Check:
    """What one check found; ``error`` says why a case can't be read."""

    name: str
    measurements: list[Measurement] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


def meter_on(device: str, dtype: str) -> Meter:
    """The bounds for this device and dtype. Raises ConfigError for a GPU that isn't there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")  # no TF32: it has 10 bits of mantissa
    return Meter(chosen, dtype)


def sections(meter: Meter, golden: Path | None, recorded: Recorded) -> Iterator[tuple[str, Iterable[Check]]]:
    """(name, its checks) of each section; a check runs when it is asked for. ``recorded``: the cases in ``golden``."""
    yield "replay", (Check(name, found) for name, found in check_replay(meter))
    yield "enumeration", (Check(name, found) for name, found in check_enumeration(meter))
    yield "controls", (Check(name, found) for name, found in check_controls(meter))
    if golden is not None:
        yield (
            "golden",
            itertools.chain(golden_checks(golden, recorded.agrpo, meter), method_checks(recorded.methods, meter)),
        )


def golden_checks(folder: Path, names: Sequence[str], meter: Meter) -> Iterator[Check]:
    """A check of each named case of AGRPO, and of the probe where the folder has one."""
    if (folder / "probe_logits.npz").exists():
        names = ["probe_logits", *names]
    for name in names:
        try:
            found = check_probe(folder, meter) if name == "probe_logits" else check_case(folder, name, meter)
            yield Check(name, found)
        except UnmaskError as error:
            yield Check(name, error=f"case {name} can't be read: {error}")


def check_case(folder: Path, name: str, meter: Meter) -> list[Measurement]:
    """All measurements of one recorded case. After a broken schedule nothing else can be computed: it comes alone.

    Raises:
        UnmaskError: naming the array or setting that can't be read.
    """
    case = read_case(folder, name)
    broken = meter.schedule(case.rollout.schedule_breaks())
    if not broken.passed:
        return [broken]
    check = check_sampler if isinstance(case.settings, SamplerSettings) else check_training
    return [broken, *check(case, meter)]


def method_checks(cases: Iterable[MethodFile], meter: Meter) -> Iterator[Check]:
    """A check of each case of another method."""
    for folder, name in cases:
        label = f"{folder.name}/{name}"
        try:
            yield Check(label, check_method_case(folder, name, meter))
        except UnmaskError as error:
            yield Check(label, error=f"case {label} can't be read: {error}")


def check_method_case(folder: Path, name: str, meter: Meter) -> list[Measurement]:
    """All measurements of one recorded case of the method that the folder is called after.

    Raises:
        UnmaskError: naming the array or setting that can't be read.
    """
    module = importlib.import_module(f"{methods.__name__}.{folder.name}")
    measurements: list[Measurement] = module.check(read_method_case(folder, name), meter)
    return measurements


def timed(checks: Iterable[Check]) -> Iterator[Check]:
    """The checks, each with the seconds that it took."""
    last = time.perf_counter()
    for check in checks:
        now = time.perf_counter()
        yield Check(check.name, check.measurements, check.error, now - last)
        last = now
