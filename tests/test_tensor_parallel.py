"""attnfast's operators on DTensors, and models with them under DDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import ranks as processes
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

import attnfast
from attnfast.distributed import tensor_parallel
from attnfast.ops import DotAttentionOptions

F64 = torch.float64
B, H, T_Q, T_K, D, D_V = 2, 4, 6, 5, 3, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64)


# ---- every rule, without processes: parts as it says, one by one, against the whole ------------------------------


def offered(name: str, args: tuple[Any, ...], parts: int) -> list[tensor_parallel.Rule]:
    mesh = SimpleNamespace(shape=(parts,))
    specs = [SimpleNamespace(shape=x.shape, mesh=mesh) if isinstance(x, Tensor) else x for x in args]
    return tensor_parallel.rules(name, *specs)


def follow(name: str, args: tuple[Any, ...], parts: int) -> list[str]:
    """Compare what each rule gives with the whole; returns the rules, by the placement of the first tensor."""
    operator = getattr(torch.ops.attnfast, name)
    whole = operator(*args)
    whole = (whole,) if isinstance(whole, Tensor) else whole
    seen = []
    for outputs, inputs in offered(name, args, parts):
        assert [placement is not None for placement in inputs] == [isinstance(x, Tensor) for x in args]
        cut = [x.chunk(parts, p.dim) if isinstance(p, Shard) else [x] * parts for x, p in zip(args, inputs)]
        if any(len(pieces) < parts for pieces in cut):
            continue  # DTensor does not try it
        results = [operator(*pieces) for pieces in zip(*cut)]
        results = [(x,) if isinstance(x, Tensor) else x for x in results]
        for at, (placement, want) in enumerate(zip(outputs, whole, strict=True)):
            found = [result[at] for result in results]
            where = f"{name}: result {at} of {inputs}"
            if isinstance(placement, Shard):
                torch.testing.assert_close(torch.cat(found, placement.dim), want, msg=where)
            elif isinstance(placement, Partial):
                torch.testing.assert_close(torch.stack(found).sum(0), want, msg=where)
            else:
                assert all(torch.equal(x, want) for x in found), where
        first = next(p for p, x in zip(inputs, args) if isinstance(x, Tensor))
        seen.append(str(first.dim) if isinstance(first, Shard) else "R")
    return seen


LENGTHS = torch.tensor([3, 5])
BOUNDS = torch.tensor([[[[0, 3], [1, 4], [2, 5], [0, 5], [3, 3], [4, 5]]]])
ATTENTION: dict[str, tuple[dict[str, Any], str]] = {  # what differs from a plain call, and the axes that are sharded
    "plain": ({}, "BHQ"),
    "causal": ({"causal": 1}, "BH"),
    "window": ({"window_left": 1}, "BH"),
    "grouped": ({"key_heads": 2}, "BHQ"),
    "one key head": ({"key_heads": 1}, "BHQ"),
    "bias": ({"bias": draw(B, H, T_Q, T_K)}, "BHQ"),
    "bias of heads": ({"bias": draw(1, H, 1, T_K), "bias2": draw(B, 1, T_Q, 1)}, "BHQ"),
    "bias of keys": ({"bias": draw(1, 1, 1, T_K)}, "BHQ"),
    "mask": ({"mask": draw(B, 1, T_Q, T_K) > 0}, "BHQ"),
    "sink": ({"sink": draw(H)}, "BHQ"),
    "prior": ({"center": draw(B, H, T_Q) + 2, "prior_sigma": 1.5}, "BHQ"),
    "slopes": ({"alibi_slopes": draw(1, H)}, "BH"),
    "slopes of samples": ({"alibi_slopes": draw(B, 1)}, "BH"),
    "lengths": ({"key_lengths": LENGTHS}, "BHQ"),
    "lengths of queries": ({"query_lengths": LENGTHS, "causal": 2}, "BH"),
    "window around": ({"window_bounds": BOUNDS}, "BHQ"),
    "weights": ({"weights_mode": 1}, "BHQ"),
    "weights of keys": ({"weights_mode": 2}, "BHQ"),
    "largest weights": ({"weights_mode": 3}, "BHQ"),
    "packed": ({"cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 4, 5]), "batch": 1,
                "alibi_slopes": draw(2, H)}, "H"),
}  # fmt: skip


@pytest.mark.parametrize("core", ["dot", "additive", "additive, one weight"])
@pytest.mark.parametrize("case", ATTENTION)
def test_parts_of_attention_make_the_whole(case: str, core: str) -> None:
    given, axes = ATTENTION[case]
    batch, key_heads = given.get("batch", B), given.get("key_heads", H)
    inputs = [draw(batch, H, T_Q, D), draw(batch, key_heads, T_K, D), draw(batch, key_heads, T_K, D_V)]
    extra = [given.get(name) for name in ("bias", "bias2", "sink", "center")]
    vectors = [] if core == "dot" else [draw(H if core == "additive" else 1, D, seed=at) for at in (1, 2)]
    fields = {name: value for name, value in given.items() if name in DotAttentionOptions._fields}
    options = list(DotAttentionOptions(None)._replace(scale=0.7, **fields))
    if core != "dot":
        del options[DotAttentionOptions._fields.index("scale")]
    name = "dot_attention" if core == "dot" else "additive_attention"
    want = sorted(["R", *(str("BHQ".index(axis)) for axis in axes if not (axis == "B" and batch == 1))])
    forward = (*inputs, *vectors, *extra, *options)
    assert sorted(follow(f"{name}_fwd", forward, 2)) == want
    out, lse, weights, index = getattr(torch.ops.attnfast, f"{name}_fwd")(*forward)
    leaves = [*inputs, *vectors, *extra]
    every = [x is not None for x in leaves]
    with_weights = [torch.ones_like(weights, dtype=F64)] if given.get("weights_mode") else [None]
    for grads, needs in itertools.product(
        ([torch.ones_like(out), None, None], [None, draw(*lse.shape).where(lse.isfinite(), 0), *with_weights]),
        (every, [at % 2 == 0 and each for at, each in enumerate(every)]),
    ):
        saved = (*inputs, *vectors, out, lse, weights, index, *extra)
        assert sorted(follow(f"{name}_bwd", (*grads, *saved, needs, *options), 2)) == want


@pytest.mark.parametrize(
    ("heads", "key_heads", "mesh", "allowed"),
    [(6, 3, (2,), False), (6, 3, (3,), True), (8, 4, (2, 4), True), (12, 6, (2, 4), False), (6, 6, (4,), True),
     (6, 1, (4,), True), (8, 2, (4,), True)],
)  # fmt: skip
def test_heads_are_cut_between_groups(heads: int, key_heads: int, mesh: tuple[int, ...], allowed: bool) -> None:
    # The last: two key heads on four ranks is what DTensor does not try, as a tensor cannot have fewer rows than parts.
    assert tensor_parallel._whole_groups(heads, key_heads, mesh) == allowed


def test_uneven_heads() -> None:
    options = DotAttentionOptions(None)
    for heads, key_heads in ((5, 5), (7, 1)):
        args = (draw(1, heads, 4, D), draw(1, key_heads, 4, D), draw(1, key_heads, 4, D), *[None] * 4, *options)
        assert "1" in follow("dot_attention_fwd", args, 3)


@pytest.mark.parametrize("quantised", [False, True])
def test_parts_of_reads_make_the_whole(quantised: bool) -> None:
    rows, slots, k = 7, 9, 3
    indices = torch.randint(-1, slots, (rows, k), generator=torch.Generator().manual_seed(3))
    weights, query = draw(rows, k), draw(rows, D)
    values, keys, scales = draw(slots, D_V), draw(slots, D), None
    if quantised:
        weights, query, scales = weights.float(), query.float(), draw(slots).abs().float()
        values, keys = (torch.randint(-9, 9, x.shape, dtype=torch.int8) for x in (values, keys))
    # Rows of queries, and columns of the table: never rows of it, whose numbers the indices are.
    assert follow("weighted_gather_fwd", (indices, weights, values, scales), 2) == ["R", "0", "R"]
    grad = draw(rows, D_V).to(weights.dtype)
    masks = (None, draw(rows, slots) > 0, draw(1, slots) > 0)
    picked = [torch.ops.attnfast.topk_scores_fwd(query, keys, scales, mask, k, 0.5) for mask in masks]
    for mask in masks:
        assert follow("topk_scores_fwd", (query, keys, scales, mask, k, 0.5), 2) == ["R", "0"]
    for needs in ([True, False], [True, True], [False, True]):
        if quantised and needs[1]:
            continue
        backward = (grad, indices, weights, values, scales, needs)
        assert follow("weighted_gather_bwd", backward, 2) == ["R", "0", "1"]
        for scores, chosen in picked:
            assert follow("topk_scores_bwd", (scores, query, keys, scales, chosen, 0.5, needs), 2) == ["R", "0"]


def test_parts_of_product_keys_make_the_whole() -> None:
    best = [x for at in range(2) for x in draw(6, 5, seed=at).topk(3)]
    assert follow("product_keys", (*best, 5, 4), 2) == ["R", "0"]


def test_every_operator_has_rules() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("attnfast::")}
    assert names == set(tensor_parallel.OPERATORS)


# ---- DTensors on processes ---------------------------------------------------------------------------------------


def agrees(mesh: Any, tensors: dict[str, Tensor], placements: dict[str, list[Any]], call: Any) -> tuple[Any, list[Any]]:
    """Run on DTensors and on plain tensors; the placements of the first result and of the gradients."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    parts: dict[str, Any] = {
        name: distribute_tensor(x, mesh, placements.get(name, [Replicate()] * mesh.ndim)).requires_grad_(
            x.is_floating_point()
        )
        for name, x in tensors.items()
    }
    want, got = call(**whole), call(**parts)
    results = ((x,) if isinstance(x, Tensor) else tuple(y for y in x if y is not None) for x in (want, got))
    want, got = results
    assert all(isinstance(x, DTensor) for x in got)
    for mine, one in zip(got, want, strict=True):
        torch.testing.assert_close(mine.full_tensor(), one)
    leaves = [name for name, x in whole.items() if x.requires_grad]
    expected = torch.autograd.grad(sum((x * x).sum() for x in want if x.requires_grad), [whole[x] for x in leaves],
                                   allow_unused=True)  # fmt: skip
    found: Any = torch.autograd.grad(sum((x * x).sum() for x in got if x.requires_grad), [parts[x] for x in leaves],
                                allow_unused=True)  # fmt: skip
    for name, mine, one in zip(leaves, found, expected, strict=True):
        assert (mine is None) == (one is None), name
        if mine is not None:
            torch.testing.assert_close(mine.full_tensor(), one, msg=f"gradient of {name}")
    return got[0].placements, [None if x is None else x.placements for x in found]


