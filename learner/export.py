"""Merge a trained adapter into its base and write one model in Hugging Face layout, tokenizer included.

python -m learner.export --adapter RUN/adapter --out DIR [--base PATH]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, get_peft_model

from learner.atomic import atomic_dir
from rewards.errors import ConfigError, UnmaskError
from rollout.adapters import load_state, read_peft_folder
from rollout.models import load_model, load_tokenizer


def export_merged(adapter_dir: Path, out_dir: Path, base: str | None = None) -> None:
    """Write base plus adapter to ``out_dir``, which appears whole or not at all. Parameter names are the base's.

    base: folder or hub name; None takes the one that the adapter's configuration names. Weights are merged and stored
    in the adapter's dtype, the one that it was trained in.

    Raises:
        ConfigError: when out_dir is not empty, or no base is known, or it is none that the adapter can sit on.
        DataError: when adapter_dir holds no readable adapter.
        WeightMismatch: when adapter and base disagree about names or shapes.
        UnmaskError: when the disk refuses.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"--out {out_dir} is there already and not empty; give a new folder")
    state, peft_config = read_peft_folder(adapter_dir)
    base = base or peft_config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"the adapter at {adapter_dir} doesn't name its base; give it with --base")
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1:
        raise ConfigError(f"the adapter at {adapter_dir} must hold tensors of one dtype, not {sorted(dtypes)}")
    model = load_model(base, dtypes.pop())
    lora = LoraConfig.from_pretrained(str(adapter_dir))
    lora.base_model_name_or_path = base
    try:
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(f"the adapter at {adapter_dir} doesn't fit the base {base}: {error}") from error
    load_state(adapted, state)
    merged = adapted.merge_and_unload(safe_merge=True)
    with atomic_dir(out_dir) as folder:
        merged.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m learner.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", required=True, type=Path, help="folder in PEFT format, such as runs/ID/adapter")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must be new or empty")
    parser.add_argument("--base", help="folder or hub name of the base; default: the one the adapter names")
    arguments = parser.parse_args(argv)
    export_merged(arguments.adapter, arguments.out, arguments.base)
    print(arguments.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UnmaskError as error:
        sys.exit(f"error: {error}")
