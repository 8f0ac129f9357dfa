"""attnfast.nn.ProductKeyMemory against plain torch: all n x n slots scored, `torch.topk`, a softmax, rows summed."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HALVES, dtype_id
from torch import Tensor, nn

from attnfast import ProductKeyReadOutput
from attnfast.nn import ProductKeyMemory

F64 = torch.float64
SIZE, N_KEYS, HEADS, D_KEY, K = 6, 5, 3, 8, 4
SMALL: dict[str, Any] = {"n_keys": N_KEYS, "heads": HEADS, "d_key": D_KEY, "k": K}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"query_norm": None},
    "layer norm": {"query_norm": "layer"},
    "batch norm": {"query_norm": "batch"},
    "no bias": {"query_norm": None, "bias": False},
    "small values": {"d_value": 2},
    "one head": {"heads": 1},
    "one pick": {"k": 1},
    "many picks": {"k": 16},
}


# For finite differences, which go over every element.
TINY: dict[str, Any] = {"d_model": 3, "n_keys": 4, "heads": 2, "d_key": 4, "k": 3}


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def loud(module: nn.Module, scale: float = 0.7) -> Any:
    """Parameters and statistics of ordinary size, none at a value that hides it."""
    module, generator = module.double(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(scale * torch.randn(x.shape, generator=generator, dtype=F64))
        for name, x in module.named_buffers():
            if x.is_floating_point():
                x.copy_(torch.rand(x.shape, generator=generator, dtype=F64) + (0.5 if "var" in name else 0.0))
    return module


def memory(variant: str = "plain", **options: Any) -> Any:
    return loud(ProductKeyMemory(**{"d_model": SIZE, **SMALL, **VARIANTS[variant], **options}))


def query_by_hand(module: Any, rows: Tensor) -> Tensor:
    """``[B, H, 2, d_key / 2]`` of tokens ``[B, d_model]``, without dropout."""
    query = rows @ module.query.weight.t()
    if module.query.bias is not None:
        query = query + module.query.bias
    norm = module.norm
    if module.query_norm == "batch":
        mean, var = norm.running_mean, norm.running_var
        if module.training:
            mean, var = query.mean(0), query.var(0, unbiased=False)
        query = (query - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    query = query.reshape(len(rows), module.heads, 2, module.d_key // 2)
    if module.query_norm == "layer":
        mean, var = query.mean(-1, keepdim=True), query.var(-1, unbiased=False, keepdim=True)
        query = (query - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    return query


def read_by_hand(module: Any, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, d_model]``, slots and weights of queries, every slot with its key written out."""
    n, total, slots, shares = module.n_keys, 0.0, [], []
    for h in range(module.heads):
        pairs = [torch.cat([module.keys[h, 0, i], module.keys[h, 1, j]]) for i in range(n) for j in range(n)]
        scores = query[:, h].flatten(1) @ torch.stack(pairs).t()
        best, chosen = scores.topk(module.k)
        weights = best.exp() / best.exp().sum(-1, keepdim=True)
        total = total + sum(weights[:, m : m + 1] * module.values[chosen[:, m]] for m in range(module.k))
        slots.append(chosen)
        shares.append(weights)
    if module.output is not None:
        total = total @ module.output.weight.t()
    return total, torch.stack(slots, 1), torch.stack(shares, 1)


# --- results and derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_follows_the_paper(variant: str, training: bool) -> None:
    module, x = memory(variant).train(training), rand(7, SIZE)
    output, slots, weights = read_by_hand(module, query_by_hand(module, x))
    got = module(x, return_aux=True)
    assert isinstance(got, ProductKeyReadOutput)
    torch.testing.assert_close(got.output, output)
    torch.testing.assert_close(got.weights, weights)
    assert torch.equal(got.indices, slots)
    torch.testing.assert_close(module(x), output)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("variant", ["layer norm", "batch norm", "small values"])
def test_leading_dimensions(variant: str, leading: tuple[int, ...]) -> None:
    module, x = memory(variant).eval(), rand(*leading, SIZE)
    got = module(x, return_aux=True)
    flat = module(x.reshape(-1, SIZE), return_aux=True)
    assert got.output.shape == x.shape and got.indices.shape == (*leading, HEADS, K)
    for a, b in zip(got, flat, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b)


