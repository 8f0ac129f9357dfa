"""MultiheadAttention, NTMHead and ProductKeyMemory in half types and under torch.compile, with gradients.

The modules for decoders have theirs in test_nn_machinery.py, whose rule is used here: the error against the same module
in float64 is at most about twice that of torch's module in the same half type.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import HALVES, dtype_id
from torch import Tensor, nn

from attnfast.integrations import replace_modules, restore_modules
from attnfast.nn import MultiheadAttention, NTMHead, ProductKeyMemory

E, H, B, T_Q, T_K = 12, 3, 2, 9, 11
PADDING = torch.arange(T_K) >= torch.tensor([[T_K], [6]])
ADDED = torch.randn(T_Q, T_K, generator=torch.Generator().manual_seed(3))
HIDDEN = ADDED > 0.8
# Options of the module, options of the call.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"need_weights": False}),
    "weights": ({}, {}),
    "weights of heads": ({}, {"average_attn_weights": False}),
    "causal": ({}, {"is_causal": True, "need_weights": False, "attn_mask": None}),
    "padding": ({}, {"key_padding_mask": PADDING, "need_weights": False}),
    "added": ({}, {"attn_mask": ADDED, "need_weights": False}),
    "hidden, padding": ({}, {"attn_mask": HIDDEN, "key_padding_mask": PADDING}),
    "more keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"need_weights": False}),
    "other sizes, no bias": ({"kdim": 5, "vdim": 7, "bias": False}, {"need_weights": False}),
}


def made(options: dict[str, Any]) -> MultiheadAttention:
    module, generator = MultiheadAttention(E, H, batch_first=True, **options), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    return module


def operands(module: MultiheadAttention, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = (B, T_Q, E), (B, T_K, module.kdim), (B, T_K, module.vdim)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def in_dtype(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in call.items()}


def results_and_gradients(call: Any, leaves: list[Tensor]) -> list[Tensor]:
    results = [x for x in call() if x is not None]
    total = sum((x.double().sin() * (i + 1)).sum() for i, x in enumerate(results))
    grads = torch.autograd.grad(total, leaves)  # type: ignore[arg-type]
    return [x.detach() for x in (*results, *grads)]


def run(function: Any, module: nn.Module, given: list[Tensor], call: dict[str, Any]) -> list[Tensor]:
    return results_and_gradients(lambda: function(*given, **call), [*given, *module.parameters()])


@pytest.mark.bf16
@pytest.mark.parametrize("half", HALVES, ids=dtype_id)
@pytest.mark.parametrize("name", CASES)
def test_multihead_in_half_types(name: str, half: torch.dtype) -> None:
    options, call = CASES[name]
    module = made(options).to(half)
    given = operands(module, half)
    found = run(module, module, given, in_dtype(call, half))
    assert all(x.dtype == half for x in found)
    wide = copy.deepcopy(module).double()
    truth = run(wide, wide, [x.detach().double().requires_grad_() for x in given], in_dtype(in_dtype(call, half),
                                                                                           torch.float64))  # fmt: skip
    torchs = restore_modules(copy.deepcopy(module))
    theirs = dict(call)
    if theirs.get("is_causal"):  # torch asks for the mask that ours does without
        theirs["attn_mask"] = torch.ones(T_Q, T_K).triu(1).bool()
    plain = run(torchs, torchs, given, in_dtype(theirs, half))
    assert len(found) == len(truth) == len(plain)
    largest = max(x.abs().max().item() for x in truth)
    for i, (x, y, z) in enumerate(zip(found, truth, plain, strict=True)):
        floor = 4 * torch.finfo(half).eps * max(y.abs().max().item(), largest / 10)
        ours, others = (x.double() - y).abs().max().item(), (z.double() - y).abs().max().item()
        assert ours <= 2 * others + floor, f"result {i}: error {ours:.3g}, torch's {others:.3g}, floor {floor:.3g}"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", CASES)
def test_multihead_compiled_whole(name: str, dtype: torch.dtype) -> None:
    options, call = CASES[name]
    module = made(options).to(dtype)
    given, call = operands(module, dtype), in_dtype(call, dtype)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = run(module, module, given, call)
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for x, y in zip(run(compiled, module, given, call), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=limit, atol=limit * max(1.0, y.abs().max().item()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_replaced_encoder_compiled_whole(training: bool) -> None:
    """The graph has attnfast's operator, once for each layer, and none of torch's for attention."""
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    model = replace_modules(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(training)
    x = torch.randn(B, T_K, E, requires_grad=training)
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.set_grad_enabled(training):
        expected = model(x, src_key_padding_mask=PADDING)
        got = torch.compile(model, backend=backend, fullgraph=True)(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(got, expected)
    assert sum("attnfast" in name for name in names) >= 2
    assert not any("scaled_dot_product" in name or "_transformer_encoder" in name for name in names)
    if training:
        grads = [torch.autograd.grad(y.square().sum(), [x, *model.parameters()]) for y in (got, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
def test_the_head_of_a_turing_machine(writes: bool) -> None:
    torch.manual_seed(5)
    head = NTMHead(8, 6, writes=writes)
    given = [torch.randn(B, 8), torch.randn(B, 10, 6), torch.randn(B, 10).softmax(-1)]
    given = [x.requires_grad_() for x in given]
    expected = run(head, head, given, {})
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, head, given, {}), expected)
    for half in HALVES:
        low = copy.deepcopy(head).to(half)
        rounded = [x.detach().to(half).requires_grad_() for x in given]
        wide = copy.deepcopy(low).double()
        truth = run(wide, wide, [x.detach().double().requires_grad_() for x in rounded], {})
        largest = max(x.abs().max().item() for x in truth)
        for x, y in zip(run(low, low, rounded, {}), truth, strict=True):
            assert x.dtype == half
            assert (x.double() - y).abs().max() <= 20 * torch.finfo(half).eps * max(y.abs().max().item(), largest / 10)


@pytest.mark.parametrize("half", HALVES, ids=dtype_id)
def test_product_keys_in_half_types(half: torch.dtype) -> None:
    """Every slot is chosen, so that rounding changes no choice."""
    torch.manual_seed(6)
    layer = ProductKeyMemory(16, n_keys=4, heads=2, d_key=8, k=16).to(half)
    x = torch.randn(5, 16).to(half).requires_grad_()
    wide = copy.deepcopy(layer).double()
    truth = run(lambda y: [wide(y)], wide, [x.detach().double().requires_grad_()], {})
    largest = max(y.abs().max().item() for y in truth)
    for got, y in zip(run(lambda y: [layer(y)], layer, [x], {}), truth, strict=True):
        assert got.dtype == half
        assert (got.double() - y).abs().max() <= 20 * torch.finfo(half).eps * max(y.abs().max().item(), largest / 10)
