"""The table of docs/integrations.md: what FlexAttention is asked for, and the arguments that mean the same here.

FlexAttention has no backward on CPUs, so outputs are compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnfast

B, H, T_Q, T_K, D = 2, 4, 12, 17, 8
WINDOW, CAP = 3, 2.0
LENGTHS, PREFIX = torch.tensor([17, 9]), torch.tensor([2, 5])
DOCUMENTS = torch.tensor([0] * 5 + [1] * 4 + [2] * 8)
SLOPES = 2.0 ** -torch.arange(1.0, H + 1)
DISTANCES = torch.randn(H, T_Q + T_K - 1, generator=torch.Generator().manual_seed(4))
ROWS, COLUMNS = torch.arange(T_Q)[:, None], torch.arange(T_K)
Case = tuple[Callable[..., Any] | None, Callable[..., Any] | None, dict[str, Any]]


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def causal_window(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (q - k <= WINDOW)


def window(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k).abs() <= WINDOW


def prefix(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (k <= q) | (k < PREFIX[b])


def lengths(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k < LENGTHS[b]


def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return DOCUMENTS[q] == DOCUMENTS[k]


def capped(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return CAP * torch.tanh(score / CAP)


def alibi(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score - SLOPES[h] * (q - k).abs()


def biased(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score + DISTANCES[h, q - k + T_K - 1]


# score_mod, mask_mod, arguments of attnfast.attention.
CASES: dict[str, Case] = {
    "q_idx >= kv_idx": (None, causal, {"causal": "top_left"}),
    "q_idx - kv_idx <= w": (None, causal_window, {"causal": "top_left", "window": (WINDOW, -1)}),
    "(q_idx - kv_idx).abs() <= w": (None, window, {"window": (WINDOW, WINDOW)}),
    "prefix": (None, prefix, {"mask": (COLUMNS <= ROWS) | (PREFIX[:, None, None, None] > COLUMNS)}),
    "length[b]": (None, lengths, {"key_lengths": LENGTHS}),
    "document": (None, documents, {"mask": DOCUMENTS[ROWS] == DOCUMENTS[COLUMNS]}),
    "torch.tanh": (capped, None, {"softcap": CAP}),
    "slope[h]": (alibi, None, {"alibi_slopes": SLOPES}),
    "bias[h": (biased, None, {"bias": DISTANCES[:, ROWS - COLUMNS + T_K - 1]}),
    "enable_gqa": (None, None, {}),
    "return_lse": (capped, causal, {"softcap": CAP, "causal": "top_left", "return_lse": True}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # that it is slow without torch.compile
@pytest.mark.parametrize("name", CASES)
def test_each_row_of_the_table(name: str) -> None:
    score_mod, mask_mod, options = CASES[name]
    heads = 2 if name == "enable_gqa" else H
    generator = torch.Generator().manual_seed(1)
    shapes = (B, H, T_Q, D), (B, heads, T_K, D), (B, heads, T_K, D)
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    block = None if mask_mod is None else create_block_mask(mask_mod, B, None, T_Q, T_K, device="cpu")
    more = {"enable_gqa": True} if name == "enable_gqa" else {"return_lse": True} if name == "return_lse" else {}
    theirs: Any = flex_attention(*given, score_mod=score_mod, block_mask=block, **more)
    ours: Any = attnfast.attention(*given, **options)
    if more.get("return_lse"):
        torch.testing.assert_close(ours.lse, theirs[1], rtol=1e-5, atol=1e-5)
        ours, theirs = ours.output, theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    plain = attnfast.attention(*given)
    assert name == "enable_gqa" or not torch.allclose(ours, plain), "the arguments change nothing"


def test_every_row_has_a_case() -> None:
    text = (Path(attnfast.__file__).resolve().parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
    table = text[text.index("## FlexAttention") :]
    rows = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    rows = [row for row in rows if not row.startswith("score_mod")]
    assert len(rows) == len(CASES) == 11
    assert all(any(name in row for row in rows) for name in CASES)
