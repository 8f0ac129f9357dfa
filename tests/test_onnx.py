"""The ONNX Attention operator's own conformance cases (opsets 23 to 25), through an adapter to attnfast.attention.

The adapter is what a runtime would write: it lays out the tensors, joins the cache, and turns attributes into keywords.
Y always comes from attnfast. qk_matmul_output is a debugging tap into the middle of the unfused graph: mode 3, the
weights, is attnfast's too; modes 0 to 2 are formed here by plain means.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close_to_truth, oracle
from torch import Tensor

onnx = pytest.importorskip("onnx", reason="the dev requirements pin onnx")

COUNT = 93  # in onnx 1.23.2


@functools.cache
def cases() -> dict[str, Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        found = collect_testcases(None)
    return {c.name: c for c in found if c.name.startswith("test_attention") and "_expanded" not in c.name}


def to_torch(x: np.ndarray | None) -> Tensor | None:
    if x is None:
        return None
    if x.dtype.name == "bfloat16":  # ml_dtypes
        return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x))


def split_heads(x: Tensor, heads: int | None) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]; 4-D input is that already."""
    return x if x.dim() == 4 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def run_node(attention: Any, node: Any, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """One Attention node: outputs by the names Y, present_key, present_value, qk_matmul_output."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    flat = inputs["Q"].dim() == 3
    query = split_heads(inputs["Q"], attributes.get("q_num_heads"))
    key = split_heads(inputs["K"], attributes.get("kv_num_heads"))
    value = split_heads(inputs["V"], attributes.get("kv_num_heads"))
    past, lengths, mask = inputs.get("past_key"), inputs.get("nonpad_kv_seqlen"), inputs.get("attn_mask")
    first = 0
    if past is not None:
        first = past.shape[2]
        key, value = torch.cat([past, key], 2), torch.cat([inputs["past_value"], value], 2)
    present = {"present_key": key, "present_value": value}
    T_k = key.shape[2]
    if mask is not None and mask.shape[-1] < T_k:
        fill = False if mask.dtype == torch.bool else float("-inf")
        mask = torch.nn.functional.pad(mask, (0, T_k - mask.shape[-1]), value=fill)
    window = (attributes.get("left_window_size", -1), attributes.get("right_window_size", -1))
    options: dict[str, Any] = {
        "scale": attributes.get("scale"),
        "softcap": attributes.get("softcap", 0.0),
        "window": None if window == (-1, -1) else window,
        "key_lengths": lengths,
    }
    causal = bool(attributes.get("is_causal", 0))
    if lengths is not None and (causal or options["window"]):
        # the queries are the last of each sequence: query i stands at length - T_q + i
        options["causal"] = "bottom_right"
        if not causal:
            raise NotImplementedError("a window over an external cache without is_causal: no such case")
    elif causal:
        options["causal"] = "top_left"
    rows = slice(None)
    if first and (causal or options["window"]):
        # An internal cache: query i stands at position `first` + i, whatever the number of new keys. Rows for the past
        # positions, whose results are dropped, say so.
        query = torch.cat([query.new_zeros(*query.shape[:2], first, query.shape[3]), query], 2)
        rows = slice(first, None)
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = torch.cat([mask[..., :1, :].expand(*mask.shape[:-2], first, T_k), mask], -2)
    mode = attributes.get("qk_matmul_output_mode", 0)
    result = attention(query, key, value, mask=mask, return_weights=mode == 3, **options)
    output, weights = (result.output, result.weights) if mode == 3 else (result, None)
    output = output[:, :, rows]
    outputs = {"Y": output.transpose(1, 2).flatten(2) if flat else output, **present}
    if mode == 3:
        outputs["qk_matmul_output"] = weights[:, :, rows]
    else:
        scores = debug_scores(query, key, options["scale"], options["softcap"] if mode else 0.0)
        if mode == 2:
            seen = torch.ones(query.shape[2], T_k, dtype=torch.bool)
            seen = seen.tril() if causal else seen
            bias = mask if mask is not None and mask.dtype != torch.bool else 0
            seen = seen if mask is None or mask.dtype != torch.bool else seen & mask
            scores = torch.where(seen, scores + bias, float("-inf"))
        outputs["qk_matmul_output"] = scores[:, :, rows].to(query.dtype)
    return outputs


def debug_scores(query: Tensor, key: Tensor, scale: float | None, softcap: float) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def test_every_case_is_here() -> None:
    assert len(cases()) == COUNT, sorted(cases())
    opsets = {imported.version for c in cases().values() for imported in c.model.opset_import}
    assert opsets == {23, 24, 25}
    assert all([n.op_type for n in c.model.graph.node] == ["Attention"] for c in cases().values())
    assert sorted(cases()) == sorted(NAMES)


NAMES = sorted(cases())


@pytest.mark.parametrize("name", NAMES)
def test_onnx_node_case(backend: Any, name: str) -> None:
    case = cases()[name]
    (node,) = case.model.graph.node
    assert case.data_sets
    for arrays, expected in case.data_sets:
        names = [n for n in node.input if n]
        formal = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
        places = [formal[i] for i, n in enumerate(node.input) if n]
        assert len(names) == len(arrays)
        inputs = {place: to_torch(np.asarray(x)) for place, x in zip(places, arrays)}
        outputs = run_node(backend.attention, node, inputs)
        formal_outputs = ["Y", "present_key", "present_value", "qk_matmul_output"]
        wanted = [formal_outputs[i] for i, n in enumerate(node.output) if n]
        assert len(wanted) == len(expected)
        for place, array in zip(wanted, expected):
            want, have = to_torch(np.asarray(array)), outputs[place]
            assert have.dtype == want.dtype and have.shape == want.shape, place
            if want.dtype in (torch.float16, torch.bfloat16):
                # ONNX computes the whole graph in half precision; its own rounding error is all that may differ
                eps = torch.finfo(want.dtype).eps
                torch.testing.assert_close(have, want, rtol=4 * eps, atol=2 * eps)
            else:
                torch.testing.assert_close(have, want, rtol=case.rtol, atol=max(case.atol, 1e-6))


def test_half_cases_are_nearer_to_float64_than_onnx(isa: str) -> None:
    """Where ONNX's expectation is itself rounded: attnfast's error against float64 is not above that of ONNX."""
    import attnfast

    checked = 0
    for name in ("test_attention_4d_fp16", "test_attention_4d_causal_fp16", "test_attention_4d_causal_bf16"):
        case = cases()[name]
        arrays, expected = case.data_sets[0]
        query, key, value = (to_torch(np.asarray(x)) for x in arrays)
        causal = "top_left" if "causal" in name else None
        have = attnfast.attention(query, key, value, causal=causal)
        truth = oracle(query.double(), key.double(), value.double(), causal=causal).output
        assert_close_to_truth(have, truth, to_torch(np.asarray(expected[0])), name)
        checked += 1
    assert checked == 3


def test_adapter_can_fail() -> None:
    """A wrong attention fails nearly every case: the comparisons above are not vacuous."""
    from attnfast import reference

    def wrong(*args: Any, **options: Any) -> Any:
        options["scale"] = 1.1 * (options["scale"] or args[0].shape[-1] ** -0.5)
        return reference.attention(*args, **options)

    failures = 0
    for case in cases().values():
        arrays, expected = case.data_sets[0]
        (node,) = case.model.graph.node
        formal = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
        inputs = {formal[i]: None for i in range(7)}
        places = [formal[i] for i, n in enumerate(node.input) if n]
        inputs.update(zip(places, (to_torch(np.asarray(x)) for x in arrays)))
        output = run_node(wrong, node, inputs)["Y"]
        want = to_torch(np.asarray(expected[0]))
        failures += not torch.allclose(output.float(), want.float(), rtol=1e-3, atol=1e-5)
    assert failures >= COUNT - 10
