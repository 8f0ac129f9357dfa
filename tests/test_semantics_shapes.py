"""Contract line 7 of semantics.md: shapes, strides, empties, head groups, packed sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, check_attention, leaves, oracle, problem, real

# ------------------------------------------------------------------------------------------- line 7: leading dimensions

LEADING: list[tuple[int, ...]] = [(), (3,), (2, 3), (2, 1, 3), (2, 1, 2, 3), (1, 2, 1, 2, 3)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_s07_leading_dims(backend: Any, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    """2-D to 7-D, heads last of the leading dimensions: the numbers of the 4-D call, forward and backward."""
    H = leading[-1] if leading else 1
    B = math.prod(leading[:-1])
    flat = leaves(problem(B, H, 6, 9, 8, 5, dtype=dtype))
    options: dict[str, Any] = {"causal": "bottom_right", "return_lse": True, "return_weights": True}
    want = backend.attention(*flat.values(), **options)
    shaped = {n: x.detach().reshape(*leading, *x.shape[2:]).requires_grad_() for n, x in flat.items()}
    have = backend.attention(*shaped.values(), **options)
    assert have.output.shape == (*leading, 6, 5) and have.lse.shape == (*leading, 6)
    assert have.weights.shape == (*leading, 6, 9)
    for name in ("output", "lse", "weights"):
        torch.testing.assert_close(getattr(have, name).reshape(getattr(want, name).shape), getattr(want, name))
    probe = torch.randn(want.output.shape).to(dtype)
    want_grads = torch.autograd.grad(want.output, list(flat.values()), probe)
    have_grads = torch.autograd.grad(have.output, list(shaped.values()), probe.reshape(have.output.shape))
    for a, b in zip(have_grads, want_grads):
        torch.testing.assert_close(a.reshape(b.shape), b)
    sdpa = backend.scaled_dot_product_attention(*shaped.values())
    torch.testing.assert_close(sdpa.reshape(B, H, 6, 5), backend.scaled_dot_product_attention(*flat.values()))


@pytest.mark.parametrize(
    "q,k,v",
    [
        ((1, 3), (2, 3), (2, 3)),
        ((2, 3), (1, 3), (2, 3)),
        ((2, 3), (2, 3), (1, 3)),
        ((4, 1, 3), (1, 2, 3), (2, 3)),
        ((3,), (2, 5, 3), (5, 3)),
    ],
    ids=str,
)
def test_s07_broadcast_batch_dims(
    backend: Any, dtype: torch.dtype, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    tensors = [
        torch.randn(*shape, T, 8, dtype=torch.float64).to(dtype).requires_grad_()
        for shape, T in ((q, 4), (k, 6), (v, 6))
    ]
    leading = torch.broadcast_shapes(q, k, v)
    have = backend.attention(*tensors)
    assert have.shape == (*leading, 4, 8)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    want = torch.softmax(wide[0] @ wide[1].mT / math.sqrt(8), -1) @ wide[2]
    tolerance = {8: 1e-12, 4: 2e-5, 2: 3e-2}[have.element_size()]
    torch.testing.assert_close(have.double(), want, rtol=0, atol=tolerance)
    probe = torch.randn(have.shape).to(dtype)
    for a, b in zip(torch.autograd.grad(have, tensors, probe), torch.autograd.grad(want, wide, probe.double())):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=4 * tolerance)
    same = backend.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(same, have)


def test_s07_sdpa_broadcasts_heads(backend: Any, dtype: torch.dtype) -> None:
    """torch's SDPA broadcasts every leading dimension, heads too."""
    query, key, value = (torch.randn(*shape).to(dtype) for shape in ((4, 3, 8), (2, 4, 5, 8), (2, 1, 5, 8)))
    have = backend.scaled_dot_product_attention(query, key, value)
    want = torch.softmax(query.double() @ key.double().mT / math.sqrt(8), -1) @ value.double()
    torch.testing.assert_close(have.double(), want, rtol=0, atol={8: 1e-12, 4: 2e-5, 2: 3e-2}[have.element_size()])


