"""attnfast.nn.MultiheadAttention against torch's: the samples of torch's own module tests, and what torch has not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

import attnfast
from attnfast.integrations import replace_modules
from attnfast.nn import MultiheadAttention
from attnfast.nn._multihead import keep_off_fast_path

KINDS = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoderLayer,
    nn.Transformer,
)


def without_dropout(model: nn.Module) -> nn.Module:
    """torch draws other random numbers; dropout has tests of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def samples(kind: type, dtype: torch.dtype, training: bool) -> Iterator[tuple[nn.Module, Any]]:
    (info,) = (info for info in module_db if info.module_cls is kind)
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
        made = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)
        yield without_dropout(made.to(dtype).train(training)), sample.forward_input


def tensors_of(values: Any) -> list[Tensor]:
    return [x for x in (values if isinstance(values, tuple) else (values,)) if isinstance(x, Tensor)]


def calls_of_attention(model: nn.Module) -> list[str]:
    """Names that fill up as attention modules of the model are called."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.filterwarnings("ignore")  # torch's own, about nested tensors and mixed masks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_torch_s_own_samples(kind: type, training: bool, dtype: torch.dtype) -> None:
    count = 0
    for model, given in samples(kind, dtype, training):
        ours = replace_modules(copy.deepcopy(model))
        calls = calls_of_attention(ours)
        with torch.set_grad_enabled(training):
            try:
                expected = model(*given.args, **given.kwargs)
            except Exception as error:
                with pytest.raises(type(error)):
                    ours(*given.args, **given.kwargs)
                continue
            got = ours(*given.args, **given.kwargs)
        assert calls, "the attention modules were gone round"
        torch.testing.assert_close(got, expected)
        count += 1
        if not training:
            continue
        results = tensors_of(got), tensors_of(expected)
        weights = [torch.randn_like(x) for x in results[0]]
        grads = []
        for model_, values in zip((ours, model), results, strict=True):
            inputs = [*model_.parameters(), *(x for x in given.args if isinstance(x, Tensor) and x.requires_grad)]
            grads.append(torch.autograd.grad(values, inputs, weights, allow_unused=True))
        for x, y in zip(*grads, strict=True):
            if y is None:
                assert x is None
            else:  # of the largest: torch's samples have scores of up to a hundred
                limit = (1e-4 if dtype == torch.float32 else 1e-11) * max(1.0, y.abs().max().item())
                torch.testing.assert_close(x, y, rtol=0, atol=limit)
    assert count >= 30


def both(batch_first: bool = True, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    torchs = nn.MultiheadAttention(12, 3, batch_first=batch_first, dtype=torch.float64, **options)
    ours = MultiheadAttention(12, 3, batch_first=batch_first, dtype=torch.float64, **options)
    for parameter in torchs.parameters():
        nn.init.normal_(parameter)  # torch's biases begin as zero
    assert ours.load_state_dict(torchs.state_dict()) == ([], [])
    return torchs, ours


def test_initial_values_and_names_are_torch_s() -> None:
    options: list[dict[str, Any]] = [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}, {"bias": False}]
    for each in options:
        torch.manual_seed(1)
        torchs = nn.MultiheadAttention(12, 3, **each)
        torch.manual_seed(1)
        ours = MultiheadAttention(12, 3, **each)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        for name, value in torchs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)


def test_biases_of_all_projections_are_added() -> None:
    """torch's samples leave them zero."""
    for options in ({}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}):
        torchs, ours = both(**options)
        x = torch.randn(2, 4, 12, dtype=torch.float64)
        key = torch.randn(2, 6, ours.kdim, dtype=torch.float64)
        value = torch.randn(2, 6, ours.vdim, dtype=torch.float64)
        torch.testing.assert_close(ours(x, key, value), torchs(x, key, value))
        if not options.get("kdim"):
            torch.testing.assert_close(ours(x, key, key), torchs(x, key, key))
            torch.testing.assert_close(ours(x, x, x), torchs(x, x, x))


MASKS = ("none", "bool", "float", "bool3", "float3")


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True},
                                   {"add_bias_kv": True, "add_zero_attn": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [False, True])
