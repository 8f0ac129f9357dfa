"""The cost of a call itself: attention over 8 tokens, where arithmetic is next to nothing."""

from __future__ import annotations

from .cases_dot import AttentionCase
from .registry import BOTH, FORWARD, register_cases

# Named by the pass they time: the plain forward runs without gradient; "graph" records one; the last uses it.
FORWARD_WITH_GRAPH = "forward, recording"

register_cases(
    [
        AttentionCase(
            "1,1,8,64",
            heads=1,
            query_tokens=8,
            passes=(FORWARD, FORWARD_WITH_GRAPH, BOTH),
            quick=True,
            suite="overhead",
        ),
        AttentionCase(
            "1,1,8,64 causal",
            heads=1,
            query_tokens=8,
            causal=True,
            passes=(FORWARD, FORWARD_WITH_GRAPH, BOTH),
            suite="overhead",
        ),
    ]
)
