"""How work is shared: few heads with long sequences, many with short ones, ragged batches, one query over many keys."""

from __future__ import annotations

from typing import Any

from .cases_dot import AttentionCase
from .registry import BACKWARD, FORWARD, Inputs, register_cases

_BOTH_ALONE = (FORWARD, BACKWARD)


class _SharedCase(AttentionCase):
    """No oracle: that results do not depend on the number of threads is the tests' business."""

    def oracle(self, inputs: Inputs) -> Any:
        return None


class _OneLong(_SharedCase):
    """A ragged batch of one sequence of full length and many an eighth as long: the long one is half of the work."""

    def lengths(self) -> list[int]:
        return [max(1, self.key_tokens // 8)] * (self.batch - 1) + [self.key_tokens]


def _case(name: str, kind: type[AttentionCase] = _SharedCase, **sizes: Any) -> AttentionCase:
    return kind(name, suite="threads", **{"passes": _BOTH_ALONE, **sizes})


register_cases(
    [
        _case("1,1,512,64", heads=1),
        _case("1,1,4096,64", heads=1, query_tokens=4096, quick=True),
        _case("1,1,4096,64 causal", heads=1, query_tokens=4096, causal=True),
        _case("1,3,2048,64", heads=3, query_tokens=2048),
        _case("1,3,2048,64 causal", heads=3, query_tokens=2048, causal=True),
        _case("64,8,64,64", batch=64, query_tokens=64),
        _case("64,8,16,64", batch=64, query_tokens=16),
        _case("9,4,2048,64 varlen, one long", _OneLong, batch=9, heads=4, query_tokens=2048, varlen=True),
        _case("65,1,4096,64 varlen, one long", _OneLong, batch=65, heads=1, query_tokens=4096, varlen=True),
        _case("1,1,1x1024,64 decode", heads=1, query_tokens=1, key_tokens=1024, passes=(FORWARD,)),
        _case("1,1,1x8192,64 decode", heads=1, query_tokens=1, key_tokens=8192, passes=(FORWARD,)),
        _case("1,1,1x131072,64 decode", heads=1, query_tokens=1, key_tokens=131072, passes=(FORWARD,)),
    ]
)
