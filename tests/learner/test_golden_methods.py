"""Recorded cases of the methods' official code: all of tests/golden/methods pass, anything that is off is found and
named, folders are told apart, and what can't be read is said so."""

import json
import shutil

import numpy as np
import pytest

from learner.verification.checks import Check, method_checks
from learner.verification.measurement import Meter
from learner.verification.methods.case import read_method_case
from learner.verification.recorded import MethodFile, known_methods, recorded_cases
from learner.verify import main
from rewards.errors import ConfigError, DataError
from tests.support.hand_made import GOLDEN

FP32 = Meter("cpu", "float32")
CASES = recorded_cases(GOLDEN).methods
NAMES = [f"{folder.name}/{name}" for folder, name in CASES]


def check_of(case: MethodFile) -> Check:
    (check,) = method_checks([case], FP32)
    return check


def failing(check: Check) -> set[str]:
    return {found.quantity for found in check.measurements if not found.passed}


@pytest.fixture
def copy(tmp_path):
    """Puts a case, with the base weights, where it can be spoiled."""

    def one(case: MethodFile) -> MethodFile:
        folder = tmp_path / "methods" / case.folder.name
        folder.mkdir(parents=True)
        shutil.copy(GOLDEN / "weights_base.npz", tmp_path)
        for suffix in (".npz", ".json"):
            shutil.copy(case.folder / f"{case.name}{suffix}", folder)
        return MethodFile(folder, case.name)

    return one


def edit(case: MethodFile, change) -> None:
    path = case.folder / f"{case.name}.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(path, **arrays)


def set_to(case: MethodFile, **settings: object) -> None:
    path = case.folder / f"{case.name}.json"
    kept = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))


def test_every_folder_here_is_of_a_known_method():
    assert not recorded_cases(GOLDEN).unknown
    assert {case.folder.name for case in CASES} == known_methods()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_recorded_cases_pass(case):
    check = check_of(case)
    assert check.error is None and check.measurements and not failing(check), failing(check)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.slow
def test_control_a_record_that_is_off_is_found(case, copy):
    """A reward, a loss and an entry of the gradient."""
    if case.name == "05_training_loop_phases":
        pytest.skip("a loop has no one gradient; test_dtm.py has its controls")
    spoiled = copy(case)
    names = []

    def change(arrays):
        arrays[first_of(arrays, "rewards", "rewards_per_func", "ex_advantages")].flat[-1] += 0.25
        losses = arrays[first_of(arrays, "loss", "losses", "loss_per_micro_batch")]
        losses.flat[0] += 2e-5 * max(1, abs(losses.flat[0]))
        names.extend(sorted(name for name in arrays if name.startswith("grad/")))
        arrays[names[-1]].flat[5] += 3e-4 * max(1.0, *(np.abs(arrays[name]).max() for name in names))

    edit(spoiled, change)
    check = check_of(spoiled)
    assert check.error is None
    off = [found for found in check.measurements if not found.passed]
    assert {"advantages", "loss", "gradient"} <= {word for found in off for word in found.quantity.split()}
    (gradient,) = [found for found in off if found.parts]
    assert any(part.where.startswith(names[-1]) and not part.passed for part in gradient.parts)


@pytest.mark.parametrize(
    ("name", "array", "change", "quantity"),
    [
        ("d1/04", "gen/model.transformer.blocks.0.q_proj.lora_A.weight", lambda a: a.__iadd__(0.01), "token log-probs"),
        ("d1/04", "cur/model.transformer.blocks.3.ff_out.lora_B.weight", lambda a: a.__iadd__(0.01), "token log-probs"),
        ("d1/04", "noised_ids", lambda a: a[0, 0].__setitem__(slice(0, 20), 2), "token log-probs"),
        ("d1/04", "old_logps", lambda a: a[0, 0].__iadd__(2e-4), "token log-probs"),
        ("d1/04", "ref_logps", lambda a: a[0, 0].__iadd__(2e-4), "token log-probs"),
        ("d1/04", "ratio", lambda a: a.__imul__(1.0002), "ratios"),
        ("d1/04", "mean_kl", lambda a: a.__iadd__(2e-3), "ratios"),
        ("d1/04", "row_loss_sum", lambda a: a.__iadd__(1e-3), "row values"),
        ("d1/04", "clip_ratio", lambda a: a.__iadd__(1e-3), "clip fraction"),
        ("d1/04", "completion_mask", lambda a: a[1].__setitem__(3, 0), "masks"),
        ("wd1/01", "w_pos", lambda a: a.__iadd__(1e-5), "advantages"),
        ("wd1/01", "w_neg", lambda a: a.__iadd__(1e-5), "advantages"),
        ("wd1/01", "ell", lambda a: a.__imul__(1.00001), "row values"),
        ("wd1/01", "neg_loss", lambda a: a.__imul__(1.00001), "loss"),
        ("wd1/05", "ce_loss", lambda a: a.__imul__(1.00001), "loss"),
    ],
)
@pytest.mark.slow
def test_one_array_that_is_off_is_found(copy, name, array, change, quantity):
    spoiled = copy(find(name))
    edit(spoiled, lambda arrays: change(arrays[array]))
    assert quantity in failing(check_of(spoiled))


def first_of(arrays, *names: str) -> str:
    return next(name for name in names if name in arrays)


def find(start: str) -> MethodFile:
    (case,) = [case for case, name in zip(CASES, NAMES, strict=True) if name.startswith(start)]
    return case


