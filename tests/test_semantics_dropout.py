"""Contract line 9 of semantics.md: dropout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import check_attention, leaves, oracle, patch_seed, philox_keep, problem, run_attention

PATHS: dict[str, dict[str, int]] = {
    "tiles": {"B": 2, "H": 2, "T_q": 70, "T_k": 131, "D": 8},
    "small": {"B": 2, "H": 2, "T_q": 5, "T_k": 3, "D": 8},
    "decode": {"B": 3, "H": 4, "H_kv": 2, "T_q": 1, "T_k": 77, "D": 8},
    "split_decode": {"B": 1, "H": 2, "T_q": 1, "T_k": 2101, "D": 8},
}
SEEDS = [(0, 0), (123456789, 42), (2**62 + 12345678901, 2**40 + 7), (-1, -(2**63))]


def keep_of(seed: tuple[int, int], shape: dict[str, int], p: float) -> torch.Tensor:
    return philox_keep(seed, shape["B"], shape["H"], shape["T_q"], shape["T_k"], p)


def test_s09_philox_known_answer() -> None:
    """The helper's own generator on the published test vector of Philox4x32-7 (Random123): zero counter, zero key."""
    from attnfast._reference_core import philox

    zero = torch.zeros((), dtype=torch.int64)
    words = [int(w) for w in philox([zero] * 4, [zero] * 2)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    keep = philox_keep((0, 0), 1, 1, 1, 4, 0.32)
    assert keep.flatten().tolist() == [w >= math.ceil(0.32 * 2**32) for w in words]
    assert keep.flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_s09_mask_and_gradients(backend: Any, dtype: torch.dtype, path: str, p: float) -> None:
    """The mask is exactly Philox's in forward and backward: output, weights and gradients of the masked formula."""
    seed, shape = SEEDS[1], PATHS[path]
    keep = keep_of(seed, shape, p)
    run = check_attention(
        backend.seeded(seed), problem(**shape, dtype=dtype), keep=keep, dropout_p=p, causal="bottom_right"
    )
    assert run.weights is not None
    assert (run.weights[~keep] == 0).all()
    if p == 1.0:
        assert (run.output == 0).all() and (run.grads["value"] == 0).all()
        assert run.lse is not None and run.lse.isfinite().any()


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_s09_all_64_bits_of_the_seed(backend: Any, seed: tuple[int, int]) -> None:
    shape = {"B": 1, "H": 2, "T_q": 9, "T_k": 21, "D": 8}
    run = run_attention(backend.seeded(seed), problem(**shape), dropout_p=0.5, return_weights=True)
    assert run.weights is not None
    assert torch.equal(run.weights > 0, keep_of(seed, shape, 0.5))


@pytest.mark.parametrize(
    "options", [{"mask": True}, {"sink": True, "softcap": 2.0}, {"bias": True, "window": (20, 5)}], ids=str
)
def test_s09_with_other_options(backend: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    seed, shape = SEEDS[2], PATHS["tiles"]
    makers = {
        "mask": torch.rand(2, 1, 70, 131) < 0.7,
        "sink": torch.tensor([0.3, -1.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        "bias": torch.randn(2, 70, 131).to(dtype),
    }
    inputs = {**problem(**shape, dtype=dtype), **{n: makers[n] for n, x in options.items() if x is True}}
    plain = {n: x for n, x in options.items() if x is not True}
    check_attention(backend.seeded(seed), inputs, keep=keep_of(seed, shape, 0.3), dropout_p=0.3, **plain)


@pytest.mark.parametrize("weights", ["column_sum", "row_max"])
def test_s09_reduced_weights_are_the_applied_ones(backend: Any, dtype: torch.dtype, weights: str) -> None:
    """Column sums and row maxima of the weights after dropout, with their gradients."""
    seed, shape = SEEDS[1], PATHS["tiles"]
    keep = keep_of(seed, shape, 0.4)
    x = leaves(problem(**shape, dtype=dtype))
    y = leaves(problem(**shape, dtype=dtype), torch.float64)
    have = backend.seeded(seed)(*x.values(), dropout_p=0.4, return_weights=weights).weights
    full = oracle(*y.values(), keep=keep, dropout_p=0.4).weights
    want = full.sum(-2) if weights == "column_sum" else full.amax(-1)
    rtol = {8: 1e-12, 4: 1e-4, 2: 3e-2}[torch.empty(0, dtype=dtype).element_size()]
    torch.testing.assert_close(have.double(), want, rtol=rtol, atol=rtol)
    probe = torch.randn(want.shape)
    have_grads = torch.autograd.grad((have * probe).sum(), [x["query"], x["key"]])
    want_grads = torch.autograd.grad((want * probe).sum(), [y["query"], y["key"]])
    for a, b in zip(have_grads, want_grads):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)


def test_s09_varlen(backend: Any, dtype: torch.dtype) -> None:
    """Packed input: the row is head * total_q + packed position, the column the key's place in its own sequence."""
    seed, p = SEEDS[1], 0.4
    n_q, n_k = [3, 0, 70, 1], [5, 4, 67, 130]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (n_q, n_k))
    total_q, total_k, H = sum(n_q), sum(n_k), 2
    g = torch.Generator().manual_seed(2)
    x = [torch.randn(n, H, 8, generator=g).to(dtype).requires_grad_() for n in (total_q, total_k, total_k)]
    y = [t.detach().double().requires_grad_() for t in x]
    have = backend.seeded_varlen(seed)(*x, cu_q, cu_k, 70, 130, dropout_p=p)
    rows = philox_keep(seed, 1, H, total_q, max(n_k), p)  # [1, H, total_q, longest]
    pieces = []
    for b, (a, c) in enumerate(zip(n_q, n_k)):
        at, to = slice(cu_q[b], cu_q[b] + a), slice(cu_k[b], cu_k[b] + c)
        query, key, value = (t[s].transpose(0, 1)[None] for t, s in zip(y, (at, to, to)))
        pieces.append(oracle(query, key, value, keep=rows[:, :, at, :c], dropout_p=p).output[0].transpose(0, 1))
    want = torch.cat(pieces)
    rtol = {8: 1e-12, 4: 1e-4, 2: 3e-2}[have.element_size()]
    torch.testing.assert_close(have.double(), want, rtol=rtol, atol=rtol)
    probe = torch.randn(want.shape).to(dtype)
    for a, b in zip(torch.autograd.grad(have, x, probe), torch.autograd.grad(want, y, probe.double())):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=4 * rtol)


def test_s09_zero_is_no_dropout(backend: Any, dtype: torch.dtype) -> None:
    inputs = problem(**PATHS["tiles"], dtype=dtype)
    before = torch.get_rng_state()
    plain, zero = backend.attention(*inputs.values()), backend.attention(*inputs.values(), dropout_p=0.0)
    assert torch.equal(plain, zero) and torch.equal(torch.get_rng_state(), before)


def test_s09_manual_seed_reproduces(backend: Any, dtype: torch.dtype) -> None:
    inputs = problem(1, 2, 33, 40, 8, dtype=dtype)

    def draw(seed: int | None = None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return backend.attention(*inputs.values(), dropout_p=0.3, return_weights=True).weights > 0

    first, second = draw(5), draw()
    assert not torch.equal(first, second), "two calls in a row drew the same mask"
    assert torch.equal(draw(5), first) and torch.equal(draw(), second)
    assert not torch.equal(draw(6), first)
    torch.manual_seed(5)
    a = backend.scaled_dot_product_attention(*inputs.values(), dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(a, backend.scaled_dot_product_attention(*inputs.values(), dropout_p=0.3))


@pytest.mark.parametrize("T_q", [1, 70])
def test_s09_independent_of_threads_and_sizes(isa: str, T_q: int) -> None:
    """The weight at (row, column) lives or dies by its place alone: not by threads, T_k, or the kernel taken."""
    import attnfast

    def mask(T_q: int, T_k: int, threads: int, D: int = 8) -> torch.Tensor:
        torch.set_num_threads(threads)
        with pytest.MonkeyPatch.context() as patch:
            patch_seed(patch, SEEDS[2])
            result = attnfast.attention(*problem(1, 1, T_q, T_k, D).values(), dropout_p=0.5, return_weights=True)
        return result.weights > 0

    large = mask(T_q, 700, 1)
    for threads in (1, 2, 4):
        assert torch.equal(mask(T_q, 700, threads), large)
        assert torch.equal(mask(T_q, 90, threads, 64), large[..., :90])
    assert torch.equal(mask(1, 700, 2), large[:, :, :1])


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_s09_rate_and_independence(isa: str, p: float) -> None:
    """Rates over all weights, by row, by column and of agreement with the neighbour, each within five sigma."""
    import attnfast

    torch.manual_seed(11)
    inputs = problem(2, 2, 256, 512, 8)
    dropped = attnfast.attention(*inputs.values(), dropout_p=p, return_weights=True).weights == 0
    dropped = dropped.double().reshape(-1, 512)

    def within(rate: torch.Tensor, expected: float, draws: int, checks: int) -> None:
        sigma = math.sqrt(expected * (1 - expected) / draws)
        bound = 5 if checks < 100 else 6
        assert (rate - expected).abs().max() <= bound * sigma

    within(dropped.mean(), p, dropped.numel(), 1)
    within(dropped.mean(0), p, dropped.shape[0], 512)
    within(dropped.mean(1), p, 512, dropped.shape[0])
    agree = p * p + (1 - p) * (1 - p)
    for step in (1, 2, 4):
        within((dropped[:, step:] == dropped[:, :-step]).double().mean(), agree, dropped[:, step:].numel(), 1)
        within((dropped[step:] == dropped[:-step]).double().mean(), agree, dropped[step:].numel(), 1)


def test_s09_expectation(isa: str) -> None:
    """Kept weights are scaled by 1 / (1 - p): the mean over many draws is the output without dropout."""
    import attnfast

    one = problem(1, 1, 4, 24, 8)
    query, key, value = (x.expand(4000, -1, -1, -1) for x in one.values())
    mean = attnfast.attention(query, key, value, dropout_p=0.3).mean(0)
    torch.testing.assert_close(mean, attnfast.attention(*one.values())[0], rtol=0, atol=0.05)
