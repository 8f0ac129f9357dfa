"""The sweep: every head size from 16 to 256 in steps of 8 and every power of two of tokens, to find cliffs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cases_dot import AttentionCase
from .measure import Settings
from .registry import BACKWARD, FORWARD, Inputs, register_cases

HEAD_SIZES = range(16, 257, 8)
TOKENS = tuple(2**i for i in range(13))
_BRIEF = Settings(sample_s=0.001, budget_s=0.06, min_rounds=5, max_rounds=21)
_MOST_TOKENS = 4096  # of all heads together, so that long sequences do not take all the time


@dataclass(frozen=True)
class SweepCase(AttentionCase):
    """One cell; nothing but time is measured, since correctness over sizes is the tests' business."""

    suite: str = "sweep"
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    settings: Settings | None = _BRIEF

    def oracle(self, inputs: Inputs) -> Any:
        return None


def _cell(tokens: int, head_size: int) -> SweepCase:
    heads = max(1, min(8, _MOST_TOKENS // tokens))
    return SweepCase(f"T={tokens} D={head_size}", heads=heads, query_tokens=tokens, head_size=head_size)


register_cases(_cell(tokens, head_size) for tokens in TOKENS for head_size in HEAD_SIZES)
