"""The cases of the additive core: the sizes of attention in speech and translation models, without a head axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .cases_dot import AttentionCase
from .registry import BACKWARD, BOTH, FORWARD, PASSES, Inputs, register_cases


@dataclass(frozen=True)
class AdditiveCase(AttentionCase):
    """query [B, T_q, D], key [B, T_k, D], value [B, T_k, D_v], weight [D]; nothing masked."""

    heads: int = 1
    compiled_peers: bool = True
    suite: str = "additive"

    def small(self) -> AdditiveCase:
        return replace(self, query_tokens=min(self.query_tokens, 8), key_tokens=min(self.key_tokens, 8))

    def triples(self) -> float:
        """(query, key, dimension) triples: tanh is evaluated once for each by the formula."""
        return float(self.batch * self.query_tokens * self.key_tokens * self.head_size)

    def flops(self, which: str) -> float:
        """Of the formula, tanh counted as one: add, tanh, multiply, add; twice that in the backward."""
        pairs = float(self.batch * self.query_tokens * self.key_tokens * self.value_size)
        forward, backward = 4 * self.triples() + 2 * pairs, 8 * self.triples() + 4 * pairs
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[which]

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        tensors = {
            "query": draw(self.batch, self.query_tokens, self.head_size),
            "key": draw(self.batch, self.key_tokens, self.head_size),
            "value": draw(self.batch, self.key_tokens, self.value_size),
            "weight": draw(self.head_size) / self.head_size**0.5,
        }
        for tensor in tensors.values():
            tensor.requires_grad_()
        return Inputs(tensors, tuple(tensors), draw(self.batch, self.query_tokens, self.value_size))

    def oracle_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def oracle(self, inputs: Inputs) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
        """In float64, sample by sample: all at once would need B T_q T_k D doubles, several times."""
        import attnfast.reference as reference

        leaves = {name: inputs[name].detach().double().requires_grad_() for name in inputs.wanted}
        outputs = []
        for i in range(self.batch):
            sample = (leaves[name][i : i + 1] for name in ("query", "key", "value"))
            out = reference.additive_attention(*sample, leaves["weight"])
            assert isinstance(out, torch.Tensor)
            out.backward(inputs.grad_out[i : i + 1].double())  # type: ignore[no-untyped-call]
            outputs.append(out.detach())
        grads = [leaves[name].grad for name in inputs.wanted]
        return torch.cat(outputs), tuple(grad for grad in grads if grad is not None)


def _case(name: str, batch: int, query_tokens: int, key_tokens: int, size: int, quick: bool = False) -> AdditiveCase:
    return AdditiveCase(
        name,
        batch=batch,
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        head_size=size,
        quick=quick,
        passes=PASSES,
    )


register_cases(
    [
        _case("8,64x64,256", 8, 64, 64, 256, quick=True),
        _case("8,256x256,128", 8, 256, 256, 128),
        _case("64,32x32,512", 64, 32, 32, 512),
        _case("32,1x64,512 decode", 32, 1, 64, 512, quick=True),
    ]
)
