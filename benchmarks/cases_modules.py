"""The cases of modules: `torch.nn.MultiheadAttention` and a `torch.nn.TransformerEncoder`, trained and evaluated.

In evaluation torch goes round the modules with native functions of a layer ("fast path"), which are compared too. A
padded batch becomes a nested tensor there; padded places of an output are nobody's business and are not compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .measure import Settings
from .registry import BOTH, FORWARD, Inputs, register_cases


@dataclass(frozen=True)
class ModulesCase:
    """x [B, T, E] through one attention module (layers = 0), or through an encoder of so many layers."""

    name: str
    layers: int = 0
    batch: int = 8
    tokens: int = 128
    width: int = 512
    heads: int = 8
    padded: bool = False
    causal: bool = False
    need_weights: bool = False
    training: bool = False
    quick: bool = False
    compiled_peers: bool = False
    suite: str = "modules"
    settings: Settings | None = None

    @property
    def passes(self) -> tuple[str, ...]:
        return (BOTH,) if self.training else (FORWARD,)

    def columns(self) -> dict[str, Any]:
        given = ("padded", "causal", "need_weights", "training")
        return {
            "dtype": "fp32",
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.heads,
            "query_tokens": self.tokens,
            "key_tokens": self.tokens,
            "head_size": self.width // self.heads,
            "value_size": self.width // self.heads,
            "options": " ".join(name for name in given if getattr(self, name)),
        }

    def small(self) -> ModulesCase:
        return replace(self, batch=2, tokens=12, width=8 * self.heads)

    def module(self) -> nn.Module:
        """torch's module with parameters from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if not self.layers:
                attention = nn.MultiheadAttention(self.width, self.heads, batch_first=True)
                return attention.train(self.training)
            layer = nn.TransformerEncoderLayer(self.width, self.heads, 4 * self.width, dropout=0.0, batch_first=True)
            return nn.TransformerEncoder(layer, self.layers).train(self.training)

    def arguments(self, inputs: Inputs) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """What the module is called with."""
        x, padding = inputs["x"], inputs["padding"].bool() if self.padded else None
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(self.tokens, x.device, x.dtype)
        if self.layers:
            return (x,), {"mask": mask, "src_key_padding_mask": padding, "is_causal": self.causal}
        options = {"attn_mask": mask, "is_causal": self.causal, "key_padding_mask": padding}
        return (x, x, x), {**options, "need_weights": self.need_weights}

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.tokens, self.width)
        x = torch.randn(shape, generator=generator).requires_grad_(self.training)
        lengths = torch.linspace(self.tokens, max(1, self.tokens // 4), self.batch).long()
        padding = (torch.arange(self.tokens) >= lengths[:, None]).to(torch.float32)
        wanted = ("x", *(name for name, _ in self.module().named_parameters())) if self.training else ()
        return Inputs({"x": x, "padding": padding}, wanted, torch.randn(shape, generator=generator))

    def streamed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return ()

    def flops(self, which: str) -> float:
        """Of the matrix products."""
        rows, pairs = self.batch * self.tokens, self.batch * self.tokens**2
        attention = 8.0 * rows * self.width**2 + 4.0 * pairs * self.width
        layer = attention + (16.0 * rows * self.width**2 if self.layers else 0.0)
        return max(1, self.layers) * layer * (1 if which == FORWARD else 3)

    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Without the padded places of an output, which torch's own two ways fill differently."""
        if name != "query" or not self.padded:
            return tensor
        return tensor * (1 - self.inputs()["padding"].unsqueeze(-1).to(tensor.dtype))

    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """torch's module in float64, its parts one by one."""
        module = copy.deepcopy(self.module()).double()
        x = inputs["x"].detach().double().requires_grad_()
        args, options = self.arguments(Inputs({**inputs.tensors, "x": x}, (), inputs.grad_out))
        out = module(*args, **options)  # a gradient is recorded: no fast path
        out = out if isinstance(out, torch.Tensor) else out[0]
        grads = torch.autograd.grad(out, (x, *module.parameters()), inputs.grad_out.double()) if self.training else ()
        return self.oracle_part("query", out.detach()), grads


_ATTENTION = ModulesCase("attention 8,128,512")
_ENCODER = ModulesCase("encoder 2 x 8,128,512", layers=2)


def _both(case: ModulesCase, name: str, **options: Any) -> list[ModulesCase]:
    """A case in evaluation and in training."""
    return [
        replace(case, name=f"{name}, eval", **options),
        replace(case, name=f"{name}, train", training=True, **{**options, "quick": False}),
    ]


register_cases(
    [
        *_both(_ATTENTION, "attention 1,8,64", batch=1, tokens=8, width=64, heads=4),
        *_both(_ATTENTION, "attention 8,128,512", quick=True),
        *_both(_ATTENTION, "attention 8,128,512 weights", need_weights=True),
        *_both(_ATTENTION, "attention 8,128,512 padded", padded=True),
        *_both(_ATTENTION, "attention 8,128,512 causal", causal=True),
        *_both(_ATTENTION, "attention 2,1024,512", batch=2, tokens=1024),
        *_both(_ENCODER, "encoder 2 x 1,8,64", batch=1, tokens=8, width=64, heads=4),
        *_both(_ENCODER, "encoder 2 x 8,128,256", width=256, heads=4, quick=True),
        *_both(_ENCODER, "encoder 2 x 8,128,256 padded", width=256, heads=4, padded=True),
        *_both(_ENCODER, "encoder 2 x 8,128,256 causal", width=256, heads=4, causal=True),
        *_both(_ENCODER, "encoder 2 x 2,1024,256", batch=2, tokens=1024, width=256, heads=4),
    ]
)
