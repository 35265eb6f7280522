"""``python -m learner.verify``: recorded cases pass, of all kinds; any one array that is off is found and named; what
can't be read is said so. Kinds that aren't recorded are written by ``tests.support.miniature_reference``."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.verification.cases import case_names
from learner.verification.checks import Check, check_case, golden_checks
from learner.verification.measurement import Measurement, Meter
from learner.verification.report import status_of
from learner.verify import main
from tests.support.hand_made import GOLDEN
from tests.support.miniature_reference import write_base, write_sampler_case, write_training_case

FP32, BF16 = Meter("cpu", "float32"), Meter("cpu", "bfloat16")
FILTER = {"top_k": 6, "top_p": 0.9}
TRAINING_KINDS: dict[str, dict[str, Any]] = {
    "02_clipped_without_strata": {"BL": 4, "m": 2, "ld": False},
    "06_kl": {"BL": 4, "m": 4, "beta": 0.04, "importance_sampling": "entropy", **FILTER},
    "08_block_is_one_step": {"m": 4, "importance_sampling": "entropy"},
    "09_pads_honoured": {"pad": True, **FILTER},
    "10_pads_ignored": {"pad": True, "impl": "fast", "importance_sampling": "entropy"},
    "11_quirk_and_asymmetric_clip": {"GA": 2, "eps": 0.05, "eps_high": 0.1},
    "12_full_without_filter": {"lora_r": 0, "lora_targets": None, "T": 1.0, "top_k": None},
    "13_full_with_kl": {"lora_r": 0, "lora_targets": None, "beta": 0.04, **FILTER},
}
SAMPLER_KINDS: dict[str, dict[str, Any]] = {
    "20_greedy": {"temperature": 0.0, "unmasking": "low_confidence"},
    "21_low_confidence": {"temperature": 0.6, "unmasking": "low_confidence", **FILTER},
    "22_random": {"top_p": 0.9, "block_length": 4, "sampling_steps": 4, "B": 5, "pad": True},
    "22_entropy_pads_ignored": {"unmasking": "entropy", "block_length": 4, "pad": True, "impl": "fast"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a case of each kind; read only."""
    folder = tmp_path_factory.mktemp("golden")
    write_base(folder)
    for name, settings in TRAINING_KINDS.items():
        write_training_case(folder, name, **settings)
    for name, settings in SAMPLER_KINDS.items():
        write_sampler_case(folder, name, **settings)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Puts one case, under its name, into a folder of its own."""

    def one(name: str) -> Path:
        for file in ("weights_base.npz", f"{name}.npz", f"{name}.json"):
            shutil.copy(written / file, tmp_path / file)
        return tmp_path

    return one


def edit(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the arrays of an npz file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(path, **arrays)


def failures(measurements: list[Measurement]) -> dict[str, Measurement]:
    return {found.quantity: found for found in measurements if not found.passed}


def test_the_recorded_cases_pass():
    checks = list(golden_checks(GOLDEN, case_names(GOLDEN), FP32))
    assert len(checks) == len(case_names(GOLDEN)) + 1, "the probe is checked as well"
    for check in checks:
        assert check.error is None and not failures(check.measurements), check.name


@pytest.mark.slow
def test_the_recorded_cases_pass_in_bfloat16():
    for check in golden_checks(GOLDEN, case_names(GOLDEN), BF16):
        assert check.error is None and not failures(check.measurements), check.name


@pytest.mark.parametrize("name", [*TRAINING_KINDS, *SAMPLER_KINDS])
def test_every_kind_of_case_is_read_and_passes(written, name):
    measurements = check_case(written, name, FP32)
    assert not failures(measurements)
    quantities = {found.quantity for found in measurements}
    assert ({"ref_logps", "kls"} <= quantities) == ("kl" in name)
    assert ("step_probs" in quantities) == (TRAINING_KINDS.get(name, {}).get("importance_sampling") == "entropy")
    (gradient,) = [found for found in measurements if found.quantity == "gradient"] or [None]
    assert (gradient is None) == (name in SAMPLER_KINDS)
    if gradient is not None:
        with np.load(written / f"{name}.npz") as file:
            assert {part.where for part in gradient.parts} == {key for key in file.files if key.startswith("grad/")}


def test_the_written_cases_hold_what_they_are_for(written):
    """Rows that ended early with a filter and without, clipped tokens on both sides, pads that matter."""
    ended, low, high = [], [], []
    for name in (*TRAINING_KINDS, *SAMPLER_KINDS):
        with np.load(written / f"{name}.npz") as file:
            logp = file["old_logps" if name in TRAINING_KINDS else "logps"]
            if (logp[:, -2:] == 0).all(axis=1).any():
                ended.append(name)
            if name in TRAINING_KINDS:
                low.append(file["low_clip"].any())
                high.append(file["high_clip"].any())
    assert {"11_quirk_and_asymmetric_clip", "13_full_with_kl", "21_low_confidence"} <= set(ended)
    assert any(low) and any(high)


def add(amount: float, index: int = 0) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array.flat[index] += amount

    return change


def another_token(array: np.ndarray) -> None:
    array.flat[0] = array.flat[0] + 1 if array.flat[0] != 5 else 3


def mirror(array: np.ndarray) -> None:
    """Turn uniforms into others."""
    array[...] = 1 - array


def swap(array: np.ndarray) -> None:
    """Exchange two positions' steps within the first block of the first row."""
    row = array[0]
    i, j = 0, next(j for j in range(4) if row[j] != row[0])
    row[[i, j]] = row[[j, i]]


