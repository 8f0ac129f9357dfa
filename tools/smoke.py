"""The smallest proof that an installed attnfast works: `python tools/smoke.py`, with nothing but attnfast and torch.

Run against wheels: by cibuildwheel (pyproject.toml), tools/check_package.py and tools/check_torch_versions.py. One call
of each public function against torch or the reference, forward and backward, on every instruction set there is; then
what depends on torch more than on us: torch.func, torch.compile traced without a compiler, autocast, a module.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

import attnfast


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def same(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """Results and gradients agree."""
    got, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def functions() -> None:
    reference = attnfast.reference
    heads = draw(2, 4, 33, 16), draw(2, 4, 20, 16), draw(2, 4, 20, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    mask = torch.rand(33, 20) < 0.7
    mask[:, 0] = True
    same(lambda *x: attnfast.scaled_dot_product_attention(*x, mask), lambda *x: sdpa(*x, mask), *heads)
    options = {"causal": "bottom_right", "window": (9, 4), "softcap": 4.0}
    same(lambda *x: attnfast.attention(*x, **options), lambda *x: reference.attention(*x, **options), *heads)
    weight = draw(4, 16)
    same(attnfast.additive_attention, reference.additive_attention, *heads, weight)
    offsets = torch.tensor([0, 5, 19])
    packed = draw(19, 4, 16), draw(19, 4, 16), draw(19, 4, 16)
    lengths = (offsets, offsets, 14, 14)
    same(
        lambda *x: attnfast.varlen_attention(*x, *lengths),
        lambda *x: reference.varlen_attention(*x, *lengths),
        *packed,
    )
    query, keys, values = draw(3, 8), draw(50, 8), draw(50, 6)
    same(lambda q, k: attnfast.topk_scores(q, k, 5)[0], lambda q, k: (q @ k.t()).topk(5).values, query, keys)
    picks, factors = torch.randint(50, (3, 4)), draw(3, 4)
    same(
        lambda w, v: attnfast.weighted_gather(picks, w, v), lambda w, v: (w.unsqueeze(-1) * v[picks]).sum(1),
        factors, values,
    )  # fmt: skip
    same(attnfast.memory_read, lambda q, k, v: (q @ k.t()).softmax(-1) @ v, query, keys, values)
    halves = draw(3, 2, 2, 4), draw(2, 6, 4), draw(2, 6, 4), draw(36, 5)
    attnfast.product_key_read(*halves, 7).sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in halves)


def torch_itself() -> None:
    """What depends on the version of torch more than on ours."""
    query = draw(1, 2, 5, 8)
    key, value = torch.randn(2, 1, 2, 7, 8)
    batched = torch.func.vmap(lambda q: attnfast.attention(q, key, value))(query.detach().expand(3, -1, -1, -1, -1))
    torch.testing.assert_close(batched[1], attnfast.attention(query.detach(), key, value))
    _, tangent = torch.func.jvp(lambda q: attnfast.attention(q, key, value), (query.detach(),), (query.detach(),))
    assert bool(tangent.isfinite().all())
    traced = torch.compile(lambda q: attnfast.attention(q, key, value) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(query), attnfast.attention(query, key, value) + 1)
    traced(query).sum().backward()
    double = [torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(attnfast.attention, double)
    assert torch.autograd.gradgradcheck(attnfast.attention, double)
    with torch.autocast("cpu", torch.bfloat16):
        assert attnfast.attention(query, key, value).dtype == torch.bfloat16
    layer = attnfast.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-4, atol=1e-5)


def main() -> int:
    torch.manual_seed(0)
    tested = attnfast.available_isas()
    for isa in tested:
        attnfast.set_isa(isa)
        functions()
    torch_itself()
    found = {
        "attnfast": attnfast.__version__, "from": attnfast.__file__, "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "isas": tested,
    }  # fmt: skip
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