def test_batch_statistics_are_of_all_tokens() -> None:
    module, x = memory("batch norm").train(), rand(2, 5, SIZE)
    before = copy.deepcopy(module.norm)
    module(x)
    query = (x.reshape(-1, SIZE) @ module.query.weight.t() + module.query.bias).detach()
    torch.testing.assert_close(module.norm.running_mean, 0.9 * before.running_mean + 0.1 * query.mean(0))
    torch.testing.assert_close(module.norm.running_var, 0.9 * before.running_var + 0.1 * query.var(0))
    assert module.norm.num_batches_tracked == 1
    module.reset_parameters()
    assert module.norm.running_mean.eq(0).all() and module.norm.num_batches_tracked == 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant: str, training: bool) -> None:
    """gradcheck of x and of every parameter, each of which has an influence."""
    module = memory(variant, **{**TINY, **VARIANTS[variant]}).train(training)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *leaves: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, leaves, strict=True)), (x,))

    leaves = [x.detach().clone().requires_grad_() for x in (rand(4, 3), *module.parameters())]
    assert torch.autograd.gradcheck(run, leaves)
    for name, gradient in zip(["x", *names], torch.autograd.grad(run(*leaves).square().sum(), leaves), strict=True):
        # With one pick the weight is 1 whatever the score; batch statistics take a bias away again.
        without = variant == "one pick" and name not in ("values", "output.weight")
        without |= variant == "batch norm" and training and name == "query.bias"
        assert (gradient.abs().max() < 1e-9) == without, name


def test_second_derivatives() -> None:
    module = memory("small values", **TINY)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *leaves: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, leaves, strict=True)), (x,))

    leaves = [x.detach().clone().requires_grad_() for x in (rand(2, 3), *module.parameters())]
    assert torch.autograd.gradgradcheck(run, leaves)


def test_the_package_product_key_memory_gives_the_same() -> None:
    """Same parameters in their order of dimensions; output and every gradient."""
    peers = pytest.importorskip("product_key_memory")
    theirs = peers.PKM(SIZE, heads=HEADS, num_keys=N_KEYS, topk=K, dim_head=D_KEY // 2, use_layernorm=True).double()
    module = memory("layer norm", bias=False)
    half, x = D_KEY // 2, rand(2, 4, SIZE)
    with torch.no_grad():
        weight = module.query.weight.reshape(HEADS, 2, half, SIZE).transpose(0, 1)  # theirs: half, head, element
        theirs.to_queries.weight.copy_(weight.reshape(-1, SIZE))
        theirs.norm.load_state_dict(module.norm.state_dict())
        theirs.keys.copy_(module.keys.transpose(1, 2))
        theirs.values.weight.copy_(module.values)
    torch.testing.assert_close(module(x), theirs(x))
    probe = rand(2, 4, SIZE, seed=8)
    (module(x) * probe).sum().backward()
    (theirs(x) * probe).sum().backward()
    torch.testing.assert_close(module.values.grad, theirs.values.weight.grad)
    torch.testing.assert_close(module.keys.grad, theirs.keys.grad.transpose(1, 2))
    torch.testing.assert_close(module.norm.weight.grad, theirs.norm.weight.grad)
    got = module.query.weight.grad.reshape(HEADS, 2, half, SIZE).transpose(0, 1).reshape(-1, SIZE)
    torch.testing.assert_close(got, theirs.to_queries.weight.grad)


# --- dtypes, threads, copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=dtype_id)
@pytest.mark.parametrize("variant", ["plain", "layer norm", "batch norm", "small values"])
def test_dtypes(isa: str, dtype: torch.dtype, variant: str) -> None:
    """Exact from the queries on, which are rounded to the dtype; the table of values may have another."""
    module, x = memory(variant).eval().to(dtype), rand(9, SIZE).to(dtype)
    truth = copy.deepcopy(module).double()
    rounding = torch.finfo(dtype).eps
    queries = module.queries(x)
    assert queries.dtype == dtype
    torch.testing.assert_close(queries.double(), query_by_hand(truth, x.double()), atol=30 * rounding, rtol=0)
    output, slots, weights = read_by_hand(truth, queries.double())
    got = module(x, return_aux=True)
    assert got.output.dtype == dtype and torch.equal(got.indices, slots)
    torch.testing.assert_close(got.weights.double(), weights, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.output.double(), output, atol=8 * rounding, rtol=4 * rounding)
    got.output.float().square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())
    if dtype == torch.float32:
        module.values = nn.Parameter(module.values.detach().bfloat16())
        assert module(x).dtype == torch.float32