PERTURBATIONS: list[tuple[str, str, Callable[[np.ndarray], None], str]] = [
    ("06_kl", "gen/model.transformer.blocks.0.q_proj.lora_A.weight", add(0.3), "old_logps"),
    ("06_kl", "cur/model.transformer.blocks.0.ff_out.lora_B.weight", add(0.05), "new_logps"),
    ("06_kl", "cur/model.transformer.ff_out.lora_B.weight", add(0.05, 20), "gradient"),
    ("06_kl", "prompt_ids", another_token, "old_logps"),
    ("06_kl", "completion_ids", another_token, "old_logps"),
    ("06_kl", "unmask_steps", swap, "old_logps"),
    ("06_kl", "unmask_steps", add(1), "schedule"),
    ("06_kl", "sampling_masks_packed", lambda a: a.flat.__setitem__(0, a.flat[0] ^ 1), "sampling_masks"),
    ("06_kl", "old_logps", add(1e-4), "old_logps"),
    ("06_kl", "old_entropies", add(1e-4), "old_entropies"),
    ("06_kl", "rewards_per_func", add(0.25), "advantages"),
    ("06_kl", "advantages", add(1e-5), "advantages"),
    ("06_kl", "last_step", add(-1), "last_step"),
    ("06_kl", "step_probs", add(1e-5), "step_probs"),
    ("06_kl", "step_cdf", add(1e-5), "step_cdf"),
    ("06_kl", "u", lambda a: a.flat.__setitem__(0, (a.flat[0] + 0.5) % 1), "mc_steps"),
    ("06_kl", "mc_steps", add(1), "mc_steps"),
    ("06_kl", "importance_weights", lambda a: a.__imul__(1.0001), "importance_weights"),
    ("06_kl", "mc_positions", add(1), "mc_positions"),
    ("06_kl", "old_logps_at_step", add(1e-5), "old_logps_at_step"),
    ("06_kl", "new_logps", add(1e-4), "new_logps"),
    ("06_kl", "ref_logps", add(1e-4), "ref_logps"),
    ("06_kl", "kls", add(1e-5), "kls"),
    ("06_kl", "low_clip", add(0.125), "low_clip"),
    ("06_kl", "high_clip", add(0.125), "high_clip"),
    ("06_kl", "loss_per_mc_sample", add(1e-5), "loss_per_mc_sample"),
    ("06_kl", "loss_passed_to_backward", add(1e-5), "loss_passed_to_backward"),
    ("06_kl", "cum_grad_norm", lambda a: a.__imul__(1.0001), "cum_grad_norm"),
    ("06_kl", "grad/model.transformer.blocks.0.k_proj.lora_B.weight", add(1e-5, 7), "gradient"),
    ("09_pads_honoured", "prompt_mask", lambda a: a.__setitem__((1, 0), 1), "old_logps"),
    ("12_full_without_filter", "grad/model.transformer.wte.weight", add(1e-5, -1), "gradient"),
    ("22_random", "completion_ids", another_token, "completion_ids"),
    ("21_low_confidence", "completion_ids", another_token, "schedule"),
    ("21_low_confidence", "logps", add(1e-4), "logps"),
    ("21_low_confidence", "entropies", add(1e-4), "entropies"),
    ("21_low_confidence", "rand_000", mirror, "completion_ids"),
    ("22_random", "rand_001", mirror, "unmask_steps"),
    ("22_random", "unmask_steps", swap, "unmask_steps"),
]


