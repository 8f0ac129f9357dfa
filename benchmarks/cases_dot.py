"""The cases of the dot-product core: sizes, dtypes, masks and layouts that models really use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .measure import Settings
from .registry import BACKWARD, BOTH, FORWARD, PASSES, Inputs, register_cases

_ORACLE_PAIRS = 2**27  # a float64 matrix of 1 GiB, of which the oracle holds several
_DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class AttentionCase:
    """One call of dot-product attention: query [B, H, T_q, D], key [B, H_kv, T_k, D], value [B, H_kv, T_k, D_v].

    With `varlen` the same sizes describe B sequences of different length, T_q at most, packed into one tensor.
    """

    name: str
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0  # 0: as many as heads
    query_tokens: int = 512
    key_tokens: int = 0  # 0: as many as query tokens
    head_size: int = 64
    value_size: int = 0  # 0: the head size
    dtype: torch.dtype = torch.float32
    causal: bool = False
    mask: str = ""  # "", "random" or "documents"
    key_lengths: bool = False
    bias: bool = False
    dropout_p: float = 0.0
    varlen: bool = False
    passes: tuple[str, ...] = PASSES
    quick: bool = False
    compiled_peers: bool = False
    spread: float = 1.0  # of queries and keys; scores spread by its square
    suite: str = "dot"
    settings: Settings | None = None  # how long to measure, if not as the run is told

    def __post_init__(self) -> None:
        for attribute, default in (
            ("kv_heads", self.heads),
            ("key_tokens", self.query_tokens),
            ("value_size", self.head_size),
        ):
            if getattr(self, attribute) == 0:
                object.__setattr__(self, attribute, default)

    # ------------------------------------------------------------------ description

    @property
    def options(self) -> str:
        words = [
            "causal" if self.causal else "",
            f"mask:{self.mask}" if self.mask else "",
            "key_lengths" if self.key_lengths else "",
            "bias" if self.bias else "",
            f"dropout:{self.dropout_p}" if self.dropout_p else "",
            "varlen" if self.varlen else "",
            f"spread:{self.spread:g}" if self.spread != 1 else "",
        ]
        return " ".join(word for word in words if word)

    def columns(self) -> dict[str, Any]:
        return {
            "dtype": _DTYPE_NAMES[self.dtype],
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "query_tokens": self.query_tokens,
            "key_tokens": self.key_tokens,
            "head_size": self.head_size,
            "value_size": self.value_size,
            "options": self.options,
        }

    def small(self) -> AttentionCase:
        """The same call at a small size: pages in the code before memory is measured."""
        return replace(self, query_tokens=min(self.query_tokens, 8), key_tokens=min(self.key_tokens, 8))

    def lengths(self) -> list[int]:
        """Sequence lengths of a ragged batch, evenly spread from a quarter of the longest to the longest."""
        longest = self.key_tokens
        steps = max(self.batch - 1, 1)
        return [max(1, longest - (3 * longest * i) // (4 * steps)) for i in range(self.batch)]

    def visible_pairs(self) -> float:
        """(query, key) pairs of one head that carry weight: the work that cannot be skipped."""
        if self.varlen:
            return float(sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths()))
        if self.key_lengths:
            return float(sum(self.lengths()) * self.query_tokens)
        pairs = float(self.batch * self.query_tokens * self.key_tokens)
        if self.causal:
            q, k = self.query_tokens, self.key_tokens
            pairs = self.batch * (q * (q + 1) / 2 if q <= k else k * (k + 1) / 2 + (q - k) * k)
        if self.mask:
            pairs *= float(self._mask().float().mean())
        return pairs

    def flops(self, which: str) -> float:
        """Floating-point operations of the matrix products over visible pairs (2 in the forward, 5 in the backward)."""
        size, value = self.head_size, self.value_size
        forward = 2.0 * (size + value)
        backward = 2.0 * (3 * size + 2 * value)
        per_pair = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]
        return per_pair * self.heads * self.visible_pairs()

    def streamed(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """The tensors whose one pass through memory bounds the time: keys and values where there is one query."""
        return (inputs["key"], inputs["value"]) if self.query_tokens == 1 else ()

    # ------------------------------------------------------------------ data

    def _mask(self) -> torch.Tensor:
        q, k = self.query_tokens, self.key_tokens
        if self.mask == "documents":  # four documents packed into one row: a block-diagonal mask
            row = torch.arange(q) * 4 // q
            column = torch.arange(k) * 4 // k
            return row[:, None] == column[None, :]
        keep = torch.rand(q, k, generator=torch.Generator().manual_seed(1)) < 0.5
        keep[:, 0] = True  # no fully masked row: torch's math path returns NaN there and would be no yardstick
        return keep

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, spread: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * spread).to(self.dtype)

        wanted: tuple[str, ...] = ("query", "key", "value")
        if self.varlen:
            total = sum(self.lengths())
            tensors = {
                "query": draw(total, self.heads, self.head_size, spread=self.spread),
                "key": draw(total, self.kv_heads, self.head_size, spread=self.spread),
                "value": draw(total, self.kv_heads, self.value_size),
            }
            offsets = torch.tensor([0, *self.lengths()], dtype=torch.int64).cumsum(0)
            tensors["cu_seqlens"] = offsets
            grad_out = draw(total, self.heads, self.value_size)
        else:
            tensors = {
                "query": draw(self.batch, self.heads, self.query_tokens, self.head_size, spread=self.spread),
                "key": draw(self.batch, self.kv_heads, self.key_tokens, self.head_size, spread=self.spread),
                "value": draw(self.batch, self.kv_heads, self.key_tokens, self.value_size),
            }
            grad_out = draw(self.batch, self.heads, self.query_tokens, self.value_size)
        if self.mask:
            tensors["mask"] = self._mask()
        if self.key_lengths:
            tensors["key_lengths"] = torch.tensor(self.lengths(), dtype=torch.int64)
        if self.bias:
            tensors["bias"] = draw(1, self.heads, self.query_tokens, self.key_tokens)
            wanted += ("bias",)
        for name in wanted:
            tensors[name].requires_grad_()
        return Inputs(tensors, wanted, grad_out)

    # ------------------------------------------------------------------ oracle

    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The heads that the oracle computes: those of the first key head. All of them would need O(H T^2) doubles."""
        heads = 1 if name in ("key", "value") else self.heads // self.kv_heads
        return tensor[:, :heads]

    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """Output and gradients in float64; None where the peers draw different random numbers, or it takes too much."""
        if self.dropout_p or self.batch * self.query_tokens * self.key_tokens > _ORACLE_PAIRS:
            return None
        import attnfast.reference as reference

        def part(name: str) -> torch.Tensor:
            return self.oracle_part(name, inputs[name].detach()).double().requires_grad_()

        leaves = {name: part(name) for name in inputs.wanted}
        query, key, value = leaves["query"], leaves["key"], leaves["value"]
        causal = "top_left" if self.causal else None
        if self.varlen:
            offsets, longest = inputs["cu_seqlens"], max(self.lengths())
            out = reference.varlen_attention(query, key, value, offsets, offsets, longest, longest, causal=causal)
        else:
            out = reference.attention(
                query,
                key,
                value,
                mask=inputs.tensors.get("mask"),
                bias=leaves.get("bias"),
                causal=causal,
                key_lengths=inputs.tensors.get("key_lengths"),
            )
        grad_out = self.oracle_part("query", inputs.grad_out).double()
        grads = torch.autograd.grad(out, [leaves[name] for name in inputs.wanted], grad_out)
        return out.detach(), grads


