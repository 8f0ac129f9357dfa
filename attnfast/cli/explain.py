"""``python -m attnfast explain``: which kernel a call would take, and why not a faster one."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import attnfast

from . import CommandError, described
from ._memory_calls import FUNCTIONS, memory_call

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_EXAMPLES = """\
examples:
  python -m attnfast explain --shape 1,8,512,64 --causal top_left
  python -m attnfast explain --shape 8,8,1,64 --key-tokens 4096 --dtype bfloat16     one decoding step
  python -m attnfast explain --bias --grad --return-weights full
  python -m attnfast explain --torch-signature --kv-heads 2 --dropout 0.1
  python -m attnfast explain --memory memory_read --slots 100000 --topk 16 --json

JSON: {"function", "shapes": {argument: sizes}, "options": {argument: value, tensors left out}, "explanation": text}.
"""


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"takes B,H,T_q,D, four sizes separated by commas, got {text!r}")
    return sizes


def _window(text: str) -> tuple[int, int]:
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes LEFT,RIGHT (-1 for unbounded), got {text!r}") from None
    return left, right


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = described(
        commands,
        "explain",
        help="which kernel a call would take",
        description="Name the kernel that a call of this shape with these options would take, and why not a faster "
        "one: a call of attention, or with --memory one of a memory function. The tensors are made up; use "
        "attnfast.explain(function, ...) for your own.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--shape", type=_sizes, default=(1, 8, 512, 64), metavar="B,H,T_q,D", help="default: 1,8,512,64"
    )
    parser.add_argument("--key-tokens", type=int, metavar="T_k", help="default: T_q")
    parser.add_argument("--kv-heads", type=int, metavar="H_kv", help="default: H")
    parser.add_argument("--value-size", type=int, metavar="D_v", help="default: D")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--score", default="scaled_dot", help="dot, scaled_dot, cosine or l2 (default: scaled_dot)")
    parser.add_argument("--causal", choices=("top_left", "bottom_right"))
    parser.add_argument("--window", type=_window, metavar="LEFT,RIGHT")
    parser.add_argument("--mask", action="store_true", help="a boolean mask [T_q, T_k]")
    parser.add_argument("--bias", action="store_true", help="an added bias [H, T_q, T_k], with a gradient under --grad")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--return-weights", choices=("full", "column_sum", "row_max"))
    parser.add_argument("--grad", action="store_true", help="with gradients")
    parser.add_argument("--torch-signature", action="store_true", help="ask about scaled_dot_product_attention instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    memory = parser.add_argument_group("memory functions (with --value-size, --dtype, --score, --mask, --grad)")
    memory.add_argument("--memory", choices=FUNCTIONS, metavar="NAME", help=", ".join(FUNCTIONS))
    memory.add_argument("--queries", type=int, default=32, metavar="Q", help="default: 32")
    memory.add_argument("--slots", type=int, default=65536, metavar="N", help="default: 65536")
    memory.add_argument("--size", type=int, default=64, metavar="D", help="of a key (default: 64)")
    memory.add_argument("--topk", type=int, metavar="K", help="default: 32; memory_read: all slots")
    memory.add_argument("--heads", type=int, default=4, metavar="H", help="of product keys (default: 4)")
    memory.add_argument("--candidates", type=int, metavar="M", help="lists of M slots for memory_read")
    memory.add_argument("--sparse-grad", action="store_true", help="a sparse gradient of the values")
    parser.set_defaults(run=run, default_of=parser.get_default)


def run(arguments: argparse.Namespace) -> int:
    try:
        function, tensors, options = _call(arguments)
        text = attnfast.explain(function, *tensors.values(), **options)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CommandError(str(error)) from None
    if arguments.json:
        call = {name: option for name, option in options.items() if not _holds_tensors(option)}
        shapes = {name: list(x.shape) for name, x in tensors.items()}
        found = {"function": function.__name__, "shapes": shapes, "options": call, "explanation": text}
        print(json.dumps(found, indent=2))
    else:
        print(text)
    return 0


def _holds_tensors(option: Any) -> bool:
    return any(isinstance(x, torch.Tensor) for x in (option if isinstance(option, tuple) else (option,)))


def _call(arguments: argparse.Namespace) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """The function, its tensors by position, and its other arguments."""
    dtype = _DTYPES[arguments.dtype]
    if arguments.memory is not None:
        return memory_call(arguments, dtype)
    for name in ("queries", "slots", "size", "topk", "heads", "candidates", "sparse_grad"):
        if getattr(arguments, name) != arguments.default_of(name):
            raise CommandError(f"--{name.replace('_', '-')} is an option of the memory functions (--memory NAME)")
    batch, heads, query_tokens, size = arguments.shape
    key_tokens = query_tokens if arguments.key_tokens is None else arguments.key_tokens
    kv_heads = heads if arguments.kv_heads is None else arguments.kv_heads
    value_size = size if arguments.value_size is None else arguments.value_size
    query = torch.empty(batch, heads, query_tokens, size, dtype=dtype, requires_grad=arguments.grad)
    key = torch.empty(batch, kv_heads, key_tokens, size, dtype=dtype, requires_grad=arguments.grad)
    value = torch.empty(batch, kv_heads, key_tokens, value_size, dtype=dtype, requires_grad=arguments.grad)
    tensors = {"query": query, "key": key, "value": value}
    mask = torch.ones(query_tokens, key_tokens, dtype=torch.bool) if arguments.mask else None
    bias = torch.zeros(heads, query_tokens, key_tokens, dtype=dtype) if arguments.bias else None
    if bias is not None:
        bias.requires_grad_(arguments.grad)
    if arguments.torch_signature:
        return attnfast.scaled_dot_product_attention, tensors, _torch_options(arguments, mask, bias, kv_heads != heads)
    options = {
        "score": arguments.score,
        "mask": mask,
        "bias": bias,
        "causal": arguments.causal,
        "window": arguments.window,
        "softcap": arguments.softcap,
        "dropout_p": arguments.dropout,
        "return_weights": arguments.return_weights or False,
    }
    return attnfast.attention, tensors, options


def _torch_options(arguments: argparse.Namespace, mask: Any, bias: Any, grouped: bool) -> dict[str, Any]:
    """Arguments of the torch signature; what it cannot express is refused rather than dropped."""
    for name in ("window", "softcap", "return_weights"):
        if getattr(arguments, name):
            raise CommandError(f"--{name.replace('_', '-')} is not part of scaled_dot_product_attention's signature")
    if arguments.score != "scaled_dot" or arguments.causal == "bottom_right" or (mask is not None and bias is not None):
        raise CommandError("scaled_dot_product_attention has one mask, top-left causality and the scaled dot score")
    return {
        "attn_mask": mask if bias is None else bias,
        "dropout_p": arguments.dropout,
        "is_causal": arguments.causal == "top_left",
        "enable_gqa": grouped,
    }