@pytest.mark.parametrize(
    ("name", "array", "change", "quantity"), PERTURBATIONS, ids=[f"{p[0]}-{p[1]}-{p[3]}" for p in PERTURBATIONS]
)
def test_one_array_that_is_off_is_found(copy, name, array, change, quantity):
    folder = copy(name)
    edit(folder / f"{name}.npz", lambda arrays: change(arrays[array]))
    (check,) = golden_checks(folder, [name], FP32)
    assert check.error is None
    found = failures(check.measurements)
    assert quantity in found
    if array.startswith("grad/"):
        assert found[quantity].where == array
    assert status_of({"golden": [check]}) == 1


@pytest.mark.parametrize(
    ("name", "setting", "value", "quantity"),
    [
        ("06_kl", "lora_alpha", 7, "old_logps"),
        ("06_kl", "top_p", 0.5, "sampling_masks"),
        ("06_kl", "beta", 0.05, "loss_per_mc_sample"),
        ("06_kl", "eps", 0.001, "low_clip"),
        ("06_kl", "G", 4, "loss_per_mc_sample"),
        ("09_pads_honoured", "impl", "fast", "old_logps"),
        ("10_pads_ignored", "impl", "hf", "old_logps"),
        ("11_quirk_and_asymmetric_clip", "GA", 1, "gradient"),
        ("11_quirk_and_asymmetric_clip", "eps_high", 0.001, "loss_per_mc_sample"),
    ],
)
def test_another_setting_is_another_result(copy, name, setting, value, quantity):
    folder = copy(name)
    set_to(folder / f"{name}.json", setting, value)
    assert quantity in failures(check_case(folder, name, FP32))


def set_to(path: Path, setting: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))


def test_bfloat16_bounds_tell_a_gradient_from_its_negative(copy):
    name = "06_kl"
    folder = copy(name)
    assert "gradient" not in failures(check_case(folder, name, BF16))

    def negate(arrays):
        for key in arrays:
            if key.startswith("grad/"):
                arrays[key] = -arrays[key]

    edit(folder / f"{name}.npz", negate)
    assert {"gradient", "whole gradient"} <= failures(check_case(folder, name, BF16)).keys()


def cut(folder: Path, name: str) -> None:
    path = folder / f"{name}.npz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(folder: Path, name: str) -> None:
    """Flip bytes inside one array's data, which its checksum tells."""
    path = folder / f"{name}.npz"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("new_logps.npy").header_offset + 220
    data[at : at + 4] = bytes(255 - byte for byte in data[at : at + 4])
    path.write_bytes(bytes(data))


def with_arrays(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path, str], None]:
    return lambda folder, name: edit(folder / f"{name}.npz", change)


