"""The cases of a GPU: 16384 tokens of 2048 features, as sequences and heads, like those of papers on FlashAttention.

docs/roofline.md predicts the time of those without a mask.
"""

from __future__ import annotations

import torch

from .cases_dot import AttentionCase
from .registry import register_cases

TOKENS, WIDTH = 16384, 2048
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _case(tokens: int, size: int, dtype: torch.dtype, causal: bool) -> AttentionCase:
    batch, heads = TOKENS // tokens, WIDTH // size
    name = f"{batch},{heads},{tokens},{size} {_NAMES[dtype]}{' causal' if causal else ''}"
    quick = tokens in (2048, 8192) and dtype == torch.bfloat16
    return AttentionCase(
        name, batch, heads, query_tokens=tokens, head_size=size, dtype=dtype, causal=causal, quick=quick, suite="gpu"
    )


def _grid() -> list[AttentionCase]:
    cases = [
        _case(tokens, size, dtype, causal)
        for dtype in (torch.bfloat16, torch.float16)
        for size in (64, 128)
        for causal in (False, True)
        for tokens in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    return cases + [_case(tokens, size, torch.float32, False) for size in (64, 128) for tokens in (512, 2048, 8192)]


register_cases(_grid())