def _grid() -> list[AttentionCase]:
    base = AttentionCase("base")

    def case(name: str, **changes: Any) -> AttentionCase:
        return replace(base, name=name, **{"kv_heads": 0, "key_tokens": 0, "value_size": 0, **changes})

    bf16, fp16, fp64 = torch.bfloat16, torch.float16, torch.float64
    decode = {"batch": 8, "query_tokens": 1, "passes": (FORWARD,)}
    return [
        # Plain, over sizes.
        case("1,8,512,64", quick=True, compiled_peers=True),
        case("1,8,128,64", query_tokens=128),
        case("16,8,128,64", batch=16, query_tokens=128),
        case("1,8,2048,64", query_tokens=2048),
        case("1,4,8192,64", heads=4, query_tokens=8192),
        case("1,8,256x1024,64", query_tokens=256, key_tokens=1024),
        case("1,8,512,32", head_size=32),
        case("1,8,512,80", head_size=80),
        case("1,8,512,128", head_size=128, quick=True),
        case("1,8,2048,128", query_tokens=2048, head_size=128),
        case("1,8,512,64 D_v=128", value_size=128, quick=True),
        # What is visible.
        case("1,8,512,64 causal", causal=True, quick=True, compiled_peers=True),
        case("1,8,2048,64 causal", query_tokens=2048, causal=True),
        case("1,4,8192,64 causal", heads=4, query_tokens=8192, causal=True),
        case("1,8,512,128 causal", head_size=128, causal=True),
        case("1,8,512,64 boolean mask", mask="random", quick=True),
        case("1,8,512,64 documents mask", mask="documents"),
        case("4,8,512,64 key lengths", batch=4, key_lengths=True, quick=True),
        case("8,8,512,64 varlen", batch=8, varlen=True, quick=True),
        case("8,8,512,64 varlen causal", batch=8, varlen=True, causal=True),
        # Other options.
        case("1,8/2,512,64 GQA", kv_heads=2, quick=True),
        case("1,8,512,64 bias with gradient", bias=True, quick=True, compiled_peers=True),
        case("1,8,512,64 dropout", dropout_p=0.1, quick=True),
        # Other dtypes.
        case("1,8,512,64 bf16", dtype=bf16, quick=True, compiled_peers=True),
        case("1,8,512,64 bf16 causal", dtype=bf16, causal=True),
        case("1,8,2048,64 bf16", dtype=bf16, query_tokens=2048),
        case("1,8,512,64 fp16", dtype=fp16, quick=True),
        case("1,8,512,64 fp64", dtype=fp64, quick=True),
        # One new query against a cache.
        case("8,8,1x1024,64 decode", key_tokens=1024, quick=True, **decode),
        case("8,8,1x8192,64 decode", key_tokens=8192, **decode),
        case("1,8,1x8192,64 decode", key_tokens=8192, **{**decode, "batch": 1}),
        case("8,8,1x1024,64 decode bf16", key_tokens=1024, dtype=bf16, quick=True, **decode),
        case("8,8/2,1x8192,64 decode GQA", key_tokens=8192, kv_heads=2, **decode),
    ]


register_cases(_grid())