def with_setting(setting: str, value: object) -> Callable[[Path, str], None]:
    return lambda folder, name: set_to(folder / f"{name}.json", setting, value)


UNREADABLE: list[tuple[str, Callable[[Path, str], None], str]] = [
    ("06_kl", cut, "06_kl.npz can't be read"),
    ("06_kl", damage, "array new_logps of 06_kl.npz can't be read"),
    ("06_kl", lambda folder, name: (folder / f"{name}.npz").unlink(), "06_kl.npz can't be read"),
    ("06_kl", lambda folder, name: (folder / f"{name}.json").unlink(), "06_kl.json can't be read"),
    ("06_kl", lambda folder, name: (folder / f"{name}.json").write_text("{"), "06_kl.json can't be read"),
    ("06_kl", lambda folder, name: (folder / "weights_base.npz").unlink(), "weights_base.npz can't be read"),
    ("06_kl", with_arrays(lambda a: a.pop("new_logps")), "array new_logps is missing"),
    ("06_kl", with_arrays(lambda a: a.pop("prompt_ids")), "array prompt_ids is missing"),
    (
        "06_kl",
        with_arrays(lambda a: a.pop("grad/model.transformer.ff_out.lora_A.weight")),
        "ff_out.lora_A.weight is m",
    ),
    ("06_kl", with_arrays(lambda a: a.update({"cur/strange": np.zeros(3)})), "array cur/strange belongs to no"),
    ("06_kl", with_arrays(lambda a: a.update({"grad/strange": np.zeros(3)})), "array grad/strange belongs to no"),
    ("06_kl", with_arrays(lambda a: a.update(u=a["u"][:, :2])), r"array u has shape (4, 2), expected (4, 3)"),
    ("06_kl", with_arrays(lambda a: a.update(u=a["u"] + 1)), "array u has values outside 0.0..1.0"),
    ("06_kl", with_arrays(lambda a: a["completion_ids"].fill(14)), "array completion_ids has values outside 0..13"),
    ("06_kl", with_arrays(lambda a: a.update(mc_steps=a["mc_steps"] + 0.5)), "array mc_steps is of type float64"),
    ("06_kl", with_arrays(lambda a: a["rewards_per_func"].fill(np.nan)), "nan"),
    ("06_kl", with_setting("importance_sampling", "sometimes"), "setting importance_sampling = 'sometimes' is not"),
    ("06_kl", with_setting("impl", "turbo"), "setting impl = 'turbo' is not known"),
    ("06_kl", with_setting("lora_targets", ["q_proj"]), "setting lora_targets = ['q_proj'] is not known"),
    ("06_kl", with_setting("m", 3), "3 denoising steps"),
    ("06_kl", with_setting("base_weights", "../secret.npz"), "setting base_weights"),
    ("09_pads_honoured", with_arrays(lambda a: a["prompt_mask"].__setitem__((0, 3), 0)), "array prompt_mask has a pad"),
    ("22_random", with_setting("unmasking", "middle_out"), "setting unmasking = 'middle_out' is not known"),
    ("22_random", with_arrays(lambda a: a.pop("rand_003")), "array rand_003 is missing"),
    (
        "22_random",
        with_arrays(lambda a: a.update(rand_099=a["rand_000"]) or a.pop("rand_000")),
        "array rand_000 is m",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "reason"), UNREADABLE, ids=[reason for _, _, reason in UNREADABLE])
def test_what_cannot_be_read_is_said_so(copy, name, spoil, reason):
    folder = copy(name)
    spoil(folder, name)
    (check,) = golden_checks(folder, [name], FP32)
    assert check.error is not None and check.error.startswith(f"case {name} can't be read: ") and reason in check.error
    assert not check.measurements
    assert status_of({"golden": [check]}) == 2


