"""Bases whose block weights are stored in 4 or 8 bits (bitsandbytes), with LoRA on top in the run's dtype.

Quantized are the linear maps of the blocks, by the family's exact names, nothing else: embeddings, norms, the LM head
and a mixture's router keep the run's dtype. Weights are expanded map by map when they are used; activations are never
quantized, in neither kind. bitsandbytes' own 8-bit product rounds activations too, and picks outliers over the whole
batch: a token's log-prob would depend on which other rows share its forward, and rollout and learner would disagree
about un-updated weights. Its 4-bit product takes another kernel for few rows than for many, and on CPUs with
AVX512-BF16 another one outside of training. So only its storage is used, and its expansion of a map's weights.

Memory of a quantized weight matrix: ``few_bits.BYTES_PER_PARAMETER``; a quarter or half of bfloat16. The expanded
matrix of one linear map lives as long as its product runs, in the run's dtype.
"""

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from rewards.errors import ConfigError
from rollout.models.few_bits import Quantization


def require_bitsandbytes(kind: Quantization, device_type: str) -> Any:
    """The package, if it is there and can quantize on this kind of device ("cpu", "cuda"). Raises ConfigError."""
    _unhide()
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


def _unhide() -> None:
    """Take back what ``prepare_process`` did, also where PEFT or transformers have looked in the meantime."""
    if "bitsandbytes" in sys.modules and sys.modules["bitsandbytes"] is None:
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available  # late: seconds

        del sys.modules["bitsandbytes"]
        for answer in (is_bnb_available, is_bnb_4bit_available, is_bitsandbytes_available):
            answer.cache_clear()


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
    the batch: the plain product with the expanded weights."""
    import bitsandbytes

    replaced = {
        of: type(of.__name__, (ours, of), {})
        for of, ours in ((bitsandbytes.nn.Linear4bit, _FourBits), (bitsandbytes.nn.Linear8bitLt, _EightBits))
    }
    for module in model.modules():
        for of, exact in replaced.items():
            if isinstance(module, of):
                module.__class__ = exact
    return model


class _Expanding:
    """Mixed in before bitsandbytes' linear maps. Weights and biases are frozen."""

    weight: Any
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weights [O, I] as they are used."""
        raise NotImplementedError


class _FourBits(_Expanding):
    def expanded(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.data, self.weight.quant_state).to(dtype)


class _EightBits(_Expanding):
    def expanded(self, dtype: torch.dtype) -> Tensor:
        # Numbers of both kinds in one product: a GPU turns the integers while it reads them, without a copy.
        return self.weight.data * (self.weight.SCB.unsqueeze(1) / 127).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + b with W expanded in the forward and again in the backward, so that autograd keeps none of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: _Expanding) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.expanded(x.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.linear.expanded(grad.dtype), None