def test_no_bit_depends_on_the_number_of_threads() -> None:
    torch.manual_seed(1)
    module = ProductKeyMemory(32, n_keys=64, heads=2, d_key=32, k=16, sparse_grad=True)
    x, results = torch.randn(300, 32), []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        queries = module.queries(x).detach()  # torch's own layers may differ in the last bit
        torch.set_num_threads(1)
        once = results[0][0] if results else queries
        torch.testing.assert_close(queries, once)
        torch.set_num_threads(threads)
        module.queries = lambda _, q=once: q.clone().requires_grad_()
        output = module(x)
        found = torch.autograd.grad(output.square().sum(), [module.keys, module.values])
        del module.queries
        results.append([once, output.detach(), found[0], found[1].to_dense()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("variant", ["layer norm", "batch norm", "small values"])
def test_state_dict_goes_round(variant: str) -> None:
    module, x = memory(variant).eval(), rand(5, SIZE)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = ProductKeyMemory(SIZE, **{**SMALL, **VARIANTS[variant]}).double().eval()
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), module(x)) and torch.equal(copy.deepcopy(module)(x), module(x))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes["keys"] == (HEADS, 2, N_KEYS, D_KEY // 2) and shapes["values"] == (N_KEYS**2, module.d_value)
    assert shapes["query.weight"] == (HEADS * D_KEY, SIZE)
    assert ("output.weight" in shapes) == (variant == "small values")


@pytest.mark.bf16
def test_machinery() -> None:
    truth = memory("small values", k=N_KEYS**2)  # no choice that rounding could turn
    module, x = copy.deepcopy(truth).float(), rand(3, 4, SIZE).float()
    expected = module(x)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(x), expected)
        gradients = [torch.autograd.grad(f(x).square().sum(), module.parameters()) for f in (compiled, module)]
        torch.testing.assert_close(*gradients)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected)
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=half):
            found = module(x)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 40 * torch.finfo(half).eps * expected.abs().max()

    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).sin().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        one = torch.func.grad(loss)(parameters, x[i])
        torch.testing.assert_close({k: v[i] for k, v in each.items()}, one)


# --- training --------------------------------------------------------------------------------------------------------


def test_a_sparse_gradient_is_the_dense_one() -> None:
    x, steps = rand(6, SIZE), []
    for sparse in (False, True):
        module = memory("layer norm", sparse_grad=sparse)
        read = module(x, return_aux=True)
        read.output.square().sum().backward()
        assert module.values.grad.is_sparse == sparse
        if sparse:
            rows = module.values.grad.coalesce().indices()[0]
            assert torch.equal(rows, read.indices.unique()) and len(rows) < N_KEYS**2
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        steps.append(module.state_dict())
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])
    module = memory("layer norm", sparse_grad=True)
    with pytest.raises(NotImplementedError, match="sparse_grad=True"):
        torch.autograd.grad(module(x).sum(), module.values, create_graph=True)
    with torch.no_grad():
        assert torch.equal(module(x), memory("layer norm")(x))


def test_sparse_adam_moves_the_rows_that_were_read() -> None:
    module, x = memory("plain", sparse_grad=True), rand(3, SIZE)
    before = module.values.detach().clone()
    optimizer = torch.optim.SparseAdam([module.values], lr=0.1)
    read = module(x, return_aux=True)
    read.output.square().sum().backward()
    optimizer.step()
    moved = (module.values != before).any(-1).nonzero().flatten()
    assert torch.equal(moved, read.indices.unique()) and len(moved) < N_KEYS**2


