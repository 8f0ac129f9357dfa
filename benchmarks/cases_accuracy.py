"""Where digits are lost: long sequences, scores far from each other and close together."""

from __future__ import annotations

import itertools

import torch

from .cases_dot import AttentionCase
from .measure import Settings
from .registry import BACKWARD, FORWARD, register_cases

# The time is beside the point here, and one oracle of 8192 tokens takes longer than all timing.
_BRIEF = Settings(sample_s=0.001, budget_s=0.1, min_rounds=3, max_rounds=5)
# With queries and keys of spread s, scores over sqrt(D) spread by s^2: from a plain mean over the values to a choice.
_SPREADS = (0.01, 1.0, 4.0, 10.0, 40.0)


def _case(
    tokens: int, spread: float, head_size: int = 64, causal: bool = False, dtype: torch.dtype = torch.float32
) -> AttentionCase:
    name = f"1,1,{tokens},{head_size}{' causal' if causal else ''}{' bf16' if dtype == torch.bfloat16 else ''}"
    return AttentionCase(
        f"{name} spread {spread:g}",
        heads=1,
        query_tokens=tokens,
        head_size=head_size,
        causal=causal,
        dtype=dtype,
        spread=spread,
        passes=(FORWARD, BACKWARD),
        quick=tokens == 512,
        suite="accuracy",
        settings=_BRIEF,
    )


register_cases(
    [
        *(_case(tokens, spread) for tokens, spread in itertools.product((512, 8192), _SPREADS)),
        _case(512, 10.0, head_size=128),
        _case(8192, 1.0, head_size=128),
        _case(8192, 1.0, causal=True),
        _case(8192, 1.0, dtype=torch.bfloat16),
    ]
)
