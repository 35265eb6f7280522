"""What a denoising step costs through vLLM, beside the embedded engine, at three sizes, on the CPU.

    make bench-vllm [ARGS="--small --out FOLDER"]

Both engines draw the same completions in one process, in turns: 16 rows, 64 positions in 4 steps, top-k 50, one thread.
At the smallest size the model costs next to nothing, so what is left is vLLM's own: its scheduler, and the packing of
requests and answers. ``prompts``: equal, or of 8 lengths from an eighth of the longest up, which the embedded engine
pads and vLLM doesn't. ``adapter``: none, or LoRA of rank 8 on every map. Times are CPU milliseconds of a step;
``ratio`` is vLLM's over torch's.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learner.bench import report
from learner.bench.measure import interleaved, machine
from learner.bench.policy import Shape, llada_config, prompt_ids
from rewards.task import Problem
from rollout.adapters import adapter_parameters, digest, pack
from rollout.engines.base import Engine
from rollout.engines.torch import TorchEngine
from rollout.engines.vllm.engine import VllmEngine
from rollout.engines.vllm.settings import VllmSettings
from rollout.models.llada import LLaDAModelLM
from rollout.models.lora import LoraSpec
from rollout.models.tokenizer import build_tokenizer
from rollout.trajectory import GroupSpec

_SHAPE = Shape(512, prompt=32, completion=64, block=64, steps=4, rows=16, lora_r=8, position_rule="low_confidence")
SHAPES = {
    "smallest": dataclasses.replace(_SHAPE, d_model=64, layers=1, heads=2, mlp=64),
    "2.9 M": dataclasses.replace(_SHAPE, d_model=256, layers=4, heads=8, mlp=512),
    "35.7 M": dataclasses.replace(_SHAPE, vocabulary=8192, d_model=512, layers=8, heads=8, mlp=1536),
}
LENGTHS = 8

TABLES = {"Steps": ["size", "adapter", "prompts", "torch ms", "vLLM ms", "ratio", "difference ms"]}


def run(*, small: bool = False) -> dict[str, Any]:
    """All sizes, or the smallest alone, as ``report`` stores them."""
    about = machine(threads=1)
    shapes = dict([next(iter(SHAPES.items()))]) if small else SHAPES
    repeats = 1 if small else 3
    rows = [
        row
        for name, shape in shapes.items()
        for lora in (None, LoraSpec(shape.lora_r, float(shape.lora_r)))
        for row in _rows(name, shape, lora, repeats=repeats)
    ]
    return {"benchmark": "vllm", "small": small, "machine": about, "rows": rows, "tables": TABLES, "bars": []}


def _rows(name: str, shape: Shape, lora: LoraSpec | None, *, repeats: int) -> list[dict[str, Any]]:
    torch_engine, vllm_engine = _engines(shape, lora)
    prompt = prompt_ids(shape).tolist()
    shorter = [prompt[: max(1, shape.prompt * (i + 1) // LENGTHS)] for i in range(LENGTHS)]
    found = []
    for prompts, said in (([prompt] * LENGTHS, "equal"), (shorter, "of 8 lengths")):
        way = partial(_draw, shape, prompts)
        way(torch_engine)
        way(vllm_engine)
        ours, theirs = interleaved(partial(way, torch_engine), partial(way, vllm_engine), repeats)
        row = {"torch ms": 1e3 * ours.cpu / shape.steps, "vLLM ms": 1e3 * theirs.cpu / shape.steps}
        row |= {"ratio": row["vLLM ms"] / row["torch ms"], "difference ms": row["vLLM ms"] - row["torch ms"]}
        found.append({"size": name, "adapter": "none" if lora is None else "LoRA", "prompts": said, **row})
    return found


def _engines(shape: Shape, lora: LoraSpec | None) -> tuple[TorchEngine, VllmEngine]:
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), shape)
        options: dict[str, Any] = {"model_path": folder, "lora": lora, "max_rows": shape.rows, "threads": 1}
        engines = TorchEngine(**options), VllmEngine(settings=VllmSettings(), **options)
    if lora is not None:
        with torch.no_grad():
            for parameter in adapter_parameters(engines[0].model).values():
                parameter.normal_(std=0.02)
        adapter = pack(adapter_parameters(engines[0].model))
        engines[1].load_adapter(0, adapter, digest(adapter))
    return engines


def _draw(shape: Shape, prompts: list[list[int]], engine: Engine) -> None:
    groups = [GroupSpec(i, Problem("bench", {}), shape.rows // LENGTHS, i) for i in range(LENGTHS)]
    engine.generate(groups, prompts, shape.sampler)


def _write(folder: Path, shape: Shape) -> None:
    torch.manual_seed(0)
    LLaDAModelLM(llada_config(shape, max_sequence_length=shape.length)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(report.main("vllm", run))
