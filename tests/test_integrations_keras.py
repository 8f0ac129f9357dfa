"""attnfast.integrations.keras against Keras 3 on its torch backend: outputs, scores, gradients, weights, errors."""

from __future__ import annotations

import copy
import doctest
import importlib
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast.integrations import keras as ours

B, T_Q, T_V, D, D_V = 3, 5, 7, 8, 4


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Keras on torch and the CPU; it draws from Python's generator and writes a file at home."""
    generator = random.getstate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras
    with keras.device("cpu:0"):
        yield keras
    random.setstate(generator)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def operands(keyed: bool = True) -> list[Tensor]:
    """[query, value, key], or [query, value] of which the value is the key."""
    query, value, key = draw(B, T_Q, D, seed=0), draw(B, T_V, D_V if keyed else D, seed=1), draw(B, T_V, D, seed=2)
    return [query, value, key] if keyed else [query, value]


def masks(kind: str) -> list[Tensor | None] | None:
    queries = torch.arange(T_Q) < torch.tensor([[5], [3], [4]])
    values = torch.arange(T_V) < torch.tensor([[7], [2], [5]])
    given: dict[str, list[Tensor | None] | None] = {
        "none": None, "value": [None, values], "query": [queries, None], "both": [queries, values],
        "both and key": [queries, values, values],
    }  # fmt: skip
    return given[kind]


def loaded(layer: nn.Module, theirs: Any) -> nn.Module:
    """Keras's weights, moved away from their initial values, in both."""
    generator = torch.Generator().manual_seed(5)
    arrays = [torch.randn(array.shape, generator=generator).mul(0.5).numpy() for array in theirs.get_weights()]
    theirs.set_weights(arrays)
    layer.load_keras_weights(theirs)  # type: ignore[operator]
    return layer


def assert_same(got: Any, expected: Any, pairs: list[tuple[str, Any, Any]]) -> None:
    """Results, and gradients of a random function of them by pairs of tensors."""
    gradients = []
    for results, place in ((got, 1), (expected, 2)):
        total = sum((x * draw(*x.shape, seed=40 + i).detach()).sum() for i, x in enumerate(results))
        gradients.append(torch.autograd.grad(total, [pair[place] for pair in pairs]))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for (name, *_), x, y in zip(pairs, *gradients, strict=True):
        assert y.abs().max() > 1e-4, f"the gradient of {name} says nothing"
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def weights_of(layer: nn.Module, theirs: Any) -> list[tuple[str, Any, Any]]:
    names = [name for name, _ in layer.named_parameters()]
    return list(zip(names, layer.parameters(), [w.value for w in theirs.weights], strict=True))


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dot": ("Attention", {}),
    "dot, scale": ("Attention", {"use_scale": True}),
    "concat": ("Attention", {"score_mode": "concat"}),
    "concat, scale": ("Attention", {"score_mode": "concat", "use_scale": True}),
    "additive": ("AdditiveAttention", {}),
    "additive, no scale": ("AdditiveAttention", {"use_scale": False}),
}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", ["none", "value", "query", "both", "both and key"])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_is_keras_s(keras: Any, name: str, mask: str, causal: bool) -> None:
    kind, options = LAYERS[name]
    inputs = operands()
    theirs = getattr(keras.layers, kind)(**options)
    theirs.build([tuple(x.shape) for x in inputs])
    layer = loaded(getattr(ours, kind)(**options), theirs)
    call = {"mask": masks(mask), "return_attention_scores": True, "use_causal_mask": causal}
    expected, got = theirs(inputs, **call), layer(inputs, **call)
    pairs = [*zip(("query", "value", "key"), inputs, inputs, strict=True), *weights_of(layer, theirs)]
    assert len(pairs) == 3 + len(theirs.weights)
    assert_same(got, expected, pairs)
    alone = layer(inputs, mask=masks(mask), use_causal_mask=causal)
    torch.testing.assert_close(alone, expected[0], rtol=1e-5, atol=1e-5)


