"""Other people's attention gives the same numbers: PyPI `entmax` and `keras` on its torch backend.

Both are pinned in requirements-dev.txt. Where keras means something else (a query that may see nothing, NaN under a
mask) the tests pin down both meanings; docs/semantics.md tells users of them.

OpenNMT-py's GlobalAttention is in test_peers_opennmt.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import entmax
import pytest
import torch
from torch import Tensor

import attnfast

B, T_Q, T_K, D, D_V = 3, 5, 7, 8, 4
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-13}}


@pytest.fixture(params=DTYPES, ids=["f32", "f64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    """A leaf; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Query, key and value ``[B, T, ...]`` without a head axis, and a weight ``[D]``."""
    shapes = {"query": (B, T_Q, D), "key": (B, T_K, D), "value": (B, T_K, D_V), "weight": (D,)}
    return {name: draw(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def dot(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, **options: Any) -> Any:
    """``attnfast.attention`` on tensors without a head axis, weights too."""
    mask = None if mask is None else mask.unsqueeze(1)
    heads = (x.unsqueeze(1) for x in (query, key, value))
    result = attnfast.attention(*heads, score="dot", mask=mask, return_weights=True, **options)
    return result.output.squeeze(1), result.weights.squeeze(1)


def additive(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, **options: Any) -> Any:
    result = attnfast.additive_attention(query, key, value, weight, return_weights=True, **options)
    return result.output, result.weights


def assert_same(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], leaves: dict[str, Tensor], seen: Tensor | None = None
) -> None:
    """Outputs, weights (in the rows `seen` ``[B, T_q]``) and the gradients of a random function of them."""
    output = ours[0]
    close = TOLERANCE[output.dtype]
    rows = torch.ones(output.shape[:-1], dtype=torch.bool) if seen is None else seen
    probes = [draw(*x.shape, dtype=x.dtype, seed=90 + i).detach() for i, x in enumerate(ours)]
    probes[1] = probes[1] * rows.unsqueeze(-1)
    gradients = []
    for result in (ours, theirs):
        total = sum((x * probe).sum() for x, probe in zip(result, probes))
        gradients.append(torch.autograd.grad(total, list(leaves.values())))
    torch.testing.assert_close(ours[0], theirs[0], **close)
    torch.testing.assert_close(ours[1][rows], theirs[1][rows], **close)
    for name, mine, other in zip(leaves, *gradients):
        assert mine.abs().max() > 1e-3, f"the gradient of {name} says nothing"
        torch.testing.assert_close(mine, other, **close, msg=lambda text, name=name: f"gradient of {name}: {text}")


# --------------------------------------------------------------------------------------------------------------- entmax


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15"])
def test_entmax(normalizer: str, score: str, spread: float, masked: bool, dtype: torch.dtype) -> None:
    """Their function on scores of the formula; a key is hidden from it by a score of -inf."""
    leaves = operands(dtype)
    mask = None
    if masked:
        mask = torch.rand(B, T_Q, T_K, generator=torch.Generator().manual_seed(5)) < 0.6
        mask[..., 2] = True  # no row without a key, which entmax turns into NaN
        assert not mask.all()
    query, key, value, weight = leaves.values()
    if score == "dot":
        leaves.pop("weight")
        scores = query * spread @ key.transpose(-2, -1)
        ours = dot(query * spread, key, value, normalizer=normalizer, mask=mask)
    else:
        scores = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ (weight * spread)
        ours = additive(query, key, value, weight * spread, normalizer=normalizer, mask=mask)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = getattr(entmax, normalizer)(scores, dim=-1)
    assert ((weights == 0) & (scores > -torch.inf)).any() or spread < 1, "nothing is cut off: no test of the threshold"
    assert_same(ours, (weights @ value, weights), leaves)


# ---------------------------------------------------------------------------------------------------------------- keras


def _state() -> tuple[Any, ...]:
    """What an import has no business to change in torch."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
    )


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Keras on torch and on the CPU, in float32: on torch its matrix products of float64 tensors are float32 too.

    It reads its backend from the environment when it is imported, writes a configuration file at home, and draws the
    seeds of its initialisers from Python's global generator: none of that outlives the module.
    """
    generator, before = random.getstate(), _state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras
    assert keras.config.backend() == "torch"
    assert _state() == before
    with keras.device("cpu:0"):
        yield keras
    random.setstate(generator)


Call = Callable[..., tuple[Tensor, Tensor]]


def _layer(keras: Any, kind: str, scaled: bool, leaves: dict[str, Tensor]) -> tuple[Any, Call]:
    """A built layer whose scale is a leaf called "scale", and the same computation by attnfast."""
    if kind == "additive":
        layer = keras.layers.AdditiveAttention(use_scale=scaled)
    else:
        layer = keras.layers.Attention(use_scale=scaled, score_mode=kind)
    layer.build([tuple(leaves[which].shape) for which in ("query", "value", "key")])
    query, key, value = (leaves[which] for which in ("query", "key", "value"))
    scale = None
    if scaled:
        layer.scale.assign(draw(D, seed=3).detach() if kind == "additive" else 0.7)
        leaves["scale"] = scale = layer.scale.value
    ones = torch.ones(D)
    factor = torch.ones(()) if scale is None else scale
    if kind == "dot":
        return layer, lambda **options: dot(query * factor, key, value, **options)
    if kind == "additive":
        return layer, lambda **options: additive(query, key, value, factor * ones, **options)
    layer.concat_score_weight.assign(-1.3)
    leaves["concat weight"] = times = layer.concat_score_weight.value
    return layer, lambda **options: additive(factor * query, factor * key, value, times * ones, **options)


def _value_mask() -> Tensor:
    """[B, T_k]; holes as well as padding, and the first key visible in every sample."""
    return torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize("masks", ["none", "value", "query", "both", "causal", "causal and both"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scale"])
@pytest.mark.parametrize("kind", ["dot", "concat", "additive"])
def test_keras(keras: Any, kind: str, scaled: bool, masks: str) -> None:
    leaves = operands()
    leaves.pop("weight")
    layer, attend = _layer(keras, kind, scaled, leaves)
    value_mask = _value_mask() if masks in ("value", "both", "causal and both") else None
    query_mask = torch.arange(T_Q) < torch.tensor([5, 2, 3])[:, None] if masks.endswith(("query", "both")) else None
    causal = masks.startswith("causal")
    theirs = layer(
        [leaves["query"], leaves["value"], leaves["key"]],
        mask=None if masks in ("none", "causal") else [query_mask, value_mask],
        return_attention_scores=True,
        use_causal_mask=causal,
    )
    mask = torch.ones(B, T_Q, T_K, dtype=torch.bool)
    if value_mask is not None:
        mask = mask & value_mask.unsqueeze(1)
    if query_mask is not None:
        mask = mask & query_mask.unsqueeze(2)
    ours = attend(mask=None if masks in ("none", "causal") else mask, causal="top_left" if causal else None)
    # Their weights of a padded query are those of an ordinary one, ours are zero; the outputs are zero in both.
    assert_same(ours, theirs, leaves, seen=query_mask)
    if query_mask is not None:
        assert (ours[1][~query_mask] == 0).all()
        assert (theirs[1][~query_mask].sum(-1) > 0.99).all()
        assert (ours[0][~query_mask] == 0).all() and (theirs[0][~query_mask] == 0).all()


@pytest.mark.parametrize("kind", ["dot", "additive"])
def test_keras_differs_in_rows_that_see_nothing(keras: Any, kind: str) -> None:
    """Keras subtracts 1e9 from hidden scores, which swallows them: where all are hidden its weights are uniform."""
    leaves = operands()
    leaves.pop("weight")
    layer, attend = _layer(keras, kind, False, leaves)
    value_mask = _value_mask()
    value_mask[1] = False
    inputs = [leaves["query"], leaves["value"], leaves["key"]]
    theirs = layer(inputs, mask=[None, value_mask], return_attention_scores=True)
    ours = attend(mask=value_mask.unsqueeze(1).expand(B, T_Q, T_K))
    others, close = [0, 2], TOLERANCE[torch.float32]
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine[others], other[others], **close)
        assert (mine[1] == 0).all()
    torch.testing.assert_close(theirs[1][1], torch.full((T_Q, T_K), 1 / T_K), rtol=1e-6, atol=0)
    torch.testing.assert_close(theirs[0][1], leaves["value"][1].mean(0).expand(T_Q, D_V), **close)
    mine, other = (torch.autograd.grad(result[0][1].sum(), leaves["value"])[0] for result in (ours, theirs))
    assert (mine == 0).all()
    torch.testing.assert_close(other[1].sum(0), torch.full((D_V,), float(T_Q)))


@pytest.mark.parametrize("kind", ["dot", "additive"])
def test_keras_differs_in_nan_under_a_mask(keras: Any, kind: str) -> None:
    """A hidden value takes no part in ours; keras multiplies it by zero."""
    leaves = operands()
    leaves.pop("weight")
    with torch.no_grad():
        leaves["value"][1, 2] = torch.nan
    layer, attend = _layer(keras, kind, False, leaves)
    value_mask = _value_mask()
    assert not value_mask[1, 2]
    theirs = layer([leaves["query"], leaves["value"], leaves["key"]], mask=[None, value_mask])
    ours = attend(mask=value_mask.unsqueeze(1).expand(B, T_Q, T_K))[0]
    assert ours.isfinite().all()
    assert theirs[1].isnan().all()
    torch.testing.assert_close(ours[[0, 2]], theirs[[0, 2]], **TOLERANCE[torch.float32])