def test_learns_by_two_optimizers() -> None:
    """The layer stores one random vector for each of 40 inputs."""
    torch.manual_seed(0)
    module = ProductKeyMemory(16, n_keys=16, heads=2, d_key=16, k=8, query_norm="batch", sparse_grad=True)
    x, wanted = torch.randn(40, 16), torch.randn(40, 16)
    rest = [p for name, p in module.named_parameters() if name != "values"]
    optimizers = [torch.optim.Adam(rest, lr=1e-3), torch.optim.SparseAdam([module.values], lr=0.1)]
    losses = []
    for _ in range(80):
        loss = (module(x) - wanted).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 and losses[-1] < 0.05 * losses[0], losses[-1]


@pytest.mark.parametrize("norm_first", [False, True])
def test_is_the_feed_forward_of_torchs_encoder_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        SIZE, 2, dropout=0.0, activation=nn.Identity(), batch_first=True, norm_first=norm_first
    )
    layer.linear1, layer.linear2 = ProductKeyMemory(SIZE, **SMALL), nn.Identity()
    layer = loud(layer)
    x = rand(3, 4, SIZE).requires_grad_()

    def plain(x: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return layer.self_attn(x, x, x, need_weights=False)[0]

        def feed(x: Tensor) -> Tensor:
            rows = x.reshape(-1, SIZE)
            return read_by_hand(layer.linear1, query_by_hand(layer.linear1, rows))[0].reshape(x.shape)

        if norm_first:
            x = x + attend(layer.norm1(x))
            return x + feed(layer.norm2(x))
        x = layer.norm1(x + attend(x))
        return layer.norm2(x + feed(x))

    torch.testing.assert_close(layer(x), plain(x))
    leaves = [x, *layer.parameters()]
    for got, want in zip(*(torch.autograd.grad(f(x).square().sum(), leaves) for f in (layer, plain)), strict=True):
        torch.testing.assert_close(got, want)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():  # torch's fused path would go past the memory
        torch.testing.assert_close(encoder.layers[0](x), plain(x))
        torch.testing.assert_close(encoder(x), plain(plain(x)))


# --- dropout and first values ----------------------------------------------------------------------------------------


def test_each_dropout_is_at_its_place() -> None:
    x = rand(50, HEADS * D_KEY)
    options = {**SMALL, "query_norm": None, "bias": False}
    module = loud(ProductKeyMemory(HEADS * D_KEY, **options, input_dropout=0.25))
    with torch.no_grad():
        module.query.weight.copy_(torch.eye(HEADS * D_KEY))

    def share_of_zeros(got: Tensor, whole: Tensor) -> float:
        assert ((got == 0) | torch.isclose(got, whole / 0.75)).all()
        return float((got == 0).double().mean())

    expected = x.reshape(50, HEADS, 2, D_KEY // 2)
    assert abs(share_of_zeros(module.queries(x), expected) - 0.25) < 5 * math.sqrt(0.1875 / x.numel())
    module.input_dropout, module.query_dropout = 0.0, 0.25
    module.query.weight.detach().mul_(2)
    assert abs(share_of_zeros(module.queries(x), 2 * expected) - 0.25) < 5 * math.sqrt(0.1875 / x.numel())
    module.query_dropout, module.value_dropout = 0.0, 0.25
    whole = read_by_hand(module, query_by_hand(module, x))[0]
    assert abs(share_of_zeros(module(x), whole) - 0.25) < 5 * math.sqrt(0.1875 / x.numel())
    torch.manual_seed(3)
    first = module(x)
    assert not torch.equal(module(x), first)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    module.input_dropout = module.query_dropout = 0.5
    torch.testing.assert_close(module.eval()(x), whole)


def test_dropout_of_everything() -> None:
    x = rand(4, SIZE)
    assert memory("layer norm", value_dropout=1.0)(x).eq(0).all()
    module = memory("layer norm", query_dropout=1.0)  # all slots score 0: the first K of each head
    torch.testing.assert_close(module(x), HEADS * module.values[:K].mean(0).expand(4, -1))
    module = memory("plain", input_dropout=1.0)
    torch.testing.assert_close(module(x), module.eval()(torch.zeros_like(x)))


def test_begins_as_its_notes_say() -> None:
    torch.manual_seed(2)
    module = ProductKeyMemory(40, n_keys=60, heads=2, d_key=100, d_value=50)
    keys, values = module.keys.detach().clone(), module.values.detach().clone()
    bound = 50**-0.5
    assert 0.99 * bound < keys.abs().max() <= bound
    assert abs(keys.square().mean() / (bound**2 / 3) - 1) < 6 * math.sqrt(0.8 / keys.numel())
    assert abs(values.std() / bound - 1) < 6 / math.sqrt(2 * values.numel())
    assert abs((values / bound).pow(4).mean() - 3) < 6 * math.sqrt(96 / values.numel())
    assert module.norm.weight.eq(1).all() and module.norm.bias.eq(0).all()
    torch.manual_seed(7)
    module.reset_parameters()
    torch.manual_seed(7)
    again = nn.Linear(40, 200)
    assert torch.equal(module.query.weight, again.weight) and torch.equal(module.query.bias, again.bias)
    assert not torch.equal(module.keys, keys) and not torch.equal(module.values, values)


def test_is_of_the_usual_size() -> None:
    module = ProductKeyMemory(8)
    assert module.keys.shape == (4, 2, 512, 128) and module.values.shape == (512 * 512, 8)
    assert (module.k, module.query_norm, module.sparse_grad) == (32, "layer", False)
    assert "d_model=8, n_keys=512, heads=4, d_key=256, k=32" in repr(module)


# --- wrong use -------------------------------------------------------------------------------------------------------


def make(**change: Any) -> Callable[[], Any]:
    return lambda: ProductKeyMemory(**{"d_model": SIZE, **SMALL, **change})


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "d_model": (make(d_model=0), ValueError, "d_model: expected an integer > 0, got 0"),
    "d_model kind": (make(d_model=2.0), TypeError, r"d_model: expected an integer > 0, got 2\.0"),
    "n_keys": (make(n_keys=-1), ValueError, "n_keys: expected an integer > 0, got -1"),
    "heads": (make(heads=True), TypeError, "heads: expected an integer > 0, got True"),
    "d_key": (make(d_key=7), ValueError, r"d_key: expected an even number \(a query has two halves\), got 7"),
    "d_value": (make(d_value=0), ValueError, "d_value: expected an integer > 0, got 0"),
    "k": (make(k=0), ValueError, "k: expected an integer > 0, got 0"),
    "k above n^2": (make(k=26), ValueError, r"k: expected .* got 26 with n_keys \* n_keys = 25"),
    "k above 2048": (make(n_keys=50, k=2049), ValueError, "k: expected .* at most 2048, got 2049"),
    "query_norm": (make(query_norm="rms"), ValueError, "query_norm: expected one of None, 'batch', 'layer', got 'rms'"),
    "dropout": (make(query_dropout=1.5), ValueError, r"query_dropout: expected a probability in \[0, 1\], got 1\.5"),
    "sparse_grad": (make(sparse_grad=1), TypeError, "sparse_grad: expected True or False, got 1"),
    "x size": (
        lambda: memory()(rand(3, 7)),
        ValueError,
        r"x: expected \[..., d_model\] with d_model = 6, got \[3, 7\]",
    ),
    "x scalar": (lambda: memory()(rand()), ValueError, r"x: expected .* got \[\]"),
    "x kind": (lambda: memory()([1.0]), TypeError, r"x: expected a torch\.Tensor, got list"),
    "x dtype": (lambda: memory()(torch.ones(3, SIZE).long()), TypeError, "x: expected dtype"),
    "return_aux": (lambda: memory()(rand(3, SIZE), return_aux=1), TypeError, "return_aux: expected True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    call, exception, pattern = WRONG[name]
    with pytest.raises(exception, match=pattern):
        call()
