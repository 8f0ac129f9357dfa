"""Wrong calls: each gets one clear error that names the argument, before any work; none may crash the process."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfast
from attnfast import _C

B, H, HKV, TQ, TK, D, DV = 2, 4, 2, 5, 6, 8, 3


def q(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape or (B, H, TQ, D), **kwargs)


def k(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape or (B, HKV, TK, D), **kwargs)


def v(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape or (B, HKV, TK, DV), **kwargs)


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([q(3, H, D), q(4, H, D)], layout=torch.jagged).transpose(1, 2)


def attention(*tensors: Any, **options: Any) -> Callable[[], Any]:
    given = [*tensors, *(k(), v())[len(tensors) - 1 :]] if tensors else [q(), k(), v()]
    return lambda: attnfast.attention(*given, **options)


def sdpa(*tensors: Any, **options: Any) -> Callable[[], Any]:
    given = tensors or (q(), q(B, H, TK, D), q(B, H, TK, DV))
    return lambda: attnfast.scaled_dot_product_attention(*given, **options)


def varlen(*tensors: Any, cu_q: Any = (0, 2, 5), cu_k: Any = (0, 6, 6), longest: Any = (5, 6), **options: Any) -> Any:
    given = tensors or (q(5, H, D), k(6, HKV, D), v(6, HKV, DV))
    cu = [torch.tensor(c) if isinstance(c, tuple) else c for c in (cu_q, cu_k)]
    return lambda: attnfast.varlen_attention(*given, *cu, *longest, **options)


NAN, INF = float("nan"), float("inf")
LENGTHS = torch.tensor([5, 6])

# id: (call, exception, pattern)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # kinds of tensors
    "query-list": (attention([[1.0]]), TypeError, r"query: expected a torch\.Tensor, got list"),
    "key-none": (attention(q(), None, v()), TypeError, r"key: expected a torch\.Tensor, got NoneType"),
    "value-numpy": (attention(q(), k(), v().numpy()), TypeError, r"value: expected a torch\.Tensor, got ndarray"),
    "query-integer": (attention(q(dtype=torch.int64)), TypeError, r"query: expected dtype .*float32.*got int64"),
    "query-bool": (attention(q(dtype=torch.bool)), TypeError, r"query: expected dtype .*got bool"),
    "query-complex": (attention(q(dtype=torch.complex64)), TypeError, r"query: expected dtype .*got complex64"),
    "query-float8": (attention(q().to(torch.float8_e4m3fn)), TypeError, r"query: expected dtype .*got float8_e4m3fn"),
    "key-dtype": (
        attention(q(), k(dtype=torch.float64)),
        TypeError,
        r"key: expected dtype float32 \(query's\), got float64",
    ),
    "value-dtype": (
        attention(q(), k(), v(dtype=torch.float16)),
        TypeError,
        r"value: expected dtype float32 .*got float16",
    ),
    "sdpa-value-dtype": (sdpa(q(), q(), q().bfloat16()), TypeError, r"value: expected dtype float32 .*got bfloat16"),
    "query-sparse": (attention(q().to_sparse()), TypeError, r"query: expected a dense .*got layout torch\.sparse_coo"),
    "key-sparse": (sdpa(q(), q().to_sparse(), q()), TypeError, r"key: expected a dense .*got layout torch\.sparse_coo"),
    "query-csr": (attention(q(TQ, D).to_sparse_csr(), k(TK, D), v(TK, DV)), TypeError, r"query: .*sparse_csr"),
    "query-mkldnn": (attention(q().to_mkldnn()), TypeError, r"query: expected a dense .*_mkldnn"),
    "query-quantized": (attention(quantized(q())), TypeError, r"query: quantized .*got qint8"),
    "query-meta": (attention(q(device="meta")), ValueError, r"query: .*cpu tensors only, got a tensor on meta"),
    "key-meta": (attention(q(), k(device="meta")), ValueError, r"key: .*cpu tensors only, got a tensor on meta"),
    "sdpa-key-meta": (sdpa(q(), q(device="meta"), q()), ValueError, r"key: .*cpu tensors only, got a tensor on meta"),
    "sdpa-value-meta": (
        sdpa(q(), q(), q(device="meta")),
        ValueError,
        r"value: .*cpu tensors only, got a tensor on meta",
    ),
    "all-meta": (
        sdpa(q(device="meta"), q(device="meta"), q(device="meta")),
        ValueError,
        r"query: .*got a tensor on meta",
    ),
    "mask-meta": (attention(mask=torch.ones(TQ, TK, dtype=torch.bool, device="meta")), ValueError, r"mask: .*on meta"),
    "nested-key-only": (attention(q(), jagged(), v()), TypeError, r"key: a nested tensor .*all are jagged"),
    "nested-strided": (
        lambda: attnfast.attention(*[torch.nested.nested_tensor([q(H, 3, D)], layout=torch.strided)] * 3),
        TypeError,
        r"query: nested tensors need layout=torch\.jagged",
    ),
    "nested-mask": (
        lambda: attnfast.scaled_dot_product_attention(*[jagged()] * 3, attn_mask=q(4, 4)),
        ValueError,
        r"attn_mask: .*jagged",
    ),
    "nested-lengths": (
        lambda: attnfast.attention(*[jagged()] * 3, key_lengths=LENGTHS),
        ValueError,
        r"key_lengths: .*varlen_attention",
    ),
    "nested-untransposed": (
        lambda: attnfast.attention(*[jagged().transpose(1, 2)] * 3),
        ValueError,
        r"query: .*transposing \[B, j, H, D\]",
    ),
    # shapes of the operands
    "query-0d": (attention(q(1).sum()), ValueError, r"query: expected at least 2 dimensions .*T_q, D.*got \[\]"),
    "query-1d": (attention(q(D)), ValueError, r"query: expected at least 2 dimensions .*got \[8\]"),
    "query-2d-key-4d": (attention(q(TQ, D)), ValueError, r"key: expected \[T_k, D\] as query has 2 dimensions, got"),
    "value-2d": (
        attention(q(), k(), v(TK, DV)),
        ValueError,
        r"value: expected \[\.\.\., H_kv, T_k, D_v\] .*got \[6, 3\]",
    ),
    "sdpa-key-1d": (sdpa(q(TQ, D), q(D), q(TK, D)), ValueError, r"key: expected at least 2 dimensions"),
    "sdpa-key-2d": (sdpa(q(), q(TK, D), q(TK, D)), ValueError, r"key: expected .*H_kv, T_k, D\] as query has 4"),
    "key-head-size": (
        attention(q(), k(B, HKV, TK, D + 1)),
        ValueError,
        r"key: expected .*D = 8 \(query's\), got \[2, 2, 6, 9\]",
    ),
    "sdpa-head-size": (sdpa(q(), q(B, H, TK, 7), q()), ValueError, r"key: expected .*D = 8 \(query's\)"),
    "value-tokens": (attention(q(), k(), v(B, HKV, 7, DV)), ValueError, r"value: expected .*T_k = 6 \(key's\), got"),
    "sdpa-value-tokens": (sdpa(q(), q(), q(B, H, 7, D)), ValueError, r"value: expected .*T_k = 5 \(key's\)"),
    "value-heads": (attention(q(), k(), v(B, 1, TK, DV)), ValueError, r"value: expected .*H_kv = 2 \(key's\)"),
    "value-heads-alone": (attention(q(), q(), q(B, 2, TQ, D)), ValueError, r"value: expected .*H_kv = 4 \(key's\)"),
    "heads-not-dividing": (
        attention(q(), k(B, 3, TK, D), v(B, 3, TK, DV)),
        ValueError,
        r"key: expected .*H_kv dividing H = 4 \(query's\)",
    ),
    "heads-more-than-query": (attention(q(B, 1, TQ, D)), ValueError, r"key: expected .*H_kv dividing H = 1"),
    "heads-none": (attention(q(), k(B, 0, TK, D), v(B, 0, TK, DV)), ValueError, r"key: expected .*H_kv dividing H = 4"),
    "sdpa-gqa-off": (
        sdpa(q(), k(), v()),
        ValueError,
        r"key: expected leading dimensions .*enable_gqa=True.*got \[2, 2\]",
    ),
    "sdpa-gqa-not-dividing": (
        sdpa(q(), q(B, 3, TK, D), q(B, 3, TK, D), enable_gqa=True),
        ValueError,
        r"key: expected .*H_kv dividing H = 4",
    ),
    "sdpa-gqa-value": (
        sdpa(q(), q(B, 2, TK, D), q(B, 3, TK, D), enable_gqa=True),
        ValueError,
        r"value: expected .*H_kv dividing H = 4",
    ),
    "batch": (
        attention(q(), k(3, HKV, TK, D)),
        ValueError,
        r"key: expected batch dimensions .*broadcastable to \[2\], got \[3\]",
    ),
    "value-batch": (
        attention(q(3, 2, H, TQ, D), k(), v(4, 2, HKV, TK, DV)),
        ValueError,
        r"value: expected batch dimensions .*\[3, 2\], got \[4, 2\]",
    ),
    "sdpa-batch": (sdpa(q(), q(3, H, TK, D), q(3, H, TK, D)), ValueError, r"key: expected leading dimensions"),
    # masks and biases
    "mask-list": (attention(mask=[[True]]), TypeError, r"mask: expected a torch\.Tensor, got list"),
    "mask-integer": (
        attention(mask=torch.ones(TQ, TK, dtype=torch.int64)),
        TypeError,
        r"mask: expected dtype bool, float32, got int64",
    ),
    "mask-uint8": (
        attention(mask=torch.ones(TQ, TK, dtype=torch.uint8)),
        TypeError,
        r"mask: expected dtype bool.*got uint8",
    ),
    "sdpa-mask-integer": (
        sdpa(attn_mask=torch.ones(TQ, TK, dtype=torch.int32)),
        TypeError,
        r"attn_mask: expected dtype bool.*got int32",
    ),
    "mask-float64": (attention(mask=q(TQ, TK, dtype=torch.float64)), TypeError, r"mask: expected dtype .*got float64"),
    "mask-shape": (
        attention(mask=torch.ones(TK, TQ, dtype=torch.bool)),
        ValueError,
        r"mask: expected a shape broadcastable to \[\.\.\., H, T_q, T_k\] = \[2, 4, 5, 6\], got \[6, 5\]",
    ),
    "mask-rank": (
        attention(mask=torch.ones(1, 1, 1, TQ, TK, dtype=torch.bool)),
        ValueError,
        r"mask: .*got \[1, 1, 1, 5, 6\]",
    ),
    "mask-2d-rank": (
        attention(q(TQ, D), k(TK, D), v(TK, DV), mask=torch.ones(1, TQ, TK, dtype=torch.bool)),
        ValueError,
        r"mask: expected a shape broadcastable to \[T_q, T_k\] = \[5, 6\]",
    ),
    "sdpa-mask-shape": (
        sdpa(attn_mask=q(3, 1, TQ, TK)),
        ValueError,
        r"attn_mask: .*\[2, 4, 5, 6\], got \[3, 1, 5, 6\]",
    ),
    "mask-sparse": (attention(mask=q(TQ, TK).to_sparse()), TypeError, r"mask: expected a dense"),
    "bias-bool": (
        attention(bias=torch.ones(TQ, TK, dtype=torch.bool)),
        TypeError,
        r"bias: expected dtype float32, got bool",
    ),
    "bias-shape": (attention(bias=q(3, TQ, TK)), ValueError, r"bias: .*\[2, 4, 5, 6\], got \[3, 5, 6\]"),
    "bias-number": (attention(bias=1.0), TypeError, r"bias: expected a torch\.Tensor, got float"),
    # lengths
    "key-lengths-list": (attention(key_lengths=[1, 2]), TypeError, r"key_lengths: expected a torch\.Tensor, got list"),
    "key-lengths-float": (
        attention(key_lengths=LENGTHS.float()),
        TypeError,
        r"key_lengths: expected an integer tensor",
    ),
    "query-lengths-bool": (
        attention(query_lengths=LENGTHS.bool()),
        TypeError,
        r"query_lengths: expected an integer tensor",
    ),
    "key-lengths-shape": (
        attention(key_lengths=torch.tensor([1, 2, 3])),
        ValueError,
        r"key_lengths: .*batch dimensions \[\.\.\.\] = \[2\], got \[3\]",
    ),
    "query-lengths-rank": (
        attention(query_lengths=LENGTHS[None]),
        ValueError,
        r"query_lengths: .*= \[2\], got \[1, 2\]",
    ),
    "key-lengths-large": (
        attention(key_lengths=torch.tensor([7, 2])),
        ValueError,
        r"key_lengths: .*T_k = 6.*got 7 at index 0",
    ),
    "key-lengths-negative": (
        attention(key_lengths=torch.tensor([2, -1])),
        ValueError,
        r"key_lengths: .*got -1 at index 1",
    ),
    "query-lengths-large": (
        attention(query_lengths=torch.tensor([1, 6])),
        ValueError,
        r"query_lengths: .*T_q = 5.*got 6 at index 1",
    ),
    "key-lengths-huge": (
        attention(key_lengths=torch.tensor([2**62, 1])),
        ValueError,
        r"key_lengths: .*got 4611686018427387904",
    ),
    # per-head parameters
    "alibi-shape": (attention(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes: .*= \[2, 4\], got \[3\]"),
    "alibi-0d": (attention(alibi_slopes=torch.tensor(1.0)), ValueError, r"alibi_slopes: expected \[H\]"),
    "alibi-integer": (
        attention(alibi_slopes=torch.ones(H).long()),
        TypeError,
        r"alibi_slopes: expected dtype .*got int64",
    ),
    "alibi-grad": (
        attention(alibi_slopes=torch.ones(H).requires_grad_()),
        ValueError,
        r"alibi_slopes: has no gradient",
    ),
    "sink-shape": (attention(sink=torch.ones(HKV)), ValueError, r"sink: expected \[H\] = \[4\], got \[2\]"),
    "sink-rank": (attention(sink=torch.ones(1, H)), ValueError, r"sink: expected \[H\] = \[4\], got \[1, 4\]"),
    "sink-integer": (attention(sink=torch.ones(H).int()), TypeError, r"sink: expected dtype .*got int32"),
    "sink-number": (attention(sink=0.0), TypeError, r"sink: expected a torch\.Tensor, got float"),
    # numbers and names
    "scale-nan": (attention(scale=NAN), ValueError, r"scale: expected a finite number, got nan"),
    "scale-inf": (sdpa(scale=INF), ValueError, r"scale: expected a finite number, got inf"),
    "scale-tensor": (sdpa(scale=torch.tensor(1.0)), TypeError, r"scale: expected a finite number, got Tensor"),
    "scale-text": (attention(scale="1"), TypeError, r"scale: expected a finite number, got str"),
    "softcap-negative": (attention(softcap=-1.0), ValueError, r"softcap: expected a finite number >= 0"),
    "softcap-nan": (attention(softcap=NAN), ValueError, r"softcap: expected a finite number >= 0"),
    "softcap-none": (attention(softcap=None), TypeError, r"softcap: expected a finite number >= 0.*got NoneType"),
    "dropout-negative": (
        attention(dropout_p=-0.1),
        ValueError,
        r"dropout_p: expected a probability in \[0, 1\], got -0\.1",
    ),
    "dropout-large": (sdpa(dropout_p=1.5), ValueError, r"dropout_p: expected a probability in \[0, 1\], got 1\.5"),
    "dropout-nan": (sdpa(dropout_p=NAN), ValueError, r"dropout_p: expected a probability"),
    "dropout-bool": (attention(dropout_p=True), TypeError, r"dropout_p: expected a probability .*got bool"),
    "window-int": (attention(window=3), TypeError, r"window: expected a pair \(left, right\)"),
    "window-three": (attention(window=(1, 2, 3)), TypeError, r"window: expected a pair"),
    "window-negative": (attention(window=(-2, 0)), ValueError, r"window: expected left >= -1"),
    "window-right": (attention(window=(0, -5)), ValueError, r"window: expected right >= -1"),
    "window-float": (attention(window=(1.5, 0)), TypeError, r"window: expected an integer left"),
    "window-huge": (attention(window=(0, 2**63)), ValueError, r"window: expected right .*below 2\^63"),
    "causal-true": (
        attention(causal=True),
        TypeError,
        r"causal: expected None, 'top_left' or 'bottom_right', got True",
    ),
    "causal-name": (attention(causal="left"), ValueError, r"causal: expected None, 'top_left' or 'bottom_right'"),
    "is-causal-text": (sdpa(is_causal="yes"), TypeError, r"is_causal: expected True or False, got 'yes'"),
    "enable-gqa-int": (sdpa(q(), k(), v(), enable_gqa=1), TypeError, r"enable_gqa: expected True or False, got 1"),
    "score-name": (
        attention(score="additive"),
        ValueError,
        r"score: expected one of 'dot', 'scaled_dot', 'cosine', 'l2'",
    ),
    "score-none": (attention(score=None), TypeError, r"score: expected one of"),
    "normalizer-name": (attention(normalizer="relu"), ValueError, r"normalizer: expected one of 'softmax'"),
    "normalizer-type": (attention(normalizer=None), TypeError, r"normalizer: expected one of 'softmax'.*got None"),
    "varlen-normalizer-name": (varlen(normalizer="relu"), ValueError, r"normalizer: expected one of 'softmax'"),
    "prior-list": (attention(prior=[1.0]), TypeError, r"prior: expected a tensor or \(\"gaussian\", center, sigma\)"),
    "prior-name": (attention(prior=("box", q(TQ), 1.0)), TypeError, r"prior: expected .*got \('box',\)"),
    "prior-dtype": (attention(prior=q(TQ, TK, dtype=torch.float64)), TypeError, r"prior: expected dtype float32"),
    "prior-shape": (
        attention(prior=q(TQ, 4)),
        ValueError,
        r"prior: .*\[\.\.\., H, T_q, T_k\] = \[2, 4, 5, 6\], got \[5, 4\]",
    ),
    "prior-center-shape": (
        attention(prior=("gaussian", q(H, TK), 1.0)),
        ValueError,
        r"prior's center: .*\[\.\.\., H, T_q\] = \[2, 4, 5\], got \[4, 6\]",
    ),
    "prior-center-type": (attention(prior=("gaussian", 3.0, 1.0)), TypeError, r"prior's center: .*got float"),
    "prior-sigma": (attention(prior=("gaussian", q(TQ), 0.0)), ValueError, r"prior's sigma: .*> 0, got 0"),
    "prior-sigma-type": (attention(prior=("gaussian", q(TQ), q(1))), TypeError, r"prior's sigma: .*got Tensor"),
    "normalizer-lengths": (
        attention(normalizer="sparsemax", key_lengths=torch.tensor([7, 2])),
        ValueError,
        r"key_lengths: .*T_k = 6.*got 7 at index 0",
    ),
    "normalizer-query-lengths": (
        attention(normalizer="none", query_lengths=torch.tensor([1, -6])),
        ValueError,
        r"query_lengths: .*T_q = 5.*got -6 at index 1",
    ),
    "normalizer-offsets-first": (varlen(normalizer="hard", cu_q=(1, 2, 5)), ValueError, r"cu_seqlens_q: .*be 0, got 1"),
    "normalizer-offsets-order": (
        varlen(normalizer="hard", cu_q=(0, 7, 5)),
        ValueError,
        r"cu_seqlens_q: .*nondecreasing values, got 5 after 7",
    ),
    "normalizer-offsets-last": (
        varlen(normalizer="hard", cu_k=(0, 2, 5)),
        ValueError,
        r"cu_seqlens_k: .*total_k = 6, got 5",
    ),
    "return-lse-text": (attention(return_lse="yes"), TypeError, r"return_lse: expected True or False"),
    "return-weights-name": (
        attention(return_weights="max"),
        ValueError,
        r"return_weights: expected False, True, 'full'",
    ),
    "return-weights-int": (attention(return_weights=1), TypeError, r"return_weights: expected False, True"),
    "unknown-keyword": (attention(attn_mask=None), TypeError, r"attn_mask"),
    # packed sequences
    "varlen-rank": (
        varlen(q(), k(), v()),
        ValueError,
        r"query: expected 3 dimensions \[total_q, H, D\], got \[2, 4, 5, 8\]",
    ),
    "varlen-value-rank": (
        varlen(q(5, H, D), k(6, HKV, D), v(6, DV)),
        ValueError,
        r"value: expected 3 dimensions \[total_k",
    ),
    "varlen-head-size": (varlen(q(5, H, D), k(6, HKV, 7), v(6, HKV, DV)), ValueError, r"key: expected .*D = 8"),
    "varlen-tokens": (varlen(q(5, H, D), k(6, HKV, D), v(7, HKV, DV)), ValueError, r"value: expected .*total_k = 6"),
    "varlen-heads": (varlen(q(5, H, D), k(6, 3, D), v(6, 3, DV)), ValueError, r"key: expected .*H_kv dividing H = 4"),
    "varlen-cu-list": (varlen(cu_q=[0, 5]), TypeError, r"cu_seqlens_q: expected a torch\.Tensor, got list"),
    "varlen-cu-float": (varlen(cu_k=torch.tensor([0.0, 6.0])), TypeError, r"cu_seqlens_k: expected an integer tensor"),
    "varlen-cu-int16": (
        varlen(cu_k=torch.tensor([0, 6], dtype=torch.int16)),
        TypeError,
        r"cu_seqlens_k: .*int32, int64",
    ),
    "varlen-cu-rank": (
        varlen(cu_q=torch.tensor([[0, 5]])),
        ValueError,
        r"cu_seqlens_q: expected 1 dimension \[N \+ 1\]",
    ),
    "varlen-cu-empty": (
        varlen(cu_q=torch.tensor([], dtype=torch.int64)),
        ValueError,
        r"cu_seqlens_q: expected 1 dimension",
    ),
    "varlen-cu-count": (varlen(cu_k=(0, 6)), ValueError, r"cu_seqlens_k: expected \[N \+ 1\] = \[3\].*got \[2\]"),
    "varlen-cu-start": (varlen(cu_q=(1, 2, 5)), ValueError, r"cu_seqlens_q: .*first value to be 0, got 1"),
    "varlen-cu-decreasing": (varlen(cu_k=(0, 7, 6)), ValueError, r"cu_seqlens_k: .*nondecreasing.*got 6 after 7"),
    "varlen-cu-negative": (varlen(cu_q=(0, -3, 5)), ValueError, r"cu_seqlens_q: .*nondecreasing.*got -3"),
    "varlen-cu-end": (varlen(cu_q=(0, 2, 4)), ValueError, r"cu_seqlens_q: .*last value to be T_q = 5, got 4"),
    "varlen-cu-beyond": (varlen(cu_k=(0, 2, 60)), ValueError, r"cu_seqlens_k: .*last value to be T_k = 6, got 60"),
    "varlen-max-float": (varlen(longest=(5.5, 6)), TypeError, r"max_seqlen_q: expected an integer >= 0, got float"),
    "varlen-max-negative": (varlen(longest=(5, -1)), ValueError, r"max_seqlen_k: expected an integer >= 0, got -1"),
    "varlen-alibi": (
        varlen(alibi_slopes=torch.ones(3, H)),
        ValueError,
        r"alibi_slopes: .*\[N, H\] = \[2, 4\], got \[3, 4\]",
    ),
    "varlen-mask": (varlen(mask=torch.ones(6, 5).bool()), ValueError, r"mask: .*\[H, total_q, total_k\] = \[4, 5, 6\]"),
    "varlen-lengths": (varlen(key_lengths=LENGTHS), TypeError, r"key_lengths"),
}


def test_the_table_is_long_enough() -> None:
    assert len(WRONG) >= 60


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:.*quantiz:", "ignore:.*Sparse")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name: str) -> None:
    call, exception, pattern = WRONG[name]
    with pytest.raises(exception, match=pattern) as caught:
        call()
    assert type(caught.value) is exception
    assert "\n" not in str(caught.value)


def test_a_wrong_call_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="mask"):
        attention(dropout_p=0.5, mask=q(9, 9))()
    assert torch.equal(torch.get_rng_state(), state)


def test_unsupported_device_in_a_default_device_context() -> None:
    """What is made under torch.device("meta") cannot be run, and says so."""
    with torch.device("meta"):
        tensors = [torch.zeros(1, 2, 3, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=r"query: .*meta"):
        attnfast.scaled_dot_product_attention(*tensors)


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_refuses_what_the_call_refuses() -> None:
    with pytest.raises(ValueError, match="softcap"):
        attnfast.explain(attnfast.attention, q(), k(), v(), softcap=-1.0)
    with pytest.raises(TypeError, match="fn: expected"):
        attnfast.explain(torch.relu, q())


@pytest.mark.parametrize(
    ("heads", "head_size", "softcap", "kernel"),
    [
        (4, 64, 0.0, "kernel: decode kernel"),
        (4, 64, 2.0, "not the decode kernel: softcap is on"),
        (2, 64, 0.0, "not the decode kernel: query heads share key heads"),
        (4, 3, 0.0, "kernel: decode kernel"),
        (4, 0, 0.0, "not the decode kernel: D is 0"),
    ],
)
def test_explain_names_the_kernel(heads: int, head_size: int, softcap: float, kernel: str) -> None:
    query, key = q(1, 4, 1, head_size), k(1, heads, 9, head_size)
    text = attnfast.explain(attnfast.attention, query, key, key, softcap=softcap)
    assert kernel in text
    assert f"ISA {attnfast.get_isa()}" in text
    assert "route: kernel" in text


def test_explain_names_the_route() -> None:
    query = q(1, 2, 5, 4)
    leaf = query.clone().requires_grad_()
    assert "route: function" in attnfast.explain(attnfast.scaled_dot_product_attention, leaf, query, query)
    texts: list[str] = []

    def call(x: Tensor) -> Tensor:
        texts.append(attnfast.explain(attnfast.attention, x, query, query))
        return x

    torch.vmap(call)(torch.stack([query, query]))
    torch.func.jvp(call, (query,), (query,))
    assert "route: operator" in texts[0]
    assert "route: reference" in texts[1]
    state = torch.get_rng_state()
    text = attnfast.explain(attnfast.attention, query, query, query, dropout_p=0.5, return_weights="row_max")
    assert "second pass: writes the weights' row maxima" in text
    assert torch.equal(state, torch.get_rng_state())


# --- the binary itself ----------------------------------------------------------------------------------------------

FORWARD = [
    "query", "key", "value", "out", "lse", "weights", "weights_index", "weights_mode", "mask", "bias", "bias2",
    "query_lengths", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sink", "prior_center", "seed",
    "window_bounds", "scale", "softcap", "dropout_p", "prior_sigma", "causal", "window_left", "window_right",
]  # fmt: skip
BACKWARD = [
    "grad_out", "query", "key", "value", "out", "lse", "delta", "grad_weights", "weights_index", "weights_mode",
    "delta_shift", "grad_query", "grad_key", "grad_value", "grad_bias", "grad_bias2", "grad_sink", "grad_center",
    "mask", "bias", "bias2", "query_lengths", "key_lengths", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sink",
    "prior_center", "seed", "window_bounds", "scale", "softcap", "dropout_p", "prior_sigma", "causal", "window_left",
    "window_right", "threads",
]  # fmt: skip


def arguments(names: list[str], packed: bool = False) -> dict[str, Any]:
    """A right call of the binary; packed input has B = 1."""
    b = 1 if packed else B
    given: dict[str, Any] = dict.fromkeys(names)
    rows = (b, H, TQ)
    given.update(query=q(b, H, TQ, D), key=k(b, HKV, TK, D), value=v(b, HKV, TK, DV), out=q(b, H, TQ, DV))
    given.update(lse=q(*rows), weights_mode=0, scale=1.0, softcap=0.0, dropout_p=0.0, prior_sigma=0.0)
    given.update(causal=0, window_left=-1, window_right=-1)
    if packed:
        given.update(cu_seqlens_q=torch.tensor([0, 2, TQ]), cu_seqlens_k=torch.tensor([0, 6, TK]))
    if "threads" in names:
        given.update(grad_out=q(b, H, TQ, DV), delta=q(*rows), threads=1)
        given.update(grad_query=q(b, H, TQ, D), grad_key=k(b, HKV, TK, D), grad_value=v(b, HKV, TK, DV))
    return {name: given[name] for name in names}


FULL_BOOL = torch.ones(B, H, TQ, TK, dtype=torch.bool)
INT = torch.int64

# id: (changed arguments, exception, pattern); run through forward, and through backward where it takes them.
MISUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "query-none": ({"query": None}, TypeError, "query"),
    "query-number": ({"query": 3}, TypeError, "query"),
    "query-3d": ({"query": q(H, TQ, D)}, ValueError, "query"),
    "query-int": ({"query": q(dtype=INT)}, TypeError, "query"),
    "query-complex": ({"query": q(dtype=torch.complex64)}, TypeError, "query"),
    "query-sparse": ({"query": q().to_sparse()}, TypeError, "query"),
    "query-meta": ({"query": q(device="meta")}, TypeError, "query"),
    "key-none": ({"key": None}, TypeError, "key"),
    "key-dtype": ({"key": k(dtype=torch.float64)}, TypeError, "key"),
    "key-batch": ({"key": k(1, HKV, TK, D)}, ValueError, "key"),
    "key-head-size": ({"key": k(B, HKV, TK, 9)}, ValueError, "key"),
    "key-heads": ({"key": k(B, 3, TK, D), "value": v(B, 3, TK, DV)}, ValueError, "H_kv dividing H"),
    "key-no-heads": ({"key": k(B, 0, TK, D), "value": v(B, 0, TK, DV)}, ValueError, "H_kv dividing H"),
    "value-tokens": ({"value": v(B, HKV, 5, DV)}, ValueError, "value"),
    "out-none": ({"out": None}, (TypeError, ValueError), "out: expected"),
    "out-shape": ({"out": q(B, H, TQ, DV + 1)}, ValueError, "out"),
    "out-dtype": ({"out": q(B, H, TQ, DV, dtype=torch.float64)}, TypeError, "out"),
    "lse-shape": ({"lse": q(B, H, TK)}, ValueError, "lse"),
    "lse-dtype": ({"lse": q(B, H, TQ, dtype=torch.float64)}, TypeError, "lse"),
    "lse-strided": ({"lse": q(TQ, H, B).permute(2, 1, 0)}, ValueError, "lse: expected a contiguous"),
    "mode-range": ({"weights_mode": 4}, ValueError, "weights_mode"),
    "mode-negative": ({"weights_mode": -1}, ValueError, "weights_mode"),
    "mode-none": ({"weights_mode": None}, TypeError, "weights_mode"),
    "weights-missing": ({"weights_mode": 1}, ValueError, "weights"),
    "mask-dtype": ({"mask": FULL_BOOL.to(torch.uint8)}, TypeError, "mask"),
    "mask-not-expanded": ({"mask": FULL_BOOL[:1]}, ValueError, "mask"),
    "bias-dtype": ({"bias": FULL_BOOL}, TypeError, "bias"),
    "bias-shape": ({"bias": q(TQ, TK)}, ValueError, "bias"),
    "bias2-shape": ({"bias": q(B, H, TQ, TK), "bias2": q(B, H, TK, TQ)}, ValueError, "bias2"),
    "query-lengths-dtype": ({"query_lengths": LENGTHS.int()}, TypeError, "query_lengths"),
    "query-lengths-count": ({"query_lengths": LENGTHS[:1]}, ValueError, "query_lengths"),
    "query-lengths-large": ({"query_lengths": torch.tensor([1, TQ + 1])}, ValueError, "query_lengths"),
    "key-lengths-negative": ({"key_lengths": torch.tensor([-1, 1])}, ValueError, "key_lengths"),
    "key-lengths-huge": ({"key_lengths": torch.tensor([2**63 - 1, 1])}, ValueError, "key_lengths"),
    "key-lengths-strided": ({"key_lengths": torch.tensor([1, 9, 1, 9])[::2]}, ValueError, "key_lengths"),
    "cu-alone": ({"cu_seqlens_q": torch.tensor([0, TQ])}, ValueError, "cu_seqlens_k"),
    "cu-batch": ({"cu_seqlens_q": torch.tensor([0, TQ]), "cu_seqlens_k": torch.tensor([0, TK])}, ValueError, "B = 1"),
    "alibi-shape": ({"alibi_slopes": q(H)}, ValueError, "alibi_slopes"),
    "alibi-dtype": ({"alibi_slopes": q(B, H, dtype=torch.float64)}, TypeError, "alibi_slopes"),
    "sink-shape": ({"sink": q(HKV)}, ValueError, "sink"),
    "sink-dtype": ({"sink": q(H, dtype=torch.bfloat16)}, TypeError, "sink"),
    "seed-missing": ({"dropout_p": 0.5}, ValueError, "seed"),
    "seed-shape": ({"seed": torch.tensor([1, 2, 3])}, ValueError, "seed"),
    "seed-dtype": ({"seed": torch.tensor([1.0, 2.0])}, TypeError, "seed"),
    "scale-none": ({"scale": None}, TypeError, "scale"),
    "softcap-negative": ({"softcap": -1.0}, ValueError, "softcap"),
    "softcap-nan": ({"softcap": NAN}, ValueError, "softcap"),
    "bounds-dtype": ({"window_bounds": torch.zeros(B, H, TQ, 2)}, TypeError, "window_bounds"),
    "bounds-shape": ({"window_bounds": torch.zeros(B, H, TQ, 3, dtype=INT)}, ValueError, "window_bounds"),
    "bounds-not-expanded": ({"window_bounds": torch.zeros(1, 1, TQ, 2, dtype=INT)}, ValueError, "window_bounds"),
    "bounds-strided": (
        {"window_bounds": torch.zeros(B, H, 2, TQ, dtype=INT).transpose(2, 3)},
        ValueError,
        "window_bounds",
    ),
    "sigma-alone": ({"prior_sigma": 1.0}, ValueError, "prior_center"),
    "sigma-negative": ({"prior_sigma": -1.0, "prior_center": q(B, H, TQ)}, ValueError, "prior_sigma"),
    "sigma-nan": ({"prior_sigma": NAN, "prior_center": q(B, H, TQ)}, ValueError, "prior_sigma"),
    "center-alone": ({"prior_center": q(B, H, TQ)}, ValueError, "prior_center"),
    "center-shape": ({"prior_sigma": 1.0, "prior_center": q(B, H, TK)}, ValueError, "prior_center"),
    "center-dtype": ({"prior_sigma": 1.0, "prior_center": q(B, H, TQ).double()}, TypeError, "prior_center"),
    "center-strided": (
        {"prior_sigma": 1.0, "prior_center": q(TQ, H, B).permute(2, 1, 0)},
        ValueError,
        "prior_center: expected a cont",
    ),
    "dropout-range": ({"dropout_p": 1.5, "seed": torch.tensor([1, 2])}, ValueError, "dropout_p"),
    "causal-range": ({"causal": 3}, ValueError, "causal"),
    "causal-text": ({"causal": "top_left"}, TypeError, "causal"),
    "window-range": ({"window_left": -2}, ValueError, "window_left"),
    "window-overflow": ({"window_right": 2**70}, (ValueError, OverflowError, TypeError), "window_right|int|large"),
}
PACKED_MISUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "start": ({"cu_seqlens_q": torch.tensor([1, 2, TQ])}, ValueError, "cu_seqlens_q"),
    "decreasing": ({"cu_seqlens_k": torch.tensor([0, 9, TK])}, ValueError, "cu_seqlens_k"),
    "end": ({"cu_seqlens_k": torch.tensor([0, 2, TK + 1])}, ValueError, "cu_seqlens_k"),
    "negative": ({"cu_seqlens_q": torch.tensor([0, -(2**62), TQ])}, ValueError, "cu_seqlens_q"),
    "empty": ({"cu_seqlens_q": torch.zeros(0, dtype=INT)}, ValueError, "cu_seqlens_q"),
    "dtype": ({"cu_seqlens_q": torch.tensor([0, 2, TQ], dtype=torch.int32)}, TypeError, "cu_seqlens_q"),
    "count": ({"cu_seqlens_k": torch.tensor([0, TK])}, ValueError, "cu_seqlens_k"),
    "none": ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_k"),
    "lengths": ({"key_lengths": torch.tensor([1, 2])}, ValueError, "key_lengths"),
    "alibi": ({"alibi_slopes": q(1, H)}, ValueError, "alibi_slopes"),
}
BACKWARD_MISUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "grad-out-none": ({"grad_out": None}, TypeError, "grad_out"),
    "grad-out-shape": ({"grad_out": q(B, H, TQ, DV + 1)}, ValueError, "grad_out"),
    "delta-shape": ({"delta": q(B, H, TK)}, ValueError, "delta"),
    "delta-shift-dtype": ({"delta_shift": q(B, H, TQ, dtype=torch.float64)}, TypeError, "delta_shift"),
    "grad-query-shape": ({"grad_query": q(B, H, TQ, D + 1)}, ValueError, "grad_query"),
    "grad-query-expanded": ({"grad_query": q(1, H, TQ, D).expand(B, H, TQ, D)}, ValueError, "grad_query"),
    "grad-key-heads": ({"grad_key": k(B, H, TK, D)}, ValueError, "grad_key"),
    "grad-value-dtype": ({"grad_value": v(dtype=torch.float64)}, TypeError, "grad_value"),
    "grad-bias-alone": ({"grad_bias": q(B, H, TQ, TK)}, ValueError, "grad_bias"),
    "grad-bias-dtype": ({"bias": q(B, H, TQ, TK), "grad_bias": q(B, H, TQ, TK).double()}, TypeError, "grad_bias"),
    "grad-sink-alone": ({"grad_sink": q(H)}, ValueError, "grad_sink"),
    "grad-center-alone": ({"grad_center": q(B, H, TQ)}, ValueError, "grad_center"),
    "grad-center-shape": (
        {"prior_sigma": 1.0, "prior_center": q(B, H, TQ), "grad_center": q(B, H, TK)},
        ValueError,
        "grad_center",
    ),
    "neither-but-prior": (
        {"out": None, "lse": None, "prior_sigma": 1.0, "prior_center": q(B, H, TQ)},
        ValueError,
        "lse: expected a tensor",
    ),
    "lse-none": ({"lse": None}, ValueError, "lse: expected both out and lse or neither"),
    "neither-but-sink": ({"out": None, "lse": None, "sink": q(H)}, ValueError, "lse: expected a tensor"),
    "neither-but-softcap": ({"out": None, "lse": None, "softcap": 1.0}, ValueError, "lse: expected a tensor"),
    "neither-but-shift": ({"out": None, "lse": None, "delta_shift": q(B, H, TQ)}, ValueError, "lse: expected a tensor"),
    "neither-but-bias-gradient": (
        {"out": None, "lse": None, "bias": q(B, H, TQ, TK), "grad_bias": q(B, H, TQ, TK)},
        ValueError,
        "lse: expected a tensor",
    ),
    "neither-but-many-keys": (
        {
            "out": None,
            "lse": None,
            "key": k(B, HKV, 65, D),
            "value": v(B, HKV, 65, DV),
            "grad_key": None,
            "grad_value": None,
        },
        ValueError,
        "only calls with at most 64 keys",
    ),
    "grad-weights-missing": ({"weights_mode": 1}, ValueError, "grad_weights"),
    "index-missing": ({"weights_mode": 3, "grad_weights": q(B, H, TQ)}, ValueError, "weights_index"),
    "index-dtype": (
        {"weights_mode": 3, "grad_weights": q(B, H, TQ), "weights_index": q(B, H, TQ)},
        TypeError,
        "weights_index",
    ),
    "threads-zero": ({"threads": 0}, ValueError, "threads"),
}


def test_the_right_calls_are_right() -> None:
    for packed in (False, True):
        _C.dot_attention_fwd(*arguments(FORWARD, packed).values())
        _C.dot_attention_bwd(*arguments(BACKWARD, packed).values())


@pytest.mark.parametrize("names", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("name", MISUSED)
def test_misuse_of_the_binary(name: str, names: list[str]) -> None:
    changes, exception, pattern = MISUSED[name]
    function = _C.dot_attention_fwd if names is FORWARD else _C.dot_attention_bwd
    with pytest.raises(exception, match=pattern):
        function(*{**arguments(names), **changes}.values())


@pytest.mark.parametrize("names", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PACKED_MISUSED)
def test_misuse_of_packed_input(name: str, names: list[str]) -> None:
    changes, exception, pattern = PACKED_MISUSED[name]
    function = _C.dot_attention_fwd if names is FORWARD else _C.dot_attention_bwd
    with pytest.raises(exception, match=pattern):
        function(*{**arguments(names, packed=True), **changes}.values())


@pytest.mark.parametrize("name", BACKWARD_MISUSED)
def test_misuse_of_the_backward(name: str) -> None:
    changes, exception, pattern = BACKWARD_MISUSED[name]
    with pytest.raises(exception, match=pattern):
        _C.dot_attention_bwd(*{**arguments(BACKWARD), **changes}.values())


def test_row_maximum_index_out_of_range_is_harmless() -> None:
    """An index is data of an earlier forward; a wrong one must not write out of bounds."""
    for index in (-5, TK, 2**62, -(2**62)):
        given = arguments(BACKWARD)
        given.update(weights_mode=3, grad_weights=torch.ones(B, H, TQ), weights_index=torch.full((B, H, TQ), index))
        _C.dot_attention_bwd(*given.values())
        assert given["grad_key"].isfinite().all()


def test_bounds_of_any_value_are_harmless() -> None:
    """Bounds are cut to the keys of their sequence: nothing is read outside, whatever they hold."""
    largest = torch.iinfo(INT).max
    for packed in (False, True):
        b = 1 if packed else B
        for begin, end in (
            (-largest - 1, largest),
            (largest, -largest - 1),
            (TK + 5, TK + 9),
            (-9, -5),
            (3, 3),
            (5, 2),
        ):
            bounds = torch.tensor([begin, end]).expand(b, H, TQ, 2)
            given = {**arguments(FORWARD, packed), "window_bounds": bounds}
            _C.dot_attention_fwd(*given.values())
            seen = given["lse"] != -torch.inf
            without = arguments(FORWARD, packed)
            _C.dot_attention_fwd(*without.values())
            assert torch.equal(given["lse"], without["lse"]) if end == largest else not seen.any()
            back = {**arguments(BACKWARD, packed), "window_bounds": bounds, "lse": given["lse"], "out": given["out"]}
            _C.dot_attention_bwd(*back.values())
            assert back["grad_key"].isfinite().all()
            assert end == largest or not back["grad_key"].any()


@pytest.mark.parametrize("count", [0, 1, 26, 28])
def test_wrong_number_of_arguments(count: int) -> None:
    values = (*arguments(FORWARD).values(), None)
    with pytest.raises(TypeError, match=re.compile("dot_attention_fwd|argument")):
        _C.dot_attention_fwd(*values[:count])