def test_masks_in_all_forms(mask: str, padding: str, weights: bool, extra: dict[str, Any]) -> None:
    torchs, ours = both(**extra)
    query, key = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)
    shape = (6, 4, 6) if mask.endswith("3") else (4, 6)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    attn_mask = None if mask == "none" else hidden if mask.startswith("bool") else torch.randn(shape).double()
    ignored = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    key_padding_mask = {"none": None, "bool": ignored, "float": torch.randn(2, 6).double()}[padding]
    if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        # torch warns of mixed types and will drop them: both as what is added
        expected_masks = [
            torch.zeros(x.shape, dtype=torch.float64).masked_fill(x, -math.inf) if x.dtype == torch.bool else x
            for x in (key_padding_mask, attn_mask)
        ]
    else:
        expected_masks = [key_padding_mask, attn_mask]  # type: ignore[list-item]
    expected = torchs(query, key, key, expected_masks[0], weights, expected_masks[1], False)
    got = ours(query, key, key, key_padding_mask, weights, attn_mask, False)
    torch.testing.assert_close(got, expected)
    assert (got[1] is None) == (not weights)


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
def test_causal_alone_and_as_a_hint(extra: dict[str, Any], padding: str) -> None:
    torchs, ours = both(**extra)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    ignored = torch.tensor([[False] * 5, [False, False, True, False, True]])
    added = torch.randn(2, 5, dtype=torch.float64)
    key_padding_mask = {"none": None, "bool": ignored, "float": added}[padding]
    as_float = torch.zeros(2, 5, dtype=torch.float64).masked_fill(ignored, -math.inf)
    for weights in (False, True):
        expected = torchs(x, x, x, as_float if padding == "bool" else key_padding_mask, weights, mask)
        for attn_mask in (None, mask):
            got = ours(x, x, x, key_padding_mask, weights, attn_mask, is_causal=True)
            torch.testing.assert_close(got, expected)


def test_a_row_that_sees_nothing_is_the_output_s_bias() -> None:
    _, ours = both()
    query = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    ignored = torch.tensor([[True] * 4, [False] * 4])
    for weights in (True, False):
        out, shares = ours(query, key, key, ignored, weights)
        torch.testing.assert_close(out[0], ours.out_proj.bias.expand(3, 12))
        assert out.isfinite().all()
        assert shares is None or torch.equal(shares[0], torch.zeros_like(shares[0]))
        grads = torch.autograd.grad(out.sum(), (query, key, ours.in_proj_weight))
        assert all(grad.isfinite().all() for grad in grads)
        assert torch.equal(grads[0][0], torch.zeros_like(grads[0][0]))


