"""torch's machinery around the operators: torch.func, forward AD, compile, export, modes, hooks, checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attnfast
from attnfast import autograd, ops, reference
from attnfast.ops import DotAttentionOptions

SEED = torch.tensor([99, 7])


def operands(*shape: int, tokens_k: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    key_shape = (*shape[:-2], shape[-2] if tokens_k is None else tokens_k, shape[-1])
    return [torch.randn(s, dtype=dtype) for s in (shape, key_shape, key_shape)]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected)


def loss(attention: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """A scalar that depends on out, lse and the weights' column sums."""

    def call(query: Tensor, key: Tensor, value: Tensor, **tensors: Any) -> Tensor:
        result = attention(query, key, value, return_lse=True, return_weights="column_sum", **options, **tensors)
        return result.output.square().sum() + result.lse.sin().sum() + result.weights.square().sum()

    return call


FUSED, PLAIN = loss(attnfast.attention, causal="top_left"), loss(reference.attention, causal="top_left")


class _Ops(TorchDispatchMode):
    """Counts the attnfast operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "attnfast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


# --- torch.func ------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: grad(f, (0, 1, 2)),
    "vjp": lambda f: lambda *x: vjp(f, *x)[1](torch.tensor(0.5, dtype=torch.float64)),
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "hessian": lambda f: hessian(f, (0, 2)),
    "jacrev_of_jacrev": lambda f: jacrev(jacrev(f, 1)),
    "grad_of_grad": lambda f: grad(lambda *x: grad(f)(*x).square().sum(), (0, 1, 2)),
    "jvp": lambda f: lambda *x: jvp(f, x, tuple(t.cos() for t in x)),
    "jvp_of_grad": lambda f: lambda *x: jvp(grad(f), x, tuple(t.cos() for t in x)),
    "linearize": lambda f: lambda *x: linearize(f, *x)[1](*(t.cos() for t in x)),
    "functionalize": lambda f: torch.func.functionalize(f),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str) -> None:
    q, k, v = operands(1, 2, 3, 2, tokens_k=4)
    assert_same(TRANSFORMS[name](FUSED)(q, k, v), TRANSFORMS[name](PLAIN)(q, k, v))


def test_jacobian_of_a_whole_output() -> None:
    q, k, v = operands(2, 2, 3, 2)
    f, g = (lambda *x, a=a: a(*x, softcap=2.0) for a in (attnfast.attention, reference.attention))
    assert_same(jacrev(f, (0, 1, 2))(q, k, v), jacrev(g, (0, 1, 2))(q, k, v))
    assert_same(jacfwd(f, (0, 1, 2))(q, k, v), jacrev(g, (0, 1, 2))(q, k, v))


EXTRA_DIMS = {  # of query, key, value, bias, mask, sink
    "all": (0, 0, 0, 0, 0, 0),
    "query": (0, None, None, None, None, None),
    "key": (None, 0, None, None, None, None),
    "value": (None, None, 0, None, None, None),
    "operands": (0, 0, 0, None, None, None),
    "bias": (None, None, None, 0, None, None),
    "mask": (0, 0, 0, None, 0, None),
    "sink": (0, 0, 0, None, None, 0),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", EXTRA_DIMS)
def test_vmap_and_per_sample_gradients(name: str, batch: int) -> None:
    q, k, v = operands(3, batch, 2, 3, 2, tokens_k=4)
    bias, sink = torch.randn(3, 1, 2, 1, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    mask = torch.rand(3, batch, 1, 3, 4) > 0.3
    dims = EXTRA_DIMS[name]
    args = [x if d == 0 else x[0] for x, d in zip((q, k, v, bias, mask, sink), dims, strict=True)]

    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, b, m, s: f(q, k, v, bias=b, mask=m, sink=s)

    assert_same(vmap(call(FUSED), dims)(*args), vmap(call(PLAIN), dims)(*args))
    which = (0, 1, 2, 3, 5)
    assert_same(vmap(grad(call(FUSED), which), dims)(*args), vmap(grad(call(PLAIN), which), dims)(*args))


@pytest.mark.parametrize("dims", [(1, 2, 3), (4, 0, 1), (-1, -2, -3)])
def test_vmap_over_any_dimension(dims: tuple[int, int, int]) -> None:
    q, k, v = operands(3, 2, 2, 4, 5)
    args = [x.movedim(0, d) for x, d in zip((q, k, v), dims, strict=True)]
    assert_same(vmap(attnfast.attention, dims, out_dims=2)(*args), vmap(reference.attention, out_dims=2)(q, k, v))
    assert_same(vmap(grad(FUSED), dims)(*args), vmap(grad(PLAIN))(q, k, v))


def test_vmap_of_vmap_and_packed_input() -> None:
    q, k, v = operands(2, 3, 1, 2, 4, 5)
    assert_same(vmap(vmap(FUSED))(q, k, v), vmap(vmap(PLAIN))(q, k, v))
    assert_same(vmap(vmap(grad(FUSED), in_dims=(0, None, 0)), in_dims=(0, None, 0))(q, k[0, 0], v),
                vmap(vmap(grad(PLAIN), in_dims=(0, None, 0)), in_dims=(0, None, 0))(q, k[0, 0], v))  # fmt: skip
    cu = torch.tensor([0, 1, 4])
    q, k, v = operands(3, 4, 2, 5)

    def run(attention: Callable[..., Any]) -> Any:
        f = lambda q, k, v: attention(q, k, v, cu, cu, 3, 3)  # noqa: E731
        return vmap(f)(q, k, v), vmap(grad(lambda *x: f(*x).sin().sum(), (0, 1, 2)))(q, k, v)

    assert_same(run(attnfast.varlen_attention), run(reference.varlen_attention))


def test_vmap_without_samples() -> None:
    q, k, v = operands(0, 1, 2, 3, 4)
    assert vmap(attnfast.attention)(q, k, v).shape == (0, 1, 2, 3, 4)


def test_vmap_runs_one_kernel_and_multiplies_nothing_big() -> None:
    """Mapped operands fold into the batch; a shared mask with its own batch runs the samples one by one."""
    q, k, v = operands(8, 2, 2, 16, 2, dtype=torch.float32)
    with _Ops() as seen:
        vmap(attnfast.attention)(q, k, v)
    assert seen.names == ["dot_attention_fwd"]
    with _Ops() as seen:  # B = 1 folds as a view even though the keys are shared
        vmap(attnfast.attention, (0, None, None))(q[:, :1], k[0, :1], v[0, :1])
    assert seen.names == ["dot_attention_fwd"]
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    with _Ops() as seen:
        vmap(lambda q, k, v: attnfast.attention(q, k, v, mask=mask))(q[..., :1], k[..., :1], v[..., :1])
    assert seen.names == ["dot_attention_fwd"] * 8
    with _Ops() as seen:
        vmap(lambda q, k, v: attnfast.attention(q, k, v, mask=mask[:1]))(q, k, v)
    assert seen.names == ["dot_attention_fwd"]


def test_vmap_dropout_follows_the_randomness_mode() -> None:
    q, k, v = (x.expand(3, 2, 2, 8, 4) for x in operands(1, 2, 2, 8, 4))
    f = lambda q, k, v: attnfast.attention(q, k, v, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(4)
    single = f(q[0], k[0], v[0])
    torch.manual_seed(4)
    same = vmap(f, randomness="same")(q, k, v)
    assert all(torch.equal(x, single) for x in same)
    different = vmap(f, randomness="different")(q, k, v)
    assert not torch.equal(different[0], different[1]) and not torch.equal(different[1], different[2])
    with pytest.raises(RuntimeError, match="random"):
        vmap(f)(q, k, v)


def test_torch_func_inside_of_autograd() -> None:
    """Meta-learning: an inner torch.func.grad, per sample, differentiated by the ordinary engine."""

    def outer(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        q, k, v = leaves(*operands(2, 1, 2, 3, 2))
        inner = vmap(grad(f, (0, 1)))(q, k, v)
        return torch.autograd.grad(sum(x.square().sum() for x in inner), (q, k, v))

    assert_same(outer(FUSED), outer(PLAIN))


def test_double_backward_of_vmap() -> None:
    def outer(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        q, k, v = leaves(*operands(2, 2, 2, 3, 2))
        first = torch.autograd.grad(vmap(f)(q, k, v).sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))

    assert_same(outer(FUSED), outer(PLAIN))


@pytest.mark.parametrize("create_graph", [False, True])
def test_is_grads_batched(create_graph: bool) -> None:
    def run(attention: Callable[..., Tensor]) -> Any:
        torch.manual_seed(1)
        q, k, v = leaves(*operands(2, 2, 3, 2))
        out = attention(q, k, v)
        probes = torch.randn(5, *out.shape, dtype=out.dtype)
        grads = torch.autograd.grad(out, (q, k, v), probes, is_grads_batched=True, create_graph=create_graph)
        if not create_graph:
            return grads
        return torch.autograd.grad(sum(x.square().sum() for x in grads), (q, k, v))

    assert_same(run(attnfast.attention), run(reference.attention))


# --- forward mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4])
def test_dual_tensors_carry_their_tangent(which: int) -> None:
    q, k, v = operands(2, 2, 3, 4)
    bias, sink = torch.randn(1, 2, 1, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def run(attention: Callable[..., Any]) -> Any:
        with fwad.dual_level():
            args = [q, k, v, bias, sink]
            args[which] = fwad.make_dual(args[which], args[which].cos())
            found = attention(*args[:3], bias=args[3], sink=args[4], causal="bottom_right", return_lse=True)
            return [tuple(fwad.unpack_dual(x)) for x in found[:2]]

    found, expected = run(attnfast.attention), run(reference.attention)
    assert_same(found[1], expected[1])
    assert_same(found[0][0], expected[0][0])
    for a, b in zip(found[0], expected[0], strict=True):
        assert b is not None and (which != 2 or a is not None)
        assert_same(a, b)


def test_dual_tensor_that_also_requires_grad() -> None:
    def run(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        q, k, v = leaves(*operands(2, 2, 3, 4))
        with fwad.dual_level():
            tangent = fwad.unpack_dual(attention(fwad.make_dual(q, q.detach().cos()), k, v)).tangent
        return torch.autograd.grad(tangent.sum(), (q, k, v))

    assert_same(run(attnfast.attention), run(reference.attention))


def test_operator_refuses_what_it_cannot_differentiate() -> None:
    q, k, v = operands(1, 1, 2, 2)
    call = lambda q: torch.ops.attnfast.dot_attention_fwd(q, k, v, None, None, None, None, *DotAttentionOptions())[0]  # noqa: E731
    with fwad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        call(fwad.make_dual(q, q))
    with pytest.raises(NotImplementedError, match="cannot be differentiated by"):
        grad(lambda q: call(q).sum())(q)
    with fwad.dual_level():  # a level without tangents is no reason
        assert_same(call(q), attnfast.attention(q, k, v, scale=1.0))


# --- the route -------------------------------------------------------------------------------------------------------


def test_plan_names_the_route() -> None:
    q, k, v = operands(1, 1, 2, 2)
    seen: list[str] = []

    def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(autograd.plan(q, k, v))
        return attnfast.attention(q, k, v).sum()

    record(q, k, v)
    record(q.clone().requires_grad_(), k, v)
    with torch.no_grad():
        record(q.clone().requires_grad_(), k, v)
    with _Ops():
        record(q, k, v)
    vmap(record)(q, k, v)
    grad(record)(q, k, v)
    vmap(grad(record))(q[None], k[None], v[None])
    grad(lambda q: grad(record)(q, k, v).sum())(q)
    jvp(record, (q, k, v), (q, k, v))
    hessian(record)(q, k, v)
    with fwad.dual_level():
        record(fwad.make_dual(q, q), k, v)
        record(q, k, v)
    expected = ["kernel", "function", "kernel", "operator", "operator", "operator", "operator"]
    assert seen[:7] == expected
    assert set(seen[7:-1]) == {"reference"} and seen[-1] == "kernel"


# --- opcheck ---------------------------------------------------------------------------------------------------------

Options = DotAttentionOptions
OP_SAMPLES: dict[str, tuple[Options, dict[str, Any]]] = {
    "plain": (Options(), {}),
    "no_grad": (Options(causal=1), {"requires_grad": False}),
    "bf16": (Options(causal=2, window_left=1), {"dtype": torch.bfloat16, "D_v": 6, "extras": True}),
    "bias_sink": (Options(softcap=2.0, alibi_slopes=torch.ones(2, 4)), {"dtype": torch.float32, "extras": True}),
    "full": (Options(weights_mode=1), {}),
    "column_sum": (Options(weights_mode=2), {"extras": True}),
    "row_max": (Options(weights_mode=3), {"D_v": 3}),
    "dropout": (Options(dropout_p=0.5, seed=SEED, weights_mode=1), {}),
    "mask": (Options(mask=torch.eye(3, 5).bool()[None, None], key_lengths=torch.tensor([3, 5])), {}),
    "packed": (
        Options(cu_seqlens_q=torch.tensor([0, 1, 3]), cu_seqlens_k=torch.tensor([0, 2, 5]), weights_mode=1),
        {"B": 1, "extras": True},
    ),
    "local": (Options(window_bounds=torch.tensor([[[[0, 3], [1, 4], [5, 0]]]]), prior_sigma=1.5, weights_mode=2), {}),
    "token_major": (Options(), {"token_major": True}),
}


def op_arguments(
    options: Options, dtype: torch.dtype = torch.float64, requires_grad: bool = True, B: int = 2, D_v: int = 4,
    extras: bool = False, token_major: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64).to(kind)
        if token_major and len(shape) == 4:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.requires_grad_(requires_grad)

    real = torch.float64 if dtype == torch.float64 else torch.float32
    more = (draw(1, 4, 1, 5), draw(B, 1, 3, 1), draw(4, kind=real)) if extras else (None, None, None)
    center = draw(B, 4, 3, kind=real) if options.prior_sigma else None
    return (draw(B, 4, 3, 4), draw(B, 2, 5, 4), draw(B, 2, 5, D_v), *more, center, *options)


@pytest.mark.parametrize("name", OP_SAMPLES)
def test_opcheck_forward(name: str) -> None:
    options, shape = OP_SAMPLES[name]
    torch.library.opcheck(torch.ops.attnfast.dot_attention_fwd.default, op_arguments(options, **shape))


@pytest.mark.parametrize("name", OP_SAMPLES)
def test_opcheck_backward(name: str) -> None:
    options, shape = OP_SAMPLES[name]
    args = op_arguments(options, **shape)
    results = [x.detach() for x in torch.ops.attnfast.dot_attention_fwd(*args)]
    grads = [torch.randn_like(x) if x.ndim > 1 else None for x in results[:3]]
    needs = [x is not None for x in args[:7]]
    everything = (*grads, *args[:3], *results, *args[3:7], needs, *args[7:])
    slow = ("test_aot_dispatch_dynamic",) if name == "packed" else ()  # it traces the double backward, for seconds
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", *slow)
    torch.library.opcheck(torch.ops.attnfast.dot_attention_bwd.default, everything, test_utils=utils)


def test_operator_used_directly_is_differentiable_twice() -> None:
    args = op_arguments(Options(causal=1, weights_mode=2), extras=True)
    inputs = list(args[:6])

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.attnfast.dot_attention_fwd(*tensors, *args[6:])[:3])

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


# --- compile and export ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    out, lse, weights = attnfast.attention(
        query.sin(), key, value, bias=bias, causal="top_left", return_lse=True, return_weights="row_max"
    )
    return attnfast.scaled_dot_product_attention(out, key, value, is_causal=True).sum() + lse.sum() + weights.sum()


def compare_compiled(compiled: Callable[..., Tensor], tokens: int) -> None:
    q, k, v = leaves(*operands(2, 2, tokens, 4, dtype=torch.float32))
    (bias,) = leaves(torch.randn(1, 2, 1, tokens))
    out = compiled(q, k, v, bias)
    assert_same(out, step(q, k, v, bias))
    inputs = (q, k, v, bias)
    assert_same(torch.autograd.grad(out, inputs), torch.autograd.grad(step(*inputs), inputs))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend: str) -> None:
    compare_compiled(torch.compile(step, backend=backend, fullgraph=True), 5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_dynamic_shapes_without_recompiling() -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    compare_compiled(compiled, 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare_compiled(compiled, 7)
        compare_compiled(compiled, 11)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_dropout_and_transforms() -> None:
    q, k, v = operands(2, 2, 5, 4)
    drop = lambda q, k, v: attnfast.attention(q, k, v, dropout_p=0.5)  # noqa: E731
    compiled = torch.compile(drop, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    expected = drop(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(compiled(q, k, v), expected)
    x = (q[:, None], k[:, None], v[:, None])
    for transform in (lambda f: vmap(grad(f)), lambda f: lambda *y: jvp(f, y, y)):
        assert_same(torch.compile(transform(FUSED), backend="aot_eager", fullgraph=True)(*x), transform(PLAIN)(*x))


class _Module(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attnfast.attention(query, key, value, causal="bottom_right")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_lengths(strict: bool) -> None:
    q, k, v = operands(2, 2, 6, 4, tokens_k=9)
    tokens = torch.export.Dim("tokens_k")
    shapes = {"query": {2: torch.export.Dim("tokens_q")}, "key": {2: tokens}, "value": {2: tokens}}
    program = torch.export.export(_Module(), (q, k, v), dynamic_shapes=shapes, strict=strict)
    assert sum("dot_attention_fwd" in str(node.target) for node in program.graph.nodes) == 1
    q, k, v = operands(2, 2, 3, 4, tokens_k=5)
    assert_same(program.module()(q, k, v), reference.attention(q, k, v, causal="bottom_right"))


def test_make_fx_traces_forward_and_backward() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = operands(1, 2, 3, 4)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = leaves(q, k, v)
        return torch.autograd.grad(attnfast.attention(q, k, v).sum(), (q, k, v))

    traced = make_fx(both)(q, k, v)
    assert "dot_attention_fwd" in traced.code and "dot_attention_bwd" in traced.code
    assert_same(traced(k, v, q), both(k, v, q))


# --- modes, subclasses, hooks ----------------------------------------------------------------------------------------


def test_dispatch_mode_sees_forward_backward_and_double_backward() -> None:
    q, k, v = leaves(*operands(1, 2, 3, 4))
    with _Ops() as seen:
        first = torch.autograd.grad(attnfast.attention(q, k, v).sum(), (q, k, v))
    assert seen.names == ["dot_attention_fwd", "dot_attention_bwd"]
    out = attnfast.attention(q, k, v)
    with _Ops() as seen:  # a mode around the backward alone
        assert_same(torch.autograd.grad(out.sum(), (q, k, v)), first)
    assert seen.names == ["dot_attention_bwd"]


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    real = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands(2, 2, 3, 4)]
    expected = attnfast.attention(*real, return_lse=True, return_weights=True)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x).requires_grad_() for x in real)
        found = attnfast.attention(q, k, v, return_lse=True, return_weights=True)
        for a, b in zip(found, expected, strict=True):
            assert isinstance(a, FakeTensor)
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        for a, x in zip(torch.autograd.grad(found.output.sum(), (q, k, v)), real, strict=True):
            assert isinstance(a, FakeTensor) and a.shape == x.shape


class _Tagged(torch.Tensor):
    """A subclass that survives operations."""


def test_tensor_subclass_goes_through_the_operator() -> None:
    q, k, v = operands(1, 2, 3, 4)
    out = attnfast.attention(q.as_subclass(_Tagged), k, v)
    assert type(out) is _Tagged
    assert_same(out.as_subclass(Tensor), attnfast.attention(q, k, v))
    parameter = torch.nn.Parameter(q)
    assert autograd.plan(parameter, k, v) == "function" and type(attnfast.attention(parameter, k, v)) is Tensor


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_dropout(use_reentrant: bool) -> None:
    f = lambda q, k, v: attnfast.attention(q, k, v, dropout_p=0.5, causal="top_left")  # noqa: E731
    results = []
    for wrap in (f, lambda *x: checkpoint(f, *x, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        q, k, v = leaves(*operands(1, 2, 8, 4))
        out = wrap(q, k, v)
        torch.rand(3)  # the generator moves on before the recomputation
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saved_tensor_hooks() -> None:
    q, k, v = leaves(*operands(1, 2, 3, 4))
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    packed: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(tuple(x.shape))
        return x * 2 if x.is_floating_point() else x

    expected = torch.autograd.grad(attnfast.attention(q, k, v, mask=mask).sum(), (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x / 2 if x.is_floating_point() else x):
        out = attnfast.attention(q, k, v, mask=mask)
    assert_same(torch.autograd.grad(out.sum(), (q, k, v)), expected)
    assert packed.count((1, 2, 3, 4)) == 4 and (1, 2, 3) in packed and (1, 1, 1, 3) in packed
    with torch.autograd.graph.save_on_cpu():
        out = attnfast.attention(q, k, v, mask=mask)
    assert_same(torch.autograd.grad(out.sum(), (q, k, v)), expected)


def test_saved_tensors_are_linear_in_the_length() -> None:
    q, k, v = leaves(*operands(1, 2, 64, 4))
    saved = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attnfast.attention(q, k, v, dropout_p=0.1, causal="top_left")
    assert saved <= 4 * q.numel() + 2 * 64 + 2


def test_autocast() -> None:
    q, k, v = leaves(*operands(1, 2, 3, 4, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attnfast.attention(q, k, v)
        torch_out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.dtype == torch_out.dtype == torch.bfloat16
    first = torch.autograd.grad(out.float().square().sum(), (q, k, v), create_graph=True)
    assert all(x.dtype == torch.float32 for x in first)
    penalty = sum(x.square().sum() for x in first)
    outside = torch.autograd.grad(penalty, (q, k, v), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the double backward keeps its precision in here
        inside = torch.autograd.grad(penalty, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_inference_mode() -> None:
    q, k, v = leaves(*operands(1, 2, 3, 4))
    expected = attnfast.attention(q, k, v)
    with torch.inference_mode():
        out = attnfast.attention(q, k, v)
    assert out.is_inference() and not out.requires_grad
    assert_same(out, expected.detach())
    frozen = attnfast.attention(out, out, out)
    assert_same(frozen, reference.attention(*(out.clone() for _ in range(3))))


def test_seed_follows_manual_seed() -> None:
    torch.manual_seed(5)
    first, second = ops.draw_seed(), ops.draw_seed()
    torch.manual_seed(5)
    assert torch.equal(ops.draw_seed(), first) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,)
