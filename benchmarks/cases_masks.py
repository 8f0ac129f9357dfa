"""What a mask costs: one call without any, and the same call with each, in the same rounds.

Here the peers are attnfast with a mask and attnfast without one; a mask that hides whole tiles saves their work, so its
time is set beside the share of tiles that are left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .cases_dot import AttentionCase
from .registry import BACKWARD, FORWARD, OURS, Inputs, Peer, Workload, register_cases, register_peer

_TILE = 64  # keys and queries of a tile in float32


@dataclass(frozen=True)
class MaskCase(AttentionCase):
    """The call without a mask; the lengths are those of a padded batch, half of it padding at most."""

    suite: str = "masks"
    passes: tuple[str, ...] = (FORWARD, BACKWARD)

    def lengths(self) -> list[int]:
        steps = max(self.batch - 1, 1)
        return [max(1, self.key_tokens - self.key_tokens * i // (2 * steps)) for i in range(self.batch)]

    def oracle(self, inputs: Inputs) -> Any:
        return None  # each peer computes something else


class Mask(Peer):
    """attnfast.attention with some keywords; `tiles` is the share of tiles that somebody sees."""

    suites = ("masks",)

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        return {}

    def visible(self, case: MaskCase) -> torch.Tensor | None:
        """[B, T_q, T_k], True where a position may be seen as far as position alone decides."""
        return None

    def tiles(self, case: MaskCase) -> float | None:
        seen = self.visible(case)
        if seen is None:
            return 1.0
        pooled = torch.nn.functional.max_pool2d(seen.float().unsqueeze(1), _TILE, ceil_mode=True)
        return float(pooled.mean())

    def build(self, case: MaskCase, inputs: Inputs) -> Workload:
        import attnfast

        tensors = (inputs["query"], inputs["key"], inputs["value"])
        call = functools.partial(attnfast.attention, *tensors, **self.keywords(case))
        return Workload(call, tensors, inputs.grad_out)


class Unmasked(Mask):
    name = OURS


def _causal(case: MaskCase) -> torch.Tensor:
    return torch.ones(1, case.query_tokens, case.key_tokens, dtype=torch.bool).tril()


def _padding(case: MaskCase) -> torch.Tensor:
    seen = torch.arange(case.key_tokens) < torch.tensor(case.lengths())[:, None]
    return seen[:, None, :].expand(case.batch, case.query_tokens, case.key_tokens)


class KeyLengths(Mask):
    name = "key lengths"

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        return {"key_lengths": torch.tensor(case.lengths())}

    def visible(self, case: MaskCase) -> torch.Tensor:
        return _padding(case)


class CausalMask(Mask):
    name = "causal"

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        return {"causal": "top_left"}

    def visible(self, case: MaskCase) -> torch.Tensor:
        return _causal(case)


class CausalLengths(Mask):
    name = "causal, key lengths"

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        return {"causal": "top_left", "key_lengths": torch.tensor(case.lengths())}

    def visible(self, case: MaskCase) -> torch.Tensor:
        return _causal(case) & _padding(case)


class BooleanMask(Mask):
    name = "boolean [T,T]"

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        size = (case.query_tokens, case.key_tokens)
        return {"mask": torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.5}


class Alibi(Mask):
    name = "ALiBi"

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        return {"alibi_slopes": 2.0 ** -torch.arange(1, case.heads + 1, dtype=torch.float32)}


class FloatBias(Mask):
    name = "bias [T,T]"

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        size = (case.query_tokens, case.key_tokens)
        return {"bias": torch.randn(size, generator=torch.Generator().manual_seed(1)).to(case.dtype)}


class Dropout(Mask):
    name = "dropout"

    def keywords(self, case: MaskCase) -> dict[str, Any]:
        return {"dropout_p": 0.1}


for _peer in (Unmasked, KeyLengths, CausalMask, CausalLengths, BooleanMask, Alibi, FloatBias, Dropout):
    register_peer(_peer())

register_cases(
    [
        MaskCase("4,4,512,64", batch=4, heads=4, query_tokens=512, quick=True),
        MaskCase("2,2,2048,64", batch=2, heads=2, query_tokens=2048),
        MaskCase("4,4,512,128", batch=4, heads=4, query_tokens=512, head_size=128),
    ]
)
