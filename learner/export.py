"""Merge a trained adapter into its base and write one model in the layout that the base was published in.

python -m learner.export --adapter RUN/adapter --out DIR [--base PATH]

Parameter names, config.json and the tokenizer's files are the base's, so whatever loads the base loads the result, its
modelling code (``auto_map``) included: that is copied from a local base, and for one of the hub the entries of
``auto_map`` name its repository. No such code is ever run here.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from learner.runs.atomic import atomic_dir
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rewards.errors import ConfigError
from rollout.process import prepare_process

# What lies beside the weights of a published checkpoint and is copied as it is. config.json is written, see there.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
MAX_SHARD = "5GB"


def export_merged(adapter_dir: Path, out_dir: Path, base: str | None = None) -> None:
    """Write base plus adapter to ``out_dir``, which appears whole or not at all, in the base's own layout.

    base: folder or hub name; None takes the one that the adapter's configuration names. Weights are merged and stored
    in the adapter's dtype, the one that it was trained in.

    Raises:
        ConfigError: when out_dir is not empty, or no base is known, or it is none that the adapter can sit on.
        DataError: when adapter_dir holds no readable adapter.
        WeightMismatch: when adapter and base disagree about names or shapes.
        UnmaskError: when the disk refuses.
    """
    from peft import LoraConfig, get_peft_model  # these take seconds, which --help needs none of

    from rollout.adapters import load_state, read_peft_folder, without_head
    from rollout.models.encoding import load_tokenizer
    from rollout.models.loading import load_model

    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"--out {out_dir} is there already and not empty; give a new folder")
    state, peft_config = read_peft_folder(adapter_dir)
    base = base or peft_config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"the adapter at {adapter_dir} doesn't name its base; give it with --base")
    dtypes = {tensor.dtype for tensor in without_head(state).values()}
    if len(dtypes) != 1:
        raise ConfigError(f"the adapter at {adapter_dir} must hold tensors of one dtype, not {sorted(dtypes)}")
    (dtype,) = dtypes
    model = load_model(base, dtype)
    lora = LoraConfig.from_pretrained(str(adapter_dir))
    lora.base_model_name_or_path = base
    try:
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(f"the adapter at {adapter_dir} doesn't fit the base {base}: {error}") from error
    load_state(adapted, state)
    merged = adapted.merge_and_unload(safe_merge=True)
    load_tokenizer(base)  # raises when there is none: a model that nobody can write a prompt for
    with atomic_dir(out_dir) as folder:
        merged.save_pretrained(folder, max_shard_size=MAX_SHARD)
        _write_config(folder, base, dtype)
        _copy_side_files(folder, base)


def _write_config(folder: Path, base: str, dtype: str) -> None:
    """config.json with the base's keys and values, the dtype apart."""
    from rollout.models.family import read_config

    config = read_config(base)
    config.pop("_commit_hash", None)  # transformers' note on where it came from
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    config.update(dict.fromkeys(names, dtype))
    repository = "" if Path(base).is_dir() else f"{base}--"
    if "auto_map" in config:
        config["auto_map"] = {
            kind: target if target is None or "--" in target else repository + target
            for kind, target in config["auto_map"].items()
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _copy_side_files(folder: Path, base: str) -> None:
    from transformers.utils import cached_file

    for name in SIDE_FILES:
        found = cached_file(
            base,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, folder / name)
    if Path(base).is_dir():
        for code in sorted(Path(base).glob("*.py")):
            shutil.copyfile(code, folder / code.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when adapter and base can't be read or merged, 2 for wrong settings."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m learner.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", required=True, type=_path, help="folder in PEFT format, such as runs/ID/adapter")
    parser.add_argument("--out", required=True, type=_path, help="folder to write; must be new or empty")
    parser.add_argument("--base", help="folder or hub name of the base; default: the one the adapter names")
    arguments = parser.parse_args(argv)
    base = arguments.base and os.path.expanduser(arguments.base)
    export_merged(arguments.adapter, arguments.out, base)
    print(arguments.out)
    return 0


def _path(text: str) -> Path:
    return Path(text).expanduser()


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
