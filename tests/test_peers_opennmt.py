"""OpenNMT-py's GlobalAttention gives the same numbers as LuongAttention (dot, general) and BahdanauAttention (mlp).

How it is imported says ``helpers.opennmt_attention``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import opennmt_attention
from torch import Tensor

import attnfast
from attnfast.nn import BahdanauAttention, LuongAttention

B, T_Q, T_K, D = 3, 5, 7, 8
LENGTHS = torch.tensor([7, 3, 1])
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    with opennmt_attention():
        found = importlib.import_module("onmt.modules.global_attention").GlobalAttention
        files = {name for name in sys.modules if name.startswith("onmt.") and hasattr(sys.modules[name], "__file__")}
        assert files == {
            "onmt.modules.global_attention", "onmt.modules.sparse_activations", "onmt.utils.misc",
        }  # fmt: skip
        yield found


def ours(theirs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Our module with their parameters, which stay the leaves."""
    if theirs.attn_type == "mlp":
        module: Any = BahdanauAttention(D, D, D)
        given = {
            "query_weight": theirs.linear_query.weight,
            "bias": theirs.linear_query.bias,
            "memory_weight": theirs.linear_context.weight,
            "score_weight": theirs.v.weight.squeeze(0),
        }
    else:
        module = LuongAttention(D, D, theirs.attn_type)
        given = {"query_weight": theirs.linear_in.weight} if theirs.attn_type == "general" else {}
    return module.double(), given


def readout(theirs: Any, context: Tensor, query: Tensor) -> Tensor:
    """What they do with a context."""
    result = theirs.linear_out(torch.cat([context, query], -1))
    return result if theirs.attn_type == "mlp" else torch.tanh(result)


@pytest.mark.parametrize("one_step", [False, True], ids=["rows", "step"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
@pytest.mark.parametrize("kind", ["dot", "general", "mlp"])
def test_global_attention(peer: Any, kind: str, lengths: Tensor | None, one_step: bool) -> None:
    theirs = peer(D, attn_type=kind).double()
    query = torch.randn(*((B, D) if one_step else (B, T_Q, D)), dtype=torch.float64, requires_grad=True)
    memory = torch.randn(B, T_K, D, dtype=torch.float64, requires_grad=True)
    expected = theirs(query, memory, lengths)
    module, given = ours(theirs)
    context, weights = torch.func.functional_call(module, given, (query, memory, lengths))
    found = readout(theirs, context, query), weights
    leaves = [query, memory, *theirs.parameters()]
    probes = [torch.randn_like(x) for x in expected]
    gradients = []
    for results in (found, expected):
        torch.testing.assert_close(results, expected, **CLOSE)
        loss = sum((x * probe).sum() for x, probe in zip(results, probes, strict=True))
        gradients.append(torch.autograd.grad(loss, leaves))
    assert all(g.abs().max() > 1e-3 for g in gradients[0]), "a gradient that says nothing"
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("kind", ["dot", "general", "mlp"])
def test_global_attention_with_sparsemax(peer: Any, kind: str) -> None:
    theirs = peer(D, attn_type=kind, attn_func="sparsemax").double()
    query, memory = (torch.randn(B, T, D, dtype=torch.float64, requires_grad=True) for T in (T_Q, T_K))
    expected = theirs(query, memory, LENGTHS)
    _, given = ours(theirs)
    options: dict[str, Any] = {"normalizer": "sparsemax", "key_lengths": LENGTHS, "return_weights": True}
    if kind == "mlp":
        operands = query @ given["query_weight"].t(), memory @ given["memory_weight"].t(), memory, given["score_weight"]
        result: Any = attnfast.additive_attention(*operands, score_bias=given["bias"], **options)
        context, weights = result.output, result.weights
    else:
        projected = query @ given["query_weight"].t() if given else query
        result = attnfast.attention(*(x.unsqueeze(1) for x in (projected, memory, memory)), score="dot", **options)
        context, weights = result.output.squeeze(1), result.weights.squeeze(1)
    found = readout(theirs, context, query), weights
    torch.testing.assert_close(found, expected, **CLOSE)
    if kind != "mlp":
        assert (weights[0] == 0).any(), "nothing is cut off: no test of the threshold"
    gradients = [torch.autograd.grad(x[0].sin().sum(), (query, memory)) for x in (found, expected)]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_global_attention_differs_where_there_is_no_memory(peer: Any) -> None:
    """A sample of length 0: their softmax of nothing is NaN, ours gives a context of zero."""
    theirs = peer(D, attn_type="general").double()
    query, memory = (torch.randn(2, T, D, dtype=torch.float64) for T in (T_Q, T_K))
    lengths = torch.tensor([0, 4])
    module, given = ours(theirs)
    context, weights = torch.func.functional_call(module, given, (query, memory, lengths))
    _, others = theirs(query, memory, lengths)
    assert others[0].isnan().all() and weights[0].eq(0).all() and context[0].eq(0).all()
    torch.testing.assert_close(weights[1], others[1], **CLOSE)