UNREADABLE = [
    (lambda case: (case.folder / f"{case.name}.npz").unlink(), "04_leftpads_kl.npz can't be read"),
    (lambda case: (case.folder / f"{case.name}.json").write_text("["), "04_leftpads_kl.json can't be read"),
    (lambda case: (case.folder / f"{case.name}.json").write_text("[1]"), "04_leftpads_kl.json can't be read"),
    (lambda case: (case.folder.parents[1] / "weights_base.npz").unlink(), "weights_base.npz can't be read"),
    (lambda case: set_to(case, eps=None), "setting eps is missing"),
    (lambda case: set_to(case, eps=1.5), "setting eps = 1.5 is not known"),
    (lambda case: set_to(case, lora_r=0), "setting lora_r = 0 is not known"),
    (lambda case: set_to(case, mask=None), "setting mask is missing"),
    (lambda case: set_to(case, base_weights="../secret.npz"), "setting base_weights = '../secret.npz' is not known"),
    (lambda case: set_to(case, G=4), "array completion_ids has 6 rows, no multiple of G = 4"),
    (lambda case: set_to(case, G=3), "array prompt_ids has another prompt within rows 0 to 2"),
    (lambda case: set_to(case, C=23), "array completion_ids has shape (6, 24), expected (any, 23)"),
    (lambda case: edit(case, lambda a: a.pop("rewards")), "array rewards is missing"),
    (lambda case: edit(case, lambda a: a.pop("old_logps")), "array old_logps is missing"),
    (lambda case: edit(case, lambda a: a["rewards"].fill(np.nan)), "nan"),
    (lambda case: edit(case, lambda a: a["noised_ids"].__setitem__((0, 1, 3), 9)), "array noised_ids shows at [1, 3]"),
    (lambda case: edit(case, lambda a: a["call_rows"].__setitem__((0, 1), 0)), "array call_rows has a micro-batch"),
    (lambda case: edit(case, lambda a: a["call_iter"].fill(7)), "array call_iter has 7"),
    (lambda case: edit(case, lambda a: a.update({"cur/strange": np.zeros(2)})), "array cur/strange belongs to no"),
]


@pytest.mark.parametrize(("spoil", "reason"), UNREADABLE, ids=[reason for _, reason in UNREADABLE])
def test_what_cannot_be_read_is_said_in_one_sentence(copy, spoil, reason):
    case = copy(find("d1/04"))
    spoil(case)
    check = check_of(case)
    assert check.error is not None and not check.measurements
    assert check.error.startswith("case d1/04_leftpads_kl can't be read: ") and reason in check.error
    assert "\n" not in check.error


def test_a_case_of_wd1_that_cuts_a_group_is_refused(copy):
    case = copy(find("wd1/01"))
    edit(case, lambda arrays: arrays["call_rows"].__setitem__((0, 0), 1))
    check = check_of(case)
    assert check.error is not None


def test_folders_are_told_apart(tmp_path):
    for folder in ("methods/d1", "methods/unheard_of", "methods/empty", "blocks/sdar"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("03_agrpo.json", "methods/d1/01_x.npz", "methods/d1/01_x.json", "methods/d1/README.npz"):
        (tmp_path / file).touch()
    for file in ("methods/unheard_of/01_y.npz", "blocks/sdar/gen_01.npz"):
        (tmp_path / file).touch()
    x = [MethodFile(tmp_path / "methods" / "d1", "01_x")]
    assert recorded_cases(tmp_path) == (["03_agrpo"], x, ["blocks", "methods/unheard_of"])
    assert recorded_cases(tmp_path / "methods") == ([], x, ["unheard_of"])
    assert recorded_cases(tmp_path / "methods" / "d1") == ([], x, [])
    assert recorded_cases(tmp_path / "methods" / "unheard_of") == ([], [], ["unheard_of"])
    for folder in ("methods/empty", "absent"):
        with pytest.raises(ConfigError, match="--golden"):
            recorded_cases(tmp_path / folder)


def test_base_weights_lie_beside_a_case_or_up_to_two_folders_above(copy, tmp_path):
    case = copy(find("wd1/01"))
    for place in (tmp_path, tmp_path / "methods", case.folder):
        shutil.copy(GOLDEN / "weights_base.npz", place)
        if place != tmp_path:
            (place.parent / "weights_base.npz").unlink()
        assert read_method_case(*case).weights.by_name
    (case.folder / "weights_base.npz").unlink()
    with pytest.raises(DataError, match=r"weights_base\.npz can't be read"):
        read_method_case(*case)


@pytest.mark.slow
def test_the_command_takes_one_methods_folder(copy, capsys):
    case = copy(find("wd1/03"))
    (case.folder / "09_odd.json").write_text("{}")
    (case.folder.parent / "unheard_of").mkdir()
    shutil.copy(case.folder / f"{case.name}.npz", case.folder.parent / "unheard_of" / "01_x.npz")
    assert main(["--golden", str(case.folder.parent), "--json", "--device", "cpu"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["not_known"] == ["unheard_of"]
    (golden,) = [section["checks"] for section in document["sections"] if section["name"] == "golden"]
    fine, odd = golden
    assert fine["name"] == "wd1/03_equal_rewards" and all(found["passed"] for found in fine["measurements"])
    assert odd["error"].startswith("case wd1/09_odd can't be read: ") and "is missing" in odd["error"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_recorded_cases_pass_in_bfloat16(case):
    (check,) = method_checks([case], Meter("cpu", "bfloat16"))
    assert check.error is None and not failing(check), failing(check)