def dtensors(rank: int, ranks: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2, 2) if ranks == 4 else (ranks,))
    rest = [Replicate()] * (mesh.ndim - 1)
    q, k, v = draw(B, H, T_Q, D), draw(B, H, T_K, D, seed=1), draw(B, H, T_K, D_V, seed=2)
    qkv = {"query": q, "key": k, "value": v}
    one = {"key": k[:, :1], "value": v[:, :1]}
    sdpa, attention = attnfast.scaled_dot_product_attention, attnfast.attention

    def of(dim: int, *names: str) -> dict[str, list[Any]]:
        return {name: [Shard(dim), *rest] for name in names}

    every = ("query", "key", "value")
    for dim in (0, 1):
        assert agrees(mesh, qkv, of(dim, *every), sdpa) == ((Shard(dim), *rest), [(Shard(dim), *rest)] * 3)
    out, grads = agrees(mesh, qkv, of(2, "query"), sdpa)  # rows of queries against all keys
    assert out == (Shard(2), *rest) and grads[0] == (Shard(2), *rest) and isinstance(grads[1][0], Partial)
    out, grads = agrees(mesh, {**qkv, **one}, of(1, "query"), sdpa)
    assert out == (Shard(1), *rest) and isinstance(grads[1][0], Partial)
    agrees(mesh, qkv, of(2, *every), sdpa)  # keys cannot be cut: they are moved
    agrees(mesh, qkv, of(3, *every), sdpa)
    if mesh.ndim == 2:
        both = {name: [Shard(0), Shard(1)] for name in every}
        assert agrees(mesh, qkv, both, lambda **x: attention(**x, causal="top_left"))[0] == (Shard(0), Shard(1))
    # Everything that goes along: a bias and a mask in the forms they come, lengths, slopes, sink.
    bias = {"bias": draw(1, H, T_Q, T_K), "sink": draw(H), "mask": draw(B, 1, 1, T_K) > -1, "key_lengths": LENGTHS}
    for dim in (0, 1):
        placed = of(dim, *every) | (of(1, "bias") | of(0, "sink") if dim else of(0, "mask", "key_lengths"))
        out, _ = agrees(mesh, {**qkv, **bias}, placed, lambda **x: attention(**x, return_lse=True))
        assert out == (Shard(dim), *rest)
    # One optional argument in another's place: what DTensor remembers of the one does not hold for the other.
    for name in ("key_lengths", "query_lengths"):
        agrees(mesh, {**qkv, name: LENGTHS}, of(1, *every), attention)
    for score in ("cosine", "l2"):
        agrees(mesh, qkv, of(1, *every), lambda score=score, **x: attention(**x, score=score, return_weights=True))
    agrees(mesh, qkv, of(0, *every), lambda **x: attention(**x, return_weights="column_sum", return_lse=True))
    additive = {**qkv, "weight": draw(H, D), "score_bias": draw(H, D, seed=1)}
    out, grads = agrees(mesh, additive, of(1, *every) | of(0, "weight", "score_bias"), attnfast.additive_attention)
    assert out == (Shard(1), *rest) and grads[3] == (Shard(0), *rest)
    out, grads = agrees(mesh, additive, of(0, *every), attnfast.additive_attention)
    assert isinstance(grads[3][0], Partial)  # a sum over samples, which ranks have
    # Reads by index.
    table = {"query": draw(8, D), "keys": draw(9, D)}
    out, grads = agrees(mesh, table, of(0, "query"), lambda **x: attnfast.topk_scores(**x, k=3))
    assert out == (Shard(0), *rest) and isinstance(grads[1][0], Partial)
    agrees(mesh, table, of(0, "query", "keys"), lambda **x: attnfast.topk_scores(**x, k=3))  # the table is gathered
    agrees(mesh, table, of(0, "query"), lambda **x: attnfast.topk_scores(**x, k=2))  # another k
    indices = torch.arange(24).view(8, 3) % 10 - 1
    picks = {"indices": indices, "weights": draw(8, 3), "values": draw(9, D_V)}
    out, grads = agrees(mesh, picks, of(0, "indices", "weights"), attnfast.weighted_gather)
    assert out == (Shard(0), *rest) and isinstance(grads[1][0], Partial)
    out, _ = agrees(mesh, picks, of(1, "values"), attnfast.weighted_gather)
    assert out == (Shard(1), *rest)
    agrees(mesh, picks, of(0, "values"), attnfast.weighted_gather)
    product = {"query": draw(8, 2, 2, D), "row_keys": draw(2, 4, D), "column_keys": draw(2, 4, D, seed=1),
               "values": draw(16, D_V)}  # fmt: skip
    agrees(mesh, product, of(0, "query"), lambda **x: attnfast.product_key_read(**x, topk=3))
    read = {**table, "values": draw(9, D_V)}
    agrees(mesh, read, of(0, "query"), lambda **x: attnfast.memory_read(**x, topk=3))
    agrees(mesh, read, of(0, "query"), lambda **x: attnfast.memory_read(**x))

    # Nothing is sent for heads and samples, forward or backward.
    with CommDebugMode() as traffic:
        leaves = [distribute_tensor(x, mesh, [Shard(1), *rest], src_data_rank=None).requires_grad_() for x in (q, k, v)]
        result: Any = attention(*leaves, causal="top_left")
        result.backward(torch.ones_like(result))
    assert traffic.get_total_counts() == 0

    query, key, value = leaves
    errors = []
    for bad in (
        lambda: attention(*leaves, dropout_p=0.5),
        lambda: attnfast.additive_attention(query, key, value, weight=query[0, :, 0], dropout_p=0.5),
        lambda: attention(leaves[0], k, v),
        lambda: attention(*leaves, key_lengths=LENGTHS),
        lambda: attnfast.topk_scores(leaves[0][0, 0], leaves[1][0, 0], 2, sparse_grad=True),
    ):
        with pytest.raises((NotImplementedError, RuntimeError)) as error:
            bad()
        errors.append(str(error.value))
    return errors


@pytest.mark.parametrize("ranks", [2, 4])
def test_dtensors_are_as_one_process(ranks: int) -> None:
    for dropout, additive, plain, lengths, sparse in processes.run(ranks, dtensors):
        assert dropout == additive and dropout.startswith("dropout_p: expected 0 with DTensors")
        assert "mixed torch.Tensor and DTensor" in plain and "mixed torch.Tensor and DTensor" in lengths
        assert sparse.startswith("sparse_grad=True works in eager mode only")