def test_without_a_key_the_value_is_it(keras: Any) -> None:
    inputs = operands(keyed=False)
    for kind in ("Attention", "AdditiveAttention"):
        theirs = getattr(keras.layers, kind)()
        expected = theirs(inputs)
        layer = getattr(ours, kind)()
        layer.load_keras_weights(theirs)
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer([*inputs, inputs[1]]), expected, rtol=1e-5, atol=1e-5)


def test_more_leading_dimensions(keras: Any) -> None:
    inputs = [x.unflatten(0, (1, 3)) for x in operands()]
    mask = [x.unflatten(0, (1, 3)) for x in masks("both") or [] if x is not None]
    got = ours.Attention()(inputs, mask=mask, return_attention_scores=True)
    expected = ours.Attention()(operands(), mask=masks("both"), return_attention_scores=True)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x[0], y)


def test_a_query_that_sees_nothing_is_zero_where_keras_gives_a_mean(keras: Any) -> None:
    inputs, hidden = operands(), torch.zeros(B, T_V, dtype=torch.bool)
    call = {"mask": [None, hidden], "return_attention_scores": True}
    out, scores = ours.Attention()(inputs, **call)
    assert not out.any() and not scores.any()
    torch.testing.assert_close(keras.layers.Attention()(inputs, **call)[1], torch.full((B, T_Q, T_V), 1 / T_V))


def test_dropout_and_its_seed() -> None:
    inputs = [torch.randn(1, 60, D), torch.ones(1, 60, D_V), torch.randn(1, 60, D)]
    layer = ours.Attention(dropout=0.5, seed=3)
    state = torch.get_rng_state()
    calls = [layer(inputs, return_attention_scores=True) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)  # the seed is the layer's own
    assert not torch.equal(calls[0][1], calls[1][1])
    again = ours.Attention(dropout=0.5, seed=3)
    torch.manual_seed(8)
    for out, scores in calls:
        same = again(inputs, return_attention_scores=True)
        assert torch.equal(same[0], out) and torch.equal(same[1], scores)
    assert not torch.equal(ours.Attention(dropout=0.5, seed=4)(inputs), calls[0][0])
    scores = calls[0][1]
    assert 0.4 < (scores == 0).float().mean() < 0.6
    torch.testing.assert_close(scores @ inputs[1], calls[0][0], rtol=1e-5, atol=1e-5)  # those after dropout, as Keras
    torch.testing.assert_close(layer(inputs, training=False), layer.eval()(inputs))
    assert not torch.equal(layer(inputs, training=True), layer(inputs))
    unseeded = ours.Attention(dropout=0.5)
    torch.manual_seed(1)
    first = unseeded(inputs)
    torch.manual_seed(1)
    assert torch.equal(unseeded(inputs), first) and not torch.equal(unseeded(inputs), first)


# ---------------------------------------------------------------------------------------------------------------- heads

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-head": ("MultiHeadAttention", {"num_heads": 2, "key_dim": 4}),
    "value size, output shape": ("MultiHeadAttention",
                                 {"num_heads": 2, "key_dim": 4, "value_dim": 3, "output_shape": 6}),
    "output of two axes, no bias": ("MultiHeadAttention",
                                    {"num_heads": 3, "key_dim": 4, "output_shape": (2, 5), "use_bias": False}),
    "gate": ("MultiHeadAttention", {"num_heads": 2, "key_dim": 4, "value_dim": 3, "use_gate": True}),
    "window": ("MultiHeadAttention", {"num_heads": 2, "key_dim": 4, "sliding_window": 2}),
    "grouped": ("GroupQueryAttention", {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2}),
    "grouped, gate, window": ("GroupQueryAttention",
                              {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 1, "use_gate": True,
                               "sliding_window": 3}),
}  # fmt: skip


