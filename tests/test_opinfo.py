"""torch's own OpInfo samples for scaled_dot_product_attention, forward and gradients, against torch itself."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from helpers import assert_close_to_truth, error
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

(OP,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
DTYPES = sorted(OP.supported_dtypes("cpu"), key=str)
SDPA = torch.nn.functional.scaled_dot_product_attention


def samples(dtype: torch.dtype, requires_grad: bool) -> list[Any]:
    torch.manual_seed(0)
    return list(OP.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def tensors_of(sample: Any) -> list[Tensor]:
    found = [sample.input, *sample.args, *sample.kwargs.values()]
    return [x for x in found if isinstance(x, Tensor)]


def widened(sample: Any) -> Any:
    return sample.transform(
        lambda x: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
    )


def call(function: Any, sample: Any, **overrides: Any) -> Tensor:
    return function(sample.input, *sample.args, **{**sample.kwargs, **overrides})


def test_samples_are_what_they_were() -> None:
    """Both the dtypes and the samples; a changed torch must be looked at, not silently tested less."""
    assert set(DTYPES) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    found = samples(torch.float32, False)
    assert len(found) == 25
    assert sum(s.kwargs["dropout_p"] > 0 for s in found) == 12
    assert {s.input.dim() for s in found} == {3, 4}
    assert sum(s.kwargs.get("attn_mask") is not None for s in found) == 1
    assert OP.error_inputs_func is None  # torch has none; test_errors.py has ours


def test_signature_is_torchs() -> None:
    import attnfast

    names = list(inspect.signature(attnfast.scaled_dot_product_attention).parameters.values())
    assert [p.name for p in names] == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    assert [p.default for p in names[3:]] == [None, 0.0, False, None, False]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo_values_and_gradients(backend: Any, dtype: torch.dtype) -> None:
    """Every sample; those with dropout are compared with dropout off here and tested with it below."""
    sdpa = backend.scaled_dot_product_attention
    for sample in samples(dtype, True):
        runs = []
        for function, s in ((sdpa, sample), (SDPA, widened(sample)), (SDPA, sample)):
            output = call(function, s, dropout_p=0.0)
            g = torch.Generator().manual_seed(1)
            probe = torch.randn(output.shape, generator=g, dtype=torch.float64).to(dtype).to(output.dtype)
            runs.append([output, *torch.autograd.grad(output, tensors_of(s), probe)])
        assert runs[0][0].dtype == dtype
        # The samples' scores reach hundreds. Half an ulp of the largest score is what no accumulation order can avoid
        # in the output; gradients meet three such roundings (score, products, lse). In float64 torch is the truth.
        score = (sample.input.double() @ sample.args[0].double().mT).abs().max().item() * sample.input.shape[-1] ** -0.5
        ulp = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (4 if dtype == torch.float64 else 1) * score
        flash = flash_gradients(widened(sample), probe.double(), runs[0][0])
        for i, (have, truth, plain) in enumerate(zip(*runs)):
            assert have.shape == plain.shape and have.dtype == plain.dtype
            if i:
                plain = max((plain, flash[i - 1].to(dtype)), key=lambda g, t=truth: error(g, t))
            slack = (2.0 if i else 0.5) * ulp
            assert_close_to_truth(have, truth, plain, f"{sample.summary()}: result {i}", slack=slack)


def flash_gradients(sample: Any, probe: Tensor, rounded: Tensor) -> tuple[Tensor, ...]:
    """Exact gradients but for delta, formed from the output as it was rounded (see helpers.rounded_probes)."""
    query, key, value = sample.input, *sample.args
    s = query @ key.mT * query.shape[-1] ** -0.5
    if sample.kwargs.get("attn_mask") is not None:
        s = s + sample.kwargs["attn_mask"]
    if sample.kwargs["is_causal"]:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    output = torch.softmax(s, -1) @ value
    e = (probe * (rounded.detach().double() - output.detach())).sum(-1)
    return torch.autograd.grad((output * probe).sum() - (e * s.logsumexp(-1)).sum(), tensors_of(sample))


@pytest.mark.not_emulated  # thousands of copies of each sample; tests/test_simt.py has dropout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo_dropout_samples(backend: Any, dtype: torch.dtype) -> None:
    """torch draws other random numbers, so values differ; p = 1, the reproducible draw and the mean agree.

    The mean: the sample repeated over a new leading dimension, so that every copy draws its own mask.
    """
    sdpa = backend.scaled_dot_product_attention
    checked = 0
    for sample in samples(dtype, False):
        if sample.kwargs["dropout_p"] == 0:
            continue
        checked += 1
        torch.testing.assert_close(call(sdpa, sample, dropout_p=1.0), torch.zeros_like(call(SDPA, sample)))
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(call(sdpa, sample))
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        copies = 400
        many = sample.transform(lambda x: x.expand(400, *x.shape) if isinstance(x, Tensor) else x)
        if sample.input.dim() == 3 and sample.args[0].dim() == 4:  # its leading dimensions broadcast: align ranks first
            many.input = sample.input.expand(copies, 1, *sample.input.shape)
        have = call(sdpa, many).double()
        want = call(SDPA, widened(sample), dropout_p=0.0)
        spread = have.std(0).clamp_min(1e-6) / copies**0.5
        rounding = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-6
        assert ((have.mean(0) - want).abs() <= 6 * spread + rounding).all()
    assert checked == 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo_samples_with_other_strides(backend: Any, dtype: torch.dtype) -> None:
    """What OpInfo's own test_noncontiguous_samples does (and skips for float32): the same values from odd strides."""
    from torch.testing._internal.common_utils import noncontiguous_like

    for sample in itertools.islice(samples(dtype, True), None):
        odd = sample.transform(
            lambda x: noncontiguous_like(x.detach()).requires_grad_() if isinstance(x, Tensor) else x
        )
        have = call(backend.scaled_dot_product_attention, odd, dropout_p=0.0)
        want = call(backend.scaled_dot_product_attention, sample, dropout_p=0.0)
        torch.testing.assert_close(have, want)
        torch.testing.assert_close(
            torch.autograd.grad(have.sum(), tensors_of(odd)), torch.autograd.grad(want.sum(), tensors_of(sample))
        )
