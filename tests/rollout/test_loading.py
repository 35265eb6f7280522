"""Weights on their way from a checkpoint's file to a device: mapped, and no copy in the host's memory."""

from pathlib import Path

import pytest
import torch

from rewards.errors import ConfigError
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.loading import load_model, recompute_activations
from rollout.models.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaDA in bfloat16, of 35 MB."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_tokenizer().save_pretrained(folder)
    sizes = {"d_model": 512, "n_layers": 1, "n_heads": 4, "mlp_hidden_size": 512, "vocab_size": 16384}
    model = LLaDAModelLM(LLaDAConfig(**sizes, mask_token_id=1, eos_token_id=0, pad_token_id=0))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def anonymous_bytes() -> int:
    """Of this process: its own memory, without the pages of files that it has mapped."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def lies_in(tensor: torch.Tensor, file: Path) -> bool:
    """Whether the tensor's memory is the mapped file's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(file))
    return False


def test_weights_of_the_files_dtype_stay_in_the_mapped_file(checkpoint: Path) -> None:
    """Which all processes of a node share; a copy in another dtype is each process's own."""
    file = checkpoint / "model.safetensors"
    before = anonymous_bytes()
    mapped = load_model(checkpoint, "bfloat16")
    assert sum(float(weight.float().sum()) for weight in mapped.state_dict().values()) != 0.0, "all of them are read"
    grown = anonymous_bytes() - before
    largest = 4 * max(weight.numel() for weight in mapped.parameters())
    print(f"{file.stat().st_size / 1e6:.0f} MB of weights, {grown / 1e6:.1f} MB of memory of its own")
    assert grown < largest, "no more than this test makes of one of them"
    assert all(lies_in(weight, file) for weight in mapped.parameters())
    assert not any(lies_in(weight, file) for weight in load_model(checkpoint, "float32").parameters()), "control"


def test_a_gpu_gets_each_tensor_from_the_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a model that was made in the host's memory."""
    asked: list[dict[str, object]] = []

    def from_pretrained(path: str, **options: object) -> None:
        asked.append(options)
        raise OSError("there is no GPU here")

    monkeypatch.setattr(LLaDAModelLM, "from_pretrained", from_pretrained)
    for device in ("cuda", "cpu"):
        with pytest.raises(ConfigError, match="there is no GPU here"):
            load_model(checkpoint, "bfloat16", device=device)
    on_gpu, on_cpu = asked
    assert on_gpu["device_map"] == {"": torch.device("cuda")} and on_gpu["dtype"] == "bfloat16"
    assert "device_map" not in on_cpu, "control"


def test_sums_of_bfloat16_products_stay_in_fp32_on_a_gpu(checkpoint: Path) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = True  # as torch begins
        assert matmul.allow_bf16_reduced_precision_reduction, "control"
        load_model(checkpoint, "bfloat16")
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_recomputing_activations_keeps_no_state_of_the_generators(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[None] = []
    read = torch.get_rng_state

    def counted() -> torch.Tensor:
        saved.append(None)
        return read()

    monkeypatch.setattr(torch, "get_rng_state", counted)
    model = load_model(checkpoint).train()
    found = []
    for enable in (recompute_activations, lambda model: model.gradient_checkpointing_enable()):
        enable(model)
        before = len(saved)
        model(input_ids=torch.arange(4)[None], logit_rows=torch.arange(2)).logits.sum().backward()
        found.append(len(saved) - before)
    assert found[0] == 0 < found[1], "control: transformers' own way keeps it"
