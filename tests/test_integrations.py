"""attnfast in other people's models: what is replaced, that it is exact, and that nothing is left behind."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as taken_before

import attnfast
from attnfast.integrations import Replacement, replace_modules, replacements, restore_modules, torch_sdpa
from attnfast.nn import MultiheadAttention


class Subclass(nn.MultiheadAttention):
    pass


def transformer() -> nn.Transformer:
    return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)


# ------------------------------------------------------------------------------------------------------ replace_modules


def test_everything_of_a_module_is_kept() -> None:
    model = transformer().to(torch.float64).eval()
    attention = model.encoder.layers[0].self_attn
    other = model.decoder.layers[0].self_attn
    other.in_proj_weight = attention.in_proj_weight  # tied
    seen: list[str] = []
    attention.register_forward_hook(lambda *_: seen.append("hook"))
    before = {name: (x, x.data_ptr()) for name, x in model.named_parameters(remove_duplicate=False)}
    assert replace_modules(model) is model
    assert model.encoder.layers[0].self_attn is attention and type(attention) is MultiheadAttention
    assert other.in_proj_weight is attention.in_proj_weight
    after = {name: (x, x.data_ptr()) for name, x in model.named_parameters(remove_duplicate=False)}
    assert list(after) == list(before) and all(after[n][0] is before[n][0] for n in before)
    assert not attention.training and attention.in_proj_weight.dtype == torch.float64
    model(torch.randn(1, 3, 16).double(), torch.randn(1, 2, 16).double())
    assert seen == ["hook"]


def test_hooks_of_every_kind_devices_and_modes_stay() -> None:
    model = nn.ModuleDict({"first": nn.MultiheadAttention(16, 2, batch_first=True),
                           "second": nn.MultiheadAttention(16, 2, batch_first=True).eval(),
                           "third": nn.MultiheadAttention(16, 2, device="meta", dtype=torch.bfloat16)})  # fmt: skip
    model.training = False  # the modes of a model need not agree
    attention = model["first"]
    attention.register_buffer("mark", torch.ones(3))
    for parameter in model["second"].parameters():
        parameter.requires_grad_(False)
    seen: list[str] = []
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    attention.register_forward_hook(lambda *_: seen.append("after"))
    attention.register_full_backward_pre_hook(lambda *_: seen.append("backward before"))
    attention.register_full_backward_hook(lambda *_: seen.append("backward after"))
    attention.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    attention.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    order = ["before", "after", "backward before", "backward after", "saved", "loaded"]

    def use() -> list[str]:
        seen.clear()
        x = torch.randn(1, 3, 16, requires_grad=True)
        attention(x, x, x, need_weights=False)[0].sum().backward()
        attention.load_state_dict(attention.state_dict())
        return seen.copy()

    kept = [(name, x, x.device, x.dtype, x.requires_grad) for name, x in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    assert use() == order
    replace_modules(model)
    assert use() == order and all(r.replaced for r in replacements(model))
    restore_modules(model)
    assert use() == order
    after = [(name, x, x.device, x.dtype, x.requires_grad) for name, x in model.named_parameters()]
    assert all(x[1] is y[1] and (x[0], *x[2:]) == (y[0], *y[2:]) for x, y in zip(after, kept, strict=True))
    assert [module.training for module in model.modules()] == modes == [False, True, True, False, False, True, True]
    assert torch.equal(attention.mark, torch.ones(3))  # type: ignore[arg-type]


def test_an_optimizer_made_before_goes_on_and_a_compiled_model_is_reached() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 16)
    compiled(x)
    replace_modules(compiled)
    assert type(model.self_attn) is MultiheadAttention
    before = model.self_attn.in_proj_weight.detach().clone()
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.self_attn.in_proj_weight, before)


@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_a_padded_batch_in_evaluation_comes_as_a_nested_tensor() -> None:
    torchs = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()
    ours = replace_modules(copy.deepcopy(torchs))
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [2], [4]])
    with torch.no_grad():
        expected, got = (model(x, src_key_padding_mask=padding) for model in (torchs, ours))
    torch.testing.assert_close(got[~padding], expected[~padding])


def test_the_same_numbers_and_the_same_training() -> None:
    torchs = transformer()
    ours = replace_modules(copy.deepcopy(torchs))
    source, target = torch.randn(4, 7, 16), torch.randn(4, 5, 16)
    for model in (torchs, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(source, target).square().mean().backward()
            optimizer.step()
    for x, y in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_restored_without_a_trace() -> None:
    model = transformer()
    states = [
        {name: value for name, value in vars(m).items() if name != "_forward_pre_hooks_with_kwargs"}
        for m in model.modules()
    ]
    keep = nn.TransformerEncoderLayer(16, 2)
    keep.self_attn.register_forward_pre_hook(lambda *_: None)
    for each in (model, copy.deepcopy(replace_modules(model)), pickle.loads(pickle.dumps(model)), keep):
        replace_modules(each)
        own = {id(hook) for hook in keep.self_attn._forward_pre_hooks.values()}
        assert restore_modules(each) is each
        for module in each.modules():
            assert type(module) is not MultiheadAttention
            if each is not keep:
                assert not module._forward_pre_hooks
    assert len(keep.self_attn._forward_pre_hooks) == 1 and own
    for module, state in zip(model.modules(), states, strict=True):
        assert {name: value for name, value in vars(module).items() if name in state}.keys() == state.keys()
    with torch.no_grad():  # torch's fast path is open again
        layer = restore_modules(replace_modules(nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.MultiheadAttention, "forward", lambda *_, **__: pytest.fail("not the fast path"))
            layer(torch.randn(1, 3, 16))


def test_twice_is_once() -> None:
    model = replace_modules(replace_modules(transformer()))
    for module in model.modules():
        assert len(module._forward_pre_hooks) == int(isinstance(module, MultiheadAttention))


def test_the_root_may_be_the_module() -> None:
    attention = nn.MultiheadAttention(16, 2)
    assert type(replace_modules(attention)) is MultiheadAttention
    assert replacements(attention) == [Replacement("", "torch.nn.MultiheadAttention", True, "")]


def test_the_report_names_what_was_left_and_why() -> None:
    patched = nn.MultiheadAttention(16, 2)
    patched.forward = patched.forward  # type: ignore[method-assign]
    model = nn.ModuleDict({"plain": nn.MultiheadAttention(16, 2), "sub": Subclass(16, 2), "patched": patched,
                           "linear": nn.Linear(2, 2)})  # fmt: skip
    assert [(r.name, r.replaced, r.reason) for r in replacements(model)] == [
        ("plain", False, "not replaced yet"),
        ("sub", False, "a subclass may compute something else"),
        ("patched", False, "its forward was replaced already"),
    ]
    replace_modules(model)
    assert [(r.name, r.replaced) for r in replacements(model)] == [("plain", True), ("sub", False), ("patched", False)]
    assert type(model["sub"]) is Subclass and type(patched) is nn.MultiheadAttention


@pytest.mark.parametrize("function", [replace_modules, restore_modules])
def test_only_modules_are_taken(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        function([nn.MultiheadAttention(16, 2)])


# ----------------------------------------------------------------------------------------------------------- torch_sdpa


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of attnfast's entries as they are called; torch's implementation is restored at the end."""
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("dot_attention_fwd", "dot_attention_bwd"):
        counted(torch_sdpa.ops, name)
    counted(torch_sdpa.functional, "scaled_dot_product_attention")
    yield calls
    torch_sdpa.disable()


