"""Bases whose block weights are stored in 4 or 8 bits (bitsandbytes), with LoRA on top in the run's dtype.

Quantized are the linear maps of the blocks, by the family's exact names, nothing else: embeddings, norms, the LM head
and a mixture's router keep the run's dtype. Weights are expanded map by map when they are used; activations are never
quantized, in neither kind. bitsandbytes' own 8-bit product rounds activations too, and picks outliers over the whole
batch: a token's log-prob would depend on which other rows share its forward, and rollout and learner would disagree
about un-updated weights. Its fast 4-bit product for CPUs with AVX512-BF16, which it takes only outside of training,
would do the same and is off.

Memory of a quantized weight matrix: ``few_bits.BYTES_PER_PARAMETER``; a quarter or half of bfloat16. The expanded
matrix of one linear map lives as long as its product runs, in the run's dtype.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rewards.errors import ConfigError
from rollout.models.few_bits import Quantization


def require_bitsandbytes(kind: Quantization, device_type: str) -> Any:
    """The package, if it is there and can quantize on this kind of device ("cpu", "cuda"). Raises ConfigError."""
    try:
        package = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            f"model.quantization={kind} needs the package bitsandbytes, which can't be imported here ({error}); "
            "pip install bitsandbytes, or set model.quantization=null"
        ) from error
    able = getattr(package, "supported_torch_devices", {"cuda"})
    if device_type not in able:
        raise ConfigError(
            f"model.quantization={kind}: bitsandbytes {package.__version__} works on {', '.join(sorted(able))}, not on "
            f"{device_type}; set model.quantization=null"
        )
    return package


def quantization_config(kind: Quantization, dtype: str, quantized_regex: str) -> BitsAndBytesConfig:
    """For ``from_pretrained``: quantize the linear maps whose full name matches, and no other.

    transformers takes names to leave out, as patterns that it matches at the start of a module's name; this one matches
    every name but those.
    """
    leave_out = [f"(?!(?:{quantized_regex})$)"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=leave_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=leave_out,
    )


def exact_products(model: nn.Module) -> nn.Module:
    """Make a freshly loaded model's quantized maps compute the same in training and outside of it, whatever else is in
    the batch."""
    import bitsandbytes

    weight_only = type("Linear8bitLt", (_WeightOnly, bitsandbytes.nn.Linear8bitLt), {})
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.__class__ = weight_only
    return model


class _WeightOnly:
    """Mixed in before bitsandbytes' 8-bit linear map: the plain product with the expanded weights."""

    weight: Any
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return _Int8Product.apply(x, self.weight.data, self.weight.SCB, self.bias)


class _Int8Product(torch.autograd.Function):
    """x W^T + b, W = int8 * scale / 127 expanded in the forward and again in the backward, so that autograd keeps the
    8-bit weights only. Weights, scales and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O)
        return F.linear(x, _expanded(weight_OI, scale_O, x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        weight_OI, scale_O = ctx.saved_tensors
        return grad @ _expanded(weight_OI, scale_O, grad.dtype), None, None, None


def _expanded(weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_OI.to(dtype) * (scale_O.unsqueeze(1) / 127).to(dtype)