@pytest.mark.parametrize("scores", [False, True], ids=["", "scores"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", ["none", "attention", "attention of heads", "value and key"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_keras_s(keras: Any, name: str, mask: str, causal: bool, scores: bool) -> None:
    kind, options = HEADS[name]
    grouped = kind == "GroupQueryAttention"
    query, value, key = draw(B, T_Q, D, seed=0), draw(B, T_V, D if grouped else 6, seed=1), draw(B, T_V, D, seed=2)
    theirs = getattr(keras.layers, kind)(**options)
    theirs.build(*(tuple(x.shape) for x in (query, value, key)))
    layer = loaded(getattr(ours, kind)(**options), theirs)
    heads = layer.heads
    seen = torch.rand(B, heads, T_Q, T_V, generator=torch.Generator().manual_seed(3)) < 0.6
    seen |= torch.arange(T_Q)[:, None] == torch.arange(T_V)  # the nearest key, which no window hides
    lengths = torch.arange(T_V) < torch.tensor([[7], [5], [6]])
    call: dict[str, Any] = {
        "none": {}, "attention": {"attention_mask": seen[:, 0]}, "attention of heads": {"attention_mask": seen},
        "value and key": {"value_mask": lengths, "key_mask": lengths.flip(0)},
    }[mask]  # fmt: skip
    call |= {"use_causal_mask": causal, "return_attention_scores": scores}
    expected, got = theirs(query, value, key, **call), layer(query, value, key, **call)
    expected, got = (x if scores else (x,) for x in (expected, got))
    pairs = [("query", query, query), ("value", value, value), ("key", key, key), *weights_of(layer, theirs)]
    # A constant added to all scores of a row changes nothing: the bias of the keys has no gradient.
    pairs = [pair for pair in pairs if pair[0] != "key.bias"]
    assert_same(got, expected, pairs)


def test_scores_of_heads_are_those_before_dropout() -> None:
    layer = ours.MultiHeadAttention(2, 4, dropout=0.5, seed=1)
    x = torch.randn(1, 30, D)
    y, scores = layer(x, x, return_attention_scores=True)
    assert (scores > 0).all()
    torch.testing.assert_close(scores, layer.eval()(x, x, return_attention_scores=True)[1])
    assert not torch.allclose(y, layer(x, x))


def test_a_padded_query_sees_nothing() -> None:
    layer = ours.MultiHeadAttention(2, 4)
    x = torch.randn(2, 4, D)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    y = layer(x, x, query_mask=mask)
    torch.testing.assert_close(y[mask], layer(x, x)[mask])
    torch.testing.assert_close(y[~mask], layer.attention_output.bias.expand(2, D))


# ------------------------------------------------------------------------------------------------- weights, conventions


@pytest.mark.parametrize("name", ["additive", *HEADS])
def test_initial_values_are_distributed_as_keras_s(keras: Any, name: str) -> None:
    kind, options = {**LAYERS, **HEADS}[name]
    inputs = [torch.randn(2, 3, 32) for _ in range(3)]
    given: Any = (inputs,) if name == "additive" else inputs
    theirs, layer = getattr(keras.layers, kind)(**options), getattr(ours, kind)(**options)
    assert all(nn.parameter.is_lazy(x) for x in layer.parameters())
    theirs(*given), layer(*given)
    arrays = theirs.get_weights()
    assert [tuple(x.shape) for x in layer.parameters()] == [x.shape for x in arrays]
    for x, array in zip(layer.parameters(), arrays, strict=True):
        assert x.requires_grad and type(x) is nn.Parameter
        bound = abs(array).max()
        assert 0.6 * bound <= x.abs().max() <= 1.67 * bound  # the largest of 32 and more uniform numbers


def test_weights_before_and_after_the_first_call_and_by_state_dict(keras: Any) -> None:
    inputs = operands()
    theirs = keras.layers.AdditiveAttention()
    expected = theirs(inputs)
    arrays = theirs.get_weights()
    late = ours.AdditiveAttention()
    late(inputs)
    late.load_keras_weights(arrays)
    other = ours.AdditiveAttention()
    other.load_state_dict(late.state_dict())
    for layer in (late, other, copy.deepcopy(other)):
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
    heads = ours.MultiHeadAttention(2, 4)
    heads(inputs[0], inputs[0])
    again = ours.MultiHeadAttention(2, 4)
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again(inputs[0], inputs[0]), heads(inputs[0], inputs[0]))


def test_dtype_of_parameters() -> None:
    x = torch.randn(1, 3, D, dtype=torch.float64)
    layer = ours.MultiHeadAttention(2, 4, dtype=torch.float64)
    assert layer(x, x).dtype == torch.float64
    assert ours.AdditiveAttention(dtype=torch.float64)([x, x]).dtype == torch.float64
    half = ours.Attention(use_scale=True)([x.bfloat16(), x.bfloat16()])
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Attention", "AdditiveAttention", "MultiHeadAttention"])
def test_compiled_whole(name: str) -> None:
    x = torch.randn(2, 5, D)
    layer = ours.MultiHeadAttention(2, 4) if name == "MultiHeadAttention" else getattr(ours, name)(use_scale=True)
    given: Any = (x, x) if name == "MultiHeadAttention" else ([x, x],)
    expected = layer(*given, use_causal_mask=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = compiled(*given, use_causal_mask=True)
    torch.testing.assert_close(got, expected)
    parameters = list(layer.parameters())
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected)]
    torch.testing.assert_close(*grads)