def operands(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, 4, 9, 16, **options)
    return query, torch.randn(2, 4, 7, 16, **options), torch.randn(2, 4, 7, 16, **options)


def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> list[Tensor]:
    out = functional.scaled_dot_product_attention(query, key, value, **options)
    return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]


def calls_of_sdpa() -> dict[str, dict[str, Any]]:
    mask = torch.rand(9, 7) < 0.6
    mask[:, 0] = True
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "scale": {"scale": -0.3},
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(2, 1, 9, 7)},
    }


@pytest.mark.parametrize("name", list(calls_of_sdpa()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_torch_s_registry(count: list[str], name: str, dtype: torch.dtype) -> None:
    given, options = operands(dtype=dtype, requires_grad=True), calls_of_sdpa()[name]
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    expected = run(*given, **options)
    assert not torch_sdpa.is_enabled()
    torch_sdpa.enable()
    torch_sdpa.enable()
    assert torch_sdpa.is_enabled() and torch.nn.attention.current_flash_attention_impl() == "attnfast"
    got = run(*given, **options)
    assert count == ["dot_attention_fwd", "dot_attention_bwd"]
    torch_sdpa.disable()
    restored = run(*given, **options)
    assert len(count) == 2 and not torch_sdpa.is_enabled()
    assert torch.nn.attention.current_flash_attention_impl() is None
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    for x, y, again in zip(got, expected, restored, strict=True):
        torch.testing.assert_close(x, y, rtol=limit, atol=limit)
        assert torch.equal(again, y)


def test_the_logarithm_that_torch_s_operator_gives_is_the_natural_one(count: list[str]) -> None:
    query, key, value = operands()
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    expected = operator(query, key, value, 0.0, True)
    torch_sdpa.enable()
    got = operator(query, key, value, 0.0, True)
    assert count
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match=r"dropout_p: torch's CPU flash operator has no dropout, got 0.5"):
        operator(query, key, value, 0.5)


def test_compiled_code_takes_it_too(count: list[str]) -> None:
    given = operands(requires_grad=True)
    expected = run(*given, is_causal=True)
    torch_sdpa.enable()
    for x, y in zip(torch.compile(run)(*given, is_causal=True), expected, strict=True):
        torch.testing.assert_close(x, y)
    assert count == ["dot_attention_fwd", "dot_attention_bwd"]


def test_a_torch_without_the_registry_is_told_of_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"no torch.nn.attention.register_flash_attention_impl; .*override\(\)"):
        torch_sdpa.enable()