def test_unbatched_as_a_batch_of_one() -> None:
    for batch_first in (True, False):
        torchs, ours = both(batch_first)
        query, key = torch.randn(4, 12, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
        ignored, mask = torch.tensor([False] * 4 + [True] * 2), torch.rand(3, 4, 6) < 0.3
        mask[..., 0] = False
        for average in (True, False):
            got = ours(query, key, key, ignored, True, mask, average)
            torch.testing.assert_close(got, torchs(query, key, key, ignored, True, mask, average))


def test_dropout_only_in_training_and_reproducible() -> None:
    attention = MultiheadAttention(12, 3, dropout=0.5, batch_first=True)
    x = torch.randn(2, 40, 12)
    attention.eval()
    torch.testing.assert_close(attention(x, x, x)[1].sum(-1), torch.ones(2, 40))
    attention.train()
    torch.manual_seed(4)
    first, weights = attention(x, x, x, average_attn_weights=False)
    torch.manual_seed(4)
    again, _ = attention(x, x, x, average_attn_weights=False)
    assert torch.equal(first, again)
    assert 0.4 < (weights == 0).float().mean() < 0.6
    torch.testing.assert_close(weights.sum(-1).mean(), torch.tensor(1.0), rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*nested.*")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_nested_tensors(layout: torch.layout, causal: bool) -> None:
    _, ours = both()
    sequences = [torch.randn(n, 12, dtype=torch.float64) for n in (3, 5, 1)]
    others = [torch.randn(n, 12, dtype=torch.float64) for n in (2, 4, 6)]
    nested = torch.nested.nested_tensor(sequences, layout=layout)
    other = torch.nested.nested_tensor(others, layout=layout)
    with torch.no_grad():
        got, weights = ours(nested, nested, nested, need_weights=False, is_causal=causal)
        crossed, _ = ours(nested, other, other, need_weights=False, is_causal=causal)
        assert weights is None and got.is_nested and got.layout == layout
        assert (nested + got).is_nested
        empty = torch.nested.nested_tensor([], layout=torch.strided, dtype=torch.float64)
        assert ours(empty, empty, empty, need_weights=False)[0].size(0) == 0
        for result, keys in ((got, sequences), (crossed, others)):
            for x, y, row in zip(sequences, keys, result.unbind(), strict=True):
                torch.testing.assert_close(row, ours(x, y, y, need_weights=False, is_causal=causal)[0])
    with pytest.raises(ValueError, match="nested tensor goes without key_padding_mask"):
        ours(nested, nested, nested)
    with pytest.raises(ValueError, match="all nested, or none"):
        ours(nested, sequences[0], nested, need_weights=False)
    with pytest.raises(ValueError, match="as long as key's"):
        ours(nested, nested, other, need_weights=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    _, ours = both()
    x, mask = torch.randn(2, 9, 12), torch.randn(9, 9)
    expected = ours.float()(x, x, x, attn_mask=mask)[0]
    half = copy.deepcopy(ours).to(dtype)
    got = half(x.to(dtype), x.to(dtype), x.to(dtype), attn_mask=mask)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    with torch.autocast("cpu", dtype):
        got = ours(x, x, x, attn_mask=mask)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())


def test_gradients() -> None:
    ours = MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in ours.named_parameters()]

    def call(x: Tensor, key: Tensor, mask: Tensor, *parameters: Tensor) -> Any:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(ours, given, (x, key, key), {"attn_mask": mask})

    assert torch.autograd.gradcheck(call, (x, key, mask, *ours.parameters()))


def test_compiles_and_exports_whole() -> None:
    attention = MultiheadAttention(12, 3, batch_first=True).eval()
    x, ignored = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = attention(x, x, x, ignored)
    torch.testing.assert_close(torch.compile(attention, fullgraph=True)(x, x, x, ignored), expected)
    exported = torch.export.export(attention, (x, x, x, ignored)).module()
    torch.testing.assert_close(exported(x, x, x, ignored), expected)


def test_the_fast_path_of_encoder_layers_is_kept_off() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True).eval()
    layer.self_attn = MultiheadAttention(12, 2, batch_first=True).eval()
    calls = calls_of_attention(layer)
    layer.self_attn._forward_hooks.clear()  # the test's own hook would keep it off
    called = []
    original = attnfast.nn._multihead.functional.attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attnfast.nn._multihead.functional, "attention",
                      lambda *a, **k: (called.append(1), original(*a, **k))[1])  # fmt: skip
        layer(torch.randn(2, 4, 12))
    assert called and not calls
    assert keep_off_fast_path in layer.self_attn._forward_pre_hooks.values()


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "embed_dim": (lambda m, x: m(x[..., :5], x, x), ValueError, r"query: expected \[N, T_q, E\] .*E = 12, got"),
    "query dims": (lambda m, x: m(x[None], x, x), ValueError, r"query: expected .*got \[1, 2, 4, 12\]"),
    "key size": (lambda m, x: m(x, x[..., :5], x), ValueError, r"key: expected 3 dimensions, the last of size 12"),
    "key dims": (lambda m, x: m(x, x[0], x), ValueError, r"key: expected 3 dimensions"),
    "batch": (lambda m, x: m(x, x[:1], x[:1]), ValueError, r"key: expected a batch of 2 \(query's\), got 1"),
    "tokens": (lambda m, x: m(x, x, x[:, :2]), ValueError, r"value: expected \[2, 4\] tokens \(key's\), got \[2, 2\]"),
    "padding": (lambda m, x: m(x, x, x, torch.zeros(2, 3, dtype=torch.bool)), ValueError,
                r"key_padding_mask: expected \[N, T_k\] = \[2, 4\], got \[2, 3\]"),
    "padding type": (lambda m, x: m(x, x, x, torch.zeros(2, 4, dtype=torch.int64)), TypeError,
                     "key_padding_mask: expected a boolean or floating mask, got torch.int64"),
    "mask": (lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 4)), ValueError,
             r"attn_mask: expected \[T_q, T_k\] = \[4, 4\] or \[N H, T_q, T_k\] = \[6, 4, 4\], got \[3, 4\]"),
    "mask type": (lambda m, x: m(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.uint8)), TypeError,
                  "attn_mask: expected a boolean or floating mask"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 4, 12))
