"""The decode kernel: one query per head, inference. Calls that want lse take the tile kernel, so these ask for none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnfast
from attnfast import reference

KEYS = 2100  # long enough to be split over the keys
MODIFIERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"key_lengths": torch.tensor([2100, 3])},
    "empty": {"key_lengths": torch.tensor([0, 1])},
    "mask": {"mask": torch.rand(2, 1, 1, KEYS, generator=torch.Generator().manual_seed(1)) > 0.5},
    "nothing": {"mask": torch.zeros(1, KEYS, dtype=torch.bool)},
    "bias": {"bias": torch.randn(4, 1, KEYS, generator=torch.Generator().manual_seed(2))},
    "window": {"causal": "bottom_right", "window": (700, -1)},
    "alibi": {"causal": "bottom_right", "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.004])},
    "sink": {"sink": torch.tensor([0.0, 3.0, -2.0, 8.0])},
}


@pytest.mark.parametrize("name", MODIFIERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_equals_the_reference(isa: str, dtype: torch.dtype, name: str) -> None:
    check(dtype, name, 64, 64)


# Head sizes that leave a rest of every length after whole vectors of 4, 8 or 16; memory past the last row is NaN.
@pytest.mark.parametrize(("D", "D_v"), [(1, 1), (3, 7), (12, 20), (24, 8), (40, 33), (100, 72), (65, 130), (15, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_with_any_head_size(isa: str, dtype: torch.dtype, D: int, D_v: int) -> None:
    check(dtype, "bias", D, D_v)


def padded(x: torch.Tensor) -> torch.Tensor:
    """The same values with NaN behind each row."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def check(dtype: torch.dtype, name: str, D: int, D_v: int) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 1, D), (2, 4, KEYS, D), (2, 4, KEYS, D_v))
    query, key, value = (padded(torch.randn(shape, generator=g).to(dtype)) for shape in shapes)
    options = dict(MODIFIERS[name])
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for argument in ("bias", "alibi_slopes", "sink"):
        if argument in options:
            options[argument] = options[argument].to(dtype if argument == "bias" else real)
    assert "kernel: decode kernel" in attnfast.explain(attnfast.attention, query, key, value, **options)
    found = attnfast.attention(query, key, value, **options)
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}
    truth = reference.attention(query.double(), key.double(), value.double(), **wide)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)


def test_decode_selects_masked_keys_out(isa: str) -> None:
    query, key, value = (torch.randn(1, 2, tokens, 32) for tokens in (1, 600, 600))
    mask = torch.ones(1, 600, dtype=torch.bool)
    mask[:, 100:300] = False
    clean = attnfast.attention(query, key, value, mask=mask)
    key[:, :, 150], value[:, :, 200], value[:, :, 299] = torch.nan, torch.inf, torch.nan
    assert torch.equal(attnfast.attention(query, key, value, mask=mask), clean)
    value[:, :, 400] = torch.nan  # visible
    assert attnfast.attention(query, key, value, mask=mask).isnan().all()