def test_override_reaches_every_call_and_ends(count: list[str]) -> None:
    query, key, value = (x.requires_grad_() for x in operands(dtype=torch.float64))
    mask = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    calls: dict[str, Any] = {
        "mask gradient": lambda: functional.scaled_dot_product_attention(query, key, value, mask),
        "3-D": lambda: functional.scaled_dot_product_attention(query[0], key[0], value[0], scale=0.5),
        "value size": lambda: functional.scaled_dot_product_attention(query, key, value[..., :3]),
        "strides": lambda: functional.scaled_dot_product_attention(
            query.transpose(2, 3).contiguous().transpose(2, 3), key, value, is_causal=True),
        "taken before": lambda: taken_before(query, key, value),
    }  # fmt: skip
    expected = {name: call() for name, call in calls.items()}
    assert count == []
    with torch_sdpa.override():
        for name, call in calls.items():
            torch.testing.assert_close(call(), expected[name])
            assert count.pop(0) == "scaled_dot_product_attention", name
            count.clear()
        dropped = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        torch.manual_seed(0)
    assert dropped.shape == query.shape and count
    count.clear()
    calls["3-D"]()
    assert count == []


def test_override_is_of_the_thread_that_entered_it(count: list[str]) -> None:
    query, key, value = operands()
    with torch_sdpa.override():
        other = threading.Thread(target=functional.scaled_dot_product_attention, args=(query, key, value))
        other.start()
        other.join()
        assert count == []
    with pytest.raises(ZeroDivisionError), torch_sdpa.override():
        raise ZeroDivisionError
    functional.scaled_dot_product_attention(query, key, value)
    assert count == []


def test_nothing_is_active_on_import() -> None:
    assert attnfast.integrations.torch_sdpa is torch_sdpa
    assert not torch_sdpa.is_enabled()
    assert type(nn.TransformerEncoderLayer(16, 2).self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("module", [torch_sdpa, importlib.import_module("attnfast.integrations._replace")],
                         ids=lambda module: module.__name__)  # fmt: skip
def test_examples_run(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.failed == 0 and results.attempted > 3