def test_one_unreadable_case_does_not_hide_the_others(copy, written):
    folder = copy("20_greedy")
    for suffix in (".npz", ".json"):
        shutil.copy(written / f"06_kl{suffix}", folder)
    cut(folder, "06_kl")
    broken, fine = golden_checks(folder, case_names(folder), FP32)
    assert broken.error and not fine.error and fine.measurements
    assert status_of({"golden": [broken, fine]}) == 2


def test_status_of_sections():
    good = FP32.elements("new_logps", [1.0], np.array([1.0]))
    bad = FP32.elements("new_logps", [1.0], np.array([1.1]))
    control = dataclasses.replace(bad, control=True)
    assert status_of({"a": [Check("x", [good, control])]}) == 0
    assert status_of({"a": [Check("x", [good]), Check("y", error="unreadable")]}) == 2
    assert status_of({"a": [Check("x", [bad]), Check("y", error="unreadable")]}) == 1
    passes = dataclasses.replace(good, control=True)
    assert status_of({"a": [Check("x", [passes])]}) == 1, "a control that passes the test is a finding"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_never_within_a_bound(value):
    for ours, theirs in (([value], [1.0]), ([1.0], [value]), ([value], [value])):
        found = FP32.elements("new_logps", ours, np.array(theirs))
        assert not found.passed and found.as_json()["absolute"] is None
        assert not FP32.norms("whole gradient", np.array(ours), np.array(theirs), "x").passed


@pytest.mark.slow
def test_the_command_as_json(copy, capsys):
    """All sections, one document and nothing else on stdout, and the status of what can't be read."""
    folder = copy("20_greedy")
    (folder / "03_odd.json").write_text("{}")
    status = main(["--golden", str(folder), "--json", "--device", "cpu"])
    document = json.loads(capsys.readouterr().out)
    assert status == document["status"] == 2
    assert document["schema"] == 1 and document["device"] == "cpu" and document["dtype"] == "float32"
    sections = {section["name"]: section["checks"] for section in document["sections"]}
    assert list(sections) == ["replay", "enumeration", "controls", "golden"]
    odd, greedy = sections["golden"]
    assert "03_odd.json" in odd["error"] and odd["measurements"] == []
    assert greedy["error"] is None and all(found["passed"] for found in greedy["measurements"])
    for name in ("replay", "enumeration", "controls"):
        assert sections[name] and all(m["passed"] for check in sections[name] for m in check["measurements"])
    controls = [found for check in sections["controls"] for found in check["measurements"]]
    assert len(controls) == 4 and all(found["control"] and found["relative"] > 0.3 for found in controls)


@pytest.mark.slow
@pytest.mark.heavy
def test_the_command_as_a_table(copy):
    folder = copy("06_kl")
    edit(folder / "06_kl.npz", lambda arrays: arrays["importance_weights"].__imul__(1.01))
    command = [sys.executable, "-m", "learner.verify", "--golden", str(folder), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("06_kl: ")]
    assert "importance_weights has error" in line and "importance_weights[" in line
    assert "fails as it must" in done.stdout and done.stdout.splitlines()[-1].endswith("(exit status 1)")


def test_arguments_that_cannot_be_used(tmp_path, capsys):
    assert main(["--golden", str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["--golden", str(tmp_path)]) == 2
    assert "holds no recorded case" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["--device", "cuda"]) == 2
        assert "no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "exit status" in capsys.readouterr().out


def test_nothing_is_unpickled(copy):
    """An array of objects would run code when it is loaded; it must be refused instead."""
    folder, hit = copy("06_kl"), []

    class Trap:
        def __reduce__(self):
            return hit.append, (1,)

    buffer = io.BytesIO()
    np.savez(buffer, prompt_ids=np.array([Trap()], dtype=object))
    hit.clear()
    (folder / "06_kl.npz").write_bytes(buffer.getvalue())
    (check,) = golden_checks(folder, ["06_kl"], FP32)
    assert check.error is not None and "prompt_ids" in check.error and not hit