MASK_SHAPES = [
    (7,), (1, 7), (5, 1), (5, 7), (2, 1, 1), (2, 5, 7), (3, 1, 1, 1), (3, 1, 5, 7), (3, 2, 1, 7), (1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_s07_mask_and_bias_broadcast(backend: Any, dtype: torch.dtype, name: str, shape: tuple[int, ...]) -> None:
    """Every broadcast of a boolean mask and of a bias, whose gradient comes back summed in its own shape."""
    inputs = problem(3, 2, 5, 7, 8, dtype=dtype)
    if name == "mask":
        inputs["mask"] = torch.rand(shape) < 0.7
    else:
        inputs["bias"] = torch.randn(shape, dtype=torch.float64).to(dtype)
    check_attention(backend.attention, inputs)


@pytest.mark.parametrize("shape", [(130,), (70, 1), (70, 130), (2, 1, 1), (2, 1, 70, 130)], ids=str)
def test_s07_bias_broadcast_over_tiles(backend: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Sums over 560 entries each: three ulp of the sum's terms are not three ulp of the sum."""
    inputs = problem(2, 2, 70, 130, 8, dtype=dtype)
    inputs["bias"] = torch.randn(shape, dtype=torch.float64).to(dtype)
    check_attention(backend.attention, inputs, causal="top_left")


# ------------------------------------------------------------------------------------------------------ line 7: empties


@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 0},
        {"H": 0},
        {"T_q": 0},
        {"T_k": 0},
        {"D": 0},
        {"D_v": 0},
        {"T_q": 0, "T_k": 0},
        {"D": 0, "D_v": 0},
        {"B": 0, "T_k": 0},
        {"D": 0, "T_k": 0},
        {"T_q": 1, "T_k": 0},
        {"T_q": 70, "D": 0, "T_k": 130},
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_s07_empty_sizes(backend: Any, dtype: torch.dtype, sizes: dict[str, int], causal: str | None) -> None:
    shape = {"B": 2, "H": 2, "T_q": 3, "T_k": 4, "D": 8, "D_v": 8, **sizes}
    run = check_attention(backend.attention, problem(**shape, dtype=dtype), causal=causal)
    if shape["T_k"] == 0:
        assert run.lse is not None
        assert (run.output == 0).all() and (run.lse == -math.inf).all()
    for which in ("column_sum", "row_max"):
        inputs = leaves(problem(**shape, dtype=dtype))
        result = backend.attention(*inputs.values(), causal=causal, return_weights=which)
        last = shape["T_k"] if which == "column_sum" else shape["T_q"]
        assert result.weights.shape == (shape["B"], shape["H"], last)
        (result.weights.sum() + result.output.sum()).backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in inputs.values())


def test_s07_empty_varlen(backend: Any, dtype: torch.dtype) -> None:
    """No sequence at all, and sequences that are all empty."""
    for cu in ([0], [0, 0, 0]):
        query, key, value = (torch.empty(0, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        offsets = torch.tensor(cu)
        output = backend.varlen_attention(query, key, value, offsets, offsets, 0, 0)
        assert output.shape == (0, 2, 8)
        output.sum().backward()


# ------------------------------------------------------------------------------------------ line 7: sizes of everything

HEAD_SIZES = [
    (0, 4), (1, 1), (1, 65), (3, 3), (3, 128), (8, 8), (16, 17), (17, 16), (33, 33), (64, 64), (64, 1), (65, 64),
    (100, 100), (128, 128), (128, 33), (200, 8), (256, 256),
]  # fmt: skip


@pytest.mark.parametrize("D,D_v", HEAD_SIZES)
def test_s07_head_sizes(backend: Any, dtype: torch.dtype, D: int, D_v: int) -> None:
    check_attention(backend.attention, problem(1, 2, 37, 75, D, D_v, dtype=dtype), causal="bottom_right")


@pytest.mark.parametrize("D,D_v", HEAD_SIZES)
def test_s07_head_sizes_one_query(backend: Any, dtype: torch.dtype, D: int, D_v: int) -> None:
    check_attention(backend.attention, problem(2, 4, 1, 75, D, D_v, H_kv=2, dtype=dtype))


TOKENS = [
    (1, 1), (1, 2), (2, 1), (1, 16), (1, 513), (1, 1025), (2, 700), (4, 300), (5, 6), (6, 64), (7, 65), (15, 63),
    (16, 16), (17, 31), (48, 48), (63, 5), (64, 1), (64, 128), (65, 127), (96, 33), (128, 129), (130, 64), (192, 200),
    (257, 259),
]  # fmt: skip


@pytest.mark.parametrize("T_q,T_k", TOKENS)
def test_s07_token_counts(backend: Any, dtype: torch.dtype, T_q: int, T_k: int) -> None:
    check_attention(backend.attention, problem(1, 2, T_q, T_k, 8, 12, dtype=dtype))


# ------------------------------------------------------------------------------------------------------ line 7: strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T_q", [1, 70])
def test_s07_strides(backend: Any, dtype: torch.dtype, T_q: int, layout: str) -> None:
    """Each of query, key and value in turn, then all three."""
    for names in (["query"], ["key"], ["value"], ["query", "key", "value"]):
        inputs = problem(2, 2, T_q, 67, 16, dtype=dtype)
        for name in names:
            inputs[name] = LAYOUTS[layout](inputs[name])
            before, after = inputs[name], leaves({name: inputs[name]})[name]
            assert after.stride() == before.stride() and after.is_neg() == before.is_neg()
        check_attention(backend.attention, inputs, causal="bottom_right")


def assert_same_whatever_the_layout(backend: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """On CUDA the layout decides whether tensor cores multiply, which take weights rounded to the half type."""
    if backend.kind in ("simt", "cuda") and a.dtype in (torch.bfloat16, torch.float16):
        limit = 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=limit, atol=limit * max(1.0, b.abs().max().item()))
    else:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T_q", [1, 70])
def test_s07_strides_of_grad_out(backend: Any, dtype: torch.dtype, T_q: int, layout: str) -> None:
    inputs = leaves(problem(2, 2, T_q, 67, 16, dtype=dtype))
    output = backend.attention(*inputs.values())
    grad_out = LAYOUTS[layout](torch.randn(output.shape).to(dtype))
    copy = grad_out.resolve_neg().clone(memory_format=torch.contiguous_format)
    have = torch.autograd.grad(output, list(inputs.values()), grad_out, retain_graph=True)
    want = torch.autograd.grad(output, list(inputs.values()), copy)
    for a, b in zip(have, want):
        assert_same_whatever_the_layout(backend, a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T_q", [1, 70])
def test_s07_strides_of_mask_and_bias(backend: Any, dtype: torch.dtype, T_q: int, layout: str) -> None:
    inputs = problem(2, 2, T_q, 67, 8, dtype=dtype)
    inputs["bias"] = LAYOUTS[layout](torch.randn(2, 2, T_q, 67).to(dtype))
    if layout != "negative_bit":
        inputs["mask"] = LAYOUTS[layout]((torch.rand(2, 2, T_q, 67) < 0.7).to(torch.float32)) > 0
        if "stride0" in layout:
            inputs["mask"] = LAYOUTS[layout](torch.rand(2, 2, T_q, 67) < 0.7)
    check_attention(backend.attention, inputs)


@pytest.mark.parametrize("layout", ["token_major", "last_stride_3", "storage_offset", "stride0_tokens", "negative_bit"])
def test_s07_strides_varlen(backend: Any, dtype: torch.dtype, layout: str) -> None:
    lengths = [5, 0, 33, 2]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tensors = [LAYOUTS[layout](torch.randn(1, 40, 2, 8).to(dtype))[0].detach().requires_grad_() for _ in range(3)]
    copies = [x.detach().resolve_neg().clone(memory_format=torch.contiguous_format).requires_grad_() for x in tensors]
    have = backend.varlen_attention(*tensors, cu, cu, 33, 33, causal="top_left")
    want = backend.varlen_attention(*copies, cu, cu, 33, 33, causal="top_left")
    assert_same_whatever_the_layout(backend, have, want)
    for a, b in zip(torch.autograd.grad(have.sum(), tensors), torch.autograd.grad(want.sum(), copies)):
        assert_same_whatever_the_layout(backend, a, b)


# -------------------------------------------------------------------------------------- line 7: head groups and packing


@pytest.mark.parametrize("H,H_kv", [(4, 2), (6, 1), (6, 3), (8, 8), (32, 2)])
@pytest.mark.parametrize("T_q", [1, 3, 70])
def test_s07_head_groups(backend: Any, dtype: torch.dtype, T_q: int, H: int, H_kv: int) -> None:
    inputs = problem(2, H, T_q, 67, 8, H_kv=H_kv, dtype=dtype)
    check_attention(backend.attention, inputs, causal="bottom_right")
    if inputs["key"].shape[1] != inputs["query"].shape[1]:
        grouped = backend.scaled_dot_product_attention(*inputs.values(), enable_gqa=True)
        torch.testing.assert_close(grouped, backend.attention(*inputs.values()))


def test_s07_head_groups_are_not_materialised(isa: str) -> None:
    """Torch allocations of a grouped call, forward and backward, stay far below one repeated key."""
    import attnfast

    inputs = leaves(problem(1, 32, 4, 4096, 64, H_kv=1))
    repeated = 32 * 4096 * 64 * 4
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = attnfast.attention(*inputs.values())
        torch.autograd.grad(output.sum(), list(inputs.values()))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < repeated / 4, f"an allocation of {largest} bytes; the repeated keys take {repeated}"


VARLEN_OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right", "window": (4, 1)},
    {"softcap": 1.5, "alibi_slopes": True, "sink": True, "scale": -0.3},
    {"alibi_slopes": "sequence"},
    {"score": "cosine", "scale": 4.0},
    {"score": "l2", "causal": "bottom_right", "alibi_slopes": True},
]


@pytest.mark.parametrize("index", range(len(VARLEN_OPTIONS)))
@pytest.mark.parametrize("H,H_kv", [(2, 2), (4, 1)])
def test_s07_varlen_is_a_loop_over_sequences(backend: Any, dtype: torch.dtype, H: int, H_kv: int, index: int) -> None:
    n_q, n_k = [1, 0, 70, 5, 1, 3], [130, 4, 66, 5, 1, 0]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (n_q, n_k))
    g = torch.Generator().manual_seed(4)
    base = [
        torch.randn(n, h, d, generator=g, dtype=torch.float64).to(dtype)
        for n, h, d in ((sum(n_q), H, 8), (sum(n_k), H_kv, 8), (sum(n_k), H_kv, 12))
    ]
    options = dict(VARLEN_OPTIONS[index])
    per_sequence = options.get("alibi_slopes") == "sequence"
    extras = {n: torch.rand(H, generator=g).to(real(dtype)) for n in ("alibi_slopes", "sink") if options.pop(n, False)}
    if per_sequence:
        extras["alibi_slopes"] = torch.rand(len(n_q), H, generator=g).to(real(dtype))
    x = leaves({"query": base[0], "key": base[1], "value": base[2], **extras})
    result = backend.varlen_attention(
        x["query"], x["key"], x["value"], cu_q, cu_k, 70, 130, return_lse=True, **options, **{n: x[n] for n in extras}
    )
    assert result.output.shape == (sum(n_q), H, 12) and result.lse.shape == (H, sum(n_q))
    y = leaves({"query": base[0], "key": base[1], "value": base[2], **extras}, torch.float64)
    outputs, lses = [], []
    for b in range(len(n_q)):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = oracle(
            y["query"][rows].transpose(0, 1)[None], y["key"][columns].transpose(0, 1)[None],
            y["value"][columns].transpose(0, 1)[None], **options,
            **{n: y[n][b : b + 1] if y[n].dim() == 2 else y[n] for n in extras},
        )  # fmt: skip
        outputs.append(one.output[0].transpose(0, 1))
        lses.append(one.lse[0])
    want, want_lse = torch.cat(outputs), torch.cat(lses, -1)
    rtol = {8: 1e-11, 4: 1e-4, 2: 3e-2}[want.new_empty(0, dtype=dtype).element_size()]
    torch.testing.assert_close(result.output.double(), want, rtol=rtol, atol=rtol)
    torch.testing.assert_close(result.lse.double(), want_lse, rtol=rtol, atol=rtol)
    probe, probe_lse = torch.randn(want.shape, generator=g).to(dtype), torch.randn(want_lse.shape, generator=g)
    grads = []
    for out, lse, leaf in ((result.output, result.lse, x), (want, want_lse, y)):
        total = (out * probe.to(out.dtype)).sum() + torch.where(want_lse.isfinite(), lse * probe_lse, 0).sum()
        grads.append(torch.autograd.grad(total, [t for t in leaf.values() if t.requires_grad]))
    for have_grad, want_grad in zip(*grads):
        size = want_grad.abs().max().clamp_min(1).item()
        torch.testing.assert_close(have_grad.double(), want_grad, rtol=rtol, atol=2 * rtol * size)


@pytest.mark.parametrize("causal", [False, True])
def test_s07_jagged_nested_tensors(isa: str, dtype: torch.dtype, causal: bool) -> None:
    """Jagged [B, H, j, D] goes through the varlen path: each sample as if alone, forward and backward."""
    import attnfast

    n_q, n_k = [3, 70, 1], [5, 67, 130]
    parts = [[torch.randn(n, 2, 8).to(dtype) for n in lengths] for lengths in (n_q, n_k, n_k)]
    nested = [torch.nested.nested_tensor(p, layout=torch.jagged, requires_grad=True).transpose(1, 2) for p in parts]
    output = attnfast.scaled_dot_product_attention(*nested, is_causal=causal)
    assert output.is_nested and output.layout == torch.jagged
    for b, have in enumerate(output.unbind()):
        query, key, value = (p[b].double().transpose(0, 1)[None] for p in parts)
        want = oracle(query, key, value, causal="top_left" if causal else None).output[0]
        tolerance = {8: 1e-12, 4: 2e-5, 2: 3e-2}[have.element_size()]
        torch.testing.assert_close(have.double(), want, rtol=0, atol=tolerance)
    total = sum(x.square().sum() for x in output.unbind())
    grads = torch.autograd.grad(total, nested)
    assert len(grads) == 3
    for b in range(3):
        wide = [p[b].double().transpose(0, 1)[None].requires_grad_() for p in parts]
        want = oracle(*wide, causal="top_left" if causal else None).output.square().sum()
        for have_grad, want_grad in zip(grads, torch.autograd.grad(want, wide)):
            found = have_grad.unbind()[b].double()
            torch.testing.assert_close(
                found, want_grad[0], rtol=0, atol={8: 1e-12, 4: 1e-4, 2: 0.1}[have_grad.element_size()]
            )