x = torch.zeros(1, 3, D)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no list": (lambda: ours.Attention()(x), TypeError, r"inputs: expected a list \[query, value\] or"),
    "one": (lambda: ours.Attention()([x]), ValueError, r"inputs: expected a list .*, got 1"),
    "mask no list": (lambda: ours.Attention()([x, x], mask=x), TypeError, "mask: expected a list"),
    "one mask": (lambda: ours.Attention()([x, x], mask=[x]), ValueError, "mask: expected a list .*, got 1"),
    "score": (lambda: ours.Attention(score_mode="cosine"), ValueError, "score_mode: expected 'dot' or 'concat'"),
    "dropout": (lambda: ours.Attention(dropout=1.5), ValueError, r"dropout: expected a probability in \[0, 1\]"),
    "axes": (lambda: ours.MultiHeadAttention(2, 4, attention_axes=(1, 2)), NotImplementedError,
             r"attention_axes: expected None or 1, got \(1, 2\)"),
    "groups": (lambda: ours.GroupQueryAttention(4, 3, 2), ValueError, "num_key_value_heads: expected a divisor"),
    "window": (lambda: ours.MultiHeadAttention(2, 4, sliding_window=0), ValueError, "sliding_window: expected an"),
    "rank": (lambda: ours.MultiHeadAttention(2, 4)(x[0], x), ValueError, r"query: expected \[B, T, E\], got \[3, 8\]"),
    "other size": (lambda: [m(y, x) for m in [ours.MultiHeadAttention(2, 4)] for y in (x, x[..., :5])], ValueError,
                   r"expected a last dimension of 8, as at the first call, got \[1, 3, 5\]"),
    "count": (lambda: ours.AdditiveAttention().load_keras_weights([]), ValueError,
              r"weights: expected 1 \(scale\), got 0"),
    "no weights": (lambda: ours.Attention().load_keras_weights([x]), ValueError, r"expected 0 \(none\), got 1"),
    "shape": (lambda: ours.AdditiveAttention().load_keras_weights([x]), ValueError,
              r"weights: expected scale of shape \[any\], got \[1, 3, 8\]"),
    "kernel": (lambda: ours.MultiHeadAttention(2, 4, use_bias=False).load_keras_weights([x] * 4), ValueError,
               r"weights: expected query.kernel of shape \[any, 2, 4\], got \[1, 3, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def test_keras_is_not_needed() -> None:
    """Nor imported, where it is there."""
    code = ("import sys; sys.modules['keras'] = None; import torch; from attnfast.integrations.keras import Attention; "
            "print(Attention()([torch.zeros(1, 2, 3)] * 2).shape)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2, 3])" in done.stdout
    assert attnfast.integrations.keras is ours


@pytest.mark.parametrize("name", ["keras", "_keras_base", "_keras_heads"])
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"attnfast.integrations.{name}"))
    assert results.failed == 0 and results.attempted >= 4
