"""Tiny random models of diffusers, from configurations, with attnfast and with their own processors.

Nothing is downloaded. Outputs and gradients are compared, in float32.
"""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast.integrations import Replacement
from attnfast.integrations import diffusers as ours

diffusers = pytest.importorskip("diffusers")
theirs = pytest.importorskip("diffusers.models.attention_processor")
dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

unet: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "norm_num_groups": 8, "attention_head_dim": 8, "cross_attention_dim": 12,
}  # fmt: skip
cross = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
simple = {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
          "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
          "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D")}  # fmt: skip
patches: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8,
    "patch_size": 2,
}  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def conditioned() -> dict[str, Any]:
    seen = torch.ones(2, 5)
    seen[1, 3:] = 0
    return {"timestep": torch.tensor([1, 7]), "encoder_hidden_states": noise(2, 5, 12),
            "encoder_attention_mask": seen}  # fmt: skip


def flux() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 5, 12), "pooled_projections": noise(2, 6),
        "timestep": torch.tensor([0.1, 0.7]), "img_ids": torch.arange(48.0).view(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


# The model's class, its configuration, its input.
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "unet": ("UNet2DConditionModel", {**unet, **cross}, lambda: {"sample": noise(2, 4, 8, 8), **conditioned()}),
    "unet, upcast": ("UNet2DConditionModel", {**unet, **cross, "upcast_attention": True},
                     lambda: {"sample": noise(2, 4, 8, 8), **conditioned()}),
    "unet, added keys": ("UNet2DConditionModel", {**unet, **simple},
                         lambda: {"sample": noise(2, 4, 8, 8), **conditioned()}),
    "unet, only cross": ("UNet2DConditionModel",
                         {**unet, **simple, "mid_block_only_cross_attention": True, "only_cross_attention": True},
                         lambda: {"sample": noise(2, 4, 8, 8), **conditioned(), "encoder_attention_mask": None}),
    "unet, attention on images": ("UNet2DModel",
                                  {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1,
                                   "norm_num_groups": 8, "attention_head_dim": 8,
                                   "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
                                   "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
                                  lambda: {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor([1, 7])}),
    "pixart": ("PixArtTransformer2DModel",
               {**patches, "cross_attention_dim": 16, "caption_channels": 12, "use_additional_conditions": False},
               lambda: {"hidden_states": noise(2, 4, 8, 8), **conditioned(),
                        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    "dit": ("DiTTransformer2DModel", {**patches, "num_embeds_ada_norm": 10},
            lambda: {"hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([1, 7]),
                     "class_labels": torch.tensor([3, 4])}),
    "flux": ("FluxTransformer2DModel",
             {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
              "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 6,
              "axes_dims_rope": (4, 4, 8)}, flux),
}  # fmt: skip


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    ours.unregister()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of attnfast's functions as they are called from the processors and the backend."""
    seen: list[str] = []

    def counted(name: str) -> None:
        original = getattr(ours.functional, name)
        monkeypatch.setattr(ours.functional, name, lambda *a, **k: (seen.append(name), original(*a, **k))[1])

    counted("attention")
    counted("scaled_dot_product_attention")
    return seen


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    kind, options, _ = MODELS[name]
    model = getattr(diffusers, kind)(**options).eval()
    for parameter in model.parameters():  # output layers and gates begin as zero
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def run(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and gradients of a random function of it."""
    name = next(iter(given))
    given = {**given, name: given[name].clone().requires_grad_()}
    out = model(**given).sample
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad((out * probe).sum(), [given[name], *model.parameters()], allow_unused=True)
    return {"output": out, **{n: g for n, g in zip(["input", *names], grads, strict=True) if g is not None}}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys() and len(got) > 4
    for key, x in expected.items():
        limit = (1e-5 if key == "output" else 1e-4) * max(x.abs().max().item(), 0.05)
        torch.testing.assert_close(got[key], x, rtol=0, atol=limit, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, calls: list[str]) -> None:
    theirs = made(name)
    model = ours.replace_attention(copy.deepcopy(theirs))
    given = MODELS[name][2]()
    expected = run(theirs, given)
    assert not calls
    got = run(model, given)
    assert len(calls) == len(ours.replacements(model)) >= 2
    assert set(calls) == {"scaled_dot_product_attention" if name == "flux" else "attention"}
    assert all(r.replaced for r in ours.replacements(model))
    assert_same(got, expected)


@pytest.mark.parametrize("name", ["unet", "unet, added keys", "flux"])
def test_restored_exactly(name: str) -> None:
    model, given = made(name), MODELS[name][2]()
    before = [module.processor for module in model.modules() if hasattr(module, "get_processor")]
    states = [dict(vars(processor)) for processor in before]
    expected = model(**given).sample
    found = ours.replacements(model)
    assert {(r.replaced, r.reason) for r in found} == {(False, "not replaced yet")}
    ours.replace_attention(ours.replace_attention(model))  # twice is once
    assert [r.kind for r in ours.replacements(model)] == [r.kind for r in found]
    again = copy.deepcopy(model)
    for each in (model, again):
        assert ours.restore_attention(each) is each
        assert torch.equal(each(**given).sample, expected)
        assert ours.replacements(each) == found
    after = [module.processor for module in model.modules() if hasattr(module, "get_processor")]
    assert all(x is y for x, y in zip(after, before, strict=True))
    assert [vars(processor) for processor in after] == states


# ----------------------------------------------------------------------------------------------------------- processors

plain: dict[str, Any] = {"query_dim": 16, "heads": 2, "dim_head": 8}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "no scale": {"scale_qk": False},
    "cross": {"cross_attention_dim": 12},
    "layer norm": {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
    "group norm": {"cross_attention_dim": 12, "cross_attention_norm": "group_norm", "norm_num_groups": 4,
                   "cross_attention_norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
    "qk norm": {"qk_norm": "layer_norm", "eps": 1e-6},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "spatial norm": {"spatial_norm_dim": 6, "query_dim": 32},
}  # fmt: skip


def attention_of(name: str) -> Any:
    torch.manual_seed(2)
    attention = theirs.Attention(**{**plain, **ATTENTIONS[name]})
    for parameter in attention.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return attention


MASKS = ("none", "row", "full", "heads", "bool")


# The stock processor of "no scale" adds its mask, and cannot add a boolean one.
@pytest.mark.parametrize(("name", "masked"), [(name, masked) for name in ATTENTIONS for masked in MASKS
                                              if (name, masked) != ("no scale", "bool")])  # fmt: skip
def test_what_a_module_may_have(name: str, masked: str) -> None:
    attention = attention_of(name)
    x, memory = noise(3, 4, 16), noise(3, 5, 12) if "cross_attention_dim" in ATTENTIONS[name] else None
    keys = 4 if memory is None else 5
    mask = {"none": None, "row": 2 * noise(3, 1, keys), "full": 2 * noise(3, 4, keys), "heads": noise(6, 4, keys),
            "bool": noise(3, 4, keys) < 0.8}[masked]  # fmt: skip
    if masked == "bool":
        assert mask is not None and not mask.all()
        mask[..., 0] = True
    options: dict[str, Any] = {"encoder_hidden_states": memory, "attention_mask": mask}
    if name == "spatial norm":
        options["temb"] = noise(3, 6, 2, 2)
        x = noise(3, 32, 2, 2)
    leaf = x.clone().requires_grad_()
    results = []
    stock = type(attention.processor)
    assert stock is (theirs.AttnProcessor if name == "no scale" else theirs.AttnProcessor2_0)
    for processor in (stock(), ours.AttnProcessor()):
        attention.set_processor(processor)
        out = attention(leaf, **options)
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        results.append((out, *torch.autograd.grad((out * probe).sum(), (leaf, *attention.parameters()))))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upcast", [False, True])
def test_half_types_are_upcast_in_any_case(dtype: torch.dtype, upcast: bool) -> None:
    """Scores far apart, which rounded to a half type would be wrong by more than what is allowed."""
    attention = theirs.Attention(**plain, upcast_attention=upcast, upcast_softmax=upcast)
    with torch.no_grad():
        attention.to_q.weight.mul_(8.0)
    x, mask = noise(2, 9, 16), noise(2, 1, 9)
    half = copy.deepcopy(attention).to(dtype)
    rounded = copy.deepcopy(half).double()
    truth = rounded(x.to(dtype).double(), attention_mask=mask.to(dtype).double())
    errors = []
    for processor in (theirs.AttnProcessor2_0(), ours.AttnProcessor()):
        half.set_processor(processor)
        out = half(x.to(dtype), attention_mask=mask.to(dtype))
        assert out.dtype == dtype
        errors.append((out.double() - truth).abs().max().item())
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps * truth.abs().max().item()


def test_what_is_not_implemented_is_an_error() -> None:
    attention = attention_of("plain")
    attention.set_processor(ours.AttnProcessor())
    added = theirs.Attention(**plain, added_kv_proj_dim=12, norm_num_groups=4, bias=True)
    added.set_processor(ours.AttnAddedKVProcessor())
    for module, x in ((attention, noise(1, 4, 16)), (added, noise(1, 16, 4))):
        for name in ("ip_adapter_masks", "ip_hidden_states"):
            with pytest.raises(NotImplementedError, match="IP-Adapters have processors of their own"):
                module(x, **{name: noise(1, 2)})


class Unknown(theirs.AttnProcessor2_0):  # type: ignore[misc,name-defined]
    pass


def test_models_with_unknown_processors_are_refused_or_left_in_part() -> None:
    model = nn.ModuleDict({"plain": attention_of("plain"), "unknown": attention_of("plain"),
                           "unscaled": attention_of("no scale"), "normed": attention_of("qk norm")})  # fmt: skip
    model["unknown"].set_processor(Unknown())  # type: ignore[operator]
    model["unscaled"].set_processor(theirs.AttnProcessor2_0())  # type: ignore[operator]
    model["normed"].set_processor(theirs.AttnProcessor())  # type: ignore[operator]
    message = (r"nothing for unknown \(Unknown: a processor that computes something else\), unscaled \(AttnProcessor2_0"
               r": .*module's scale\), normed \(AttnProcessor: .*norm_q\); with partial=True")  # fmt: skip
    with pytest.raises(NotImplementedError, match=message):
        ours.replace_attention(model)
    assert not any(r.replaced for r in ours.replacements(model))
    ours.replace_attention(model, partial=True)
    assert ours.replacements(model)[0] == Replacement("plain", "AttnProcessor2_0", True, "")
    assert [r.replaced for r in ours.replacements(model)] == [True, False, False, False]
    assert ours.replacements(model)[1].reason == "a processor that computes something else"
    by_hand = ours.AttnProcessor()
    model["unknown"].set_processor(by_hand)  # type: ignore[operator]
    ours.restore_attention(model)
    assert model["unknown"].processor is by_hand and type(model["plain"].processor) is theirs.AttnProcessor2_0


def test_other_models_are_told() -> None:
    with pytest.raises(ValueError, match="model: no module of it has an attention processor of diffusers"):
        ours.replace_attention(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        ours.replace_attention([])  # type: ignore[type-var]


# -------------------------------------------------------------------------------------------------------------- backend


@pytest.mark.parametrize(("mask", "options"), [
    ("none", {"is_causal": True}),
    *((mask, options) for mask in ("none", "keys", "bool", "float")
      for options in ({}, {"scale": 0.3}, {"enable_gqa": True})),
], ids=str)  # fmt: skip
def test_backend_as_the_native_one(mask: str, options: dict[str, Any], calls: list[str]) -> None:
    heads = 2 if "enable_gqa" in options else 4
    tensors = [noise(3, 5, 4, 8), noise(3, 6, heads, 8), noise(3, 6, heads, 8)]
    tensors = [x.double().requires_grad_() for x in tensors]
    attn_mask = {"none": None, "keys": noise(3, 6) < 0.8, "bool": noise(3, 1, 5, 6) < 0.8,
                 "float": noise(3, 4, 5, 6).double()}[mask]  # fmt: skip
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        assert not attn_mask.all()
        attn_mask[..., 0] = True
    results = []
    ours.register()
    for backend in ("native", "attnfast"):
        with diffusers.attention_backend(backend):
            out = dispatch.dispatch_attention_fn(*tensors, attn_mask=attn_mask, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert calls == ["scaled_dot_product_attention"]
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_backend_refuses_what_it_does_not_implement() -> None:
    ours.register()
    x = noise(1, 4, 2, 8)
    wrong: list[dict[str, Any]] = [{"attention_kwargs": {"return_lse": True}}, {"parallel_config": object()},
                                   {"attention_kwargs": {"window_size": (2, 2)}}]  # fmt: skip
    with diffusers.attention_backend("attnfast"):
        assert dispatch.dispatch_attention_fn(x, x, x, attention_kwargs={"return_lse": False}).shape == x.shape
        for options, name in zip(wrong, ("return_lse", "_parallel_config", "window_size"), strict=True):
            with pytest.raises(NotImplementedError, match=f"passes {name}, which attnfast's backend does not"):
                dispatch.dispatch_attention_fn(x, x, x, **options)


def test_registered_and_not(calls: list[str]) -> None:
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry

    def state() -> list[Any]:
        tables = (names._member_map_, names._value2member_map_, names._member_names_, registry._backends,
                  registry._constraints, registry._supported_arg_names)  # fmt: skip
        return [*(copy.copy(table) for table in tables), registry._active_backend]

    model, given = made("flux"), MODELS["flux"][2]()
    expected, before = model(**given).sample, state()
    ours.register()
    ours.register()
    assert names("attnfast").value == "attnfast" and names.__members__["ATTNFAST"] in list(names)
    model.set_attention_backend("attnfast")  # type: ignore[operator]
    torch.testing.assert_close(model(**given).sample, expected)
    assert len(calls) == 2 and registry.get_active_backend()[1] is ours.attention_backend
    model.reset_attention_backend()  # type: ignore[operator]
    ours.unregister()
    ours.unregister()
    assert state() == before
    assert torch.equal(model(**given).sample, expected) and len(calls) == 2
    with pytest.raises(ValueError, match="attnfast"):
        names("attnfast")


def test_the_default_backend_of_the_process_is_not_touched_by_a_model() -> None:
    active = dispatch._AttentionBackendRegistry._active_backend
    ours.replace_attention(made("flux"))
    assert dispatch._AttentionBackendRegistry._active_backend is active


def test_shared_by_several_devices_is_refused() -> None:
    model = made("flux")
    model.transformer_blocks[0].attn.processor._parallel_config = object()  # type: ignore[index,union-attr]
    with pytest.raises(NotImplementedError, match="its context is shared by several devices"):
        ours.replace_attention(model)


def test_without_diffusers_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", None)
    with pytest.raises(ImportError, match=r"needs diffusers 0.35 or later .*pip install"):
        ours.register()
    monkeypatch.undo()


def test_examples_run() -> None:
    results = doctest.testmod(ours, extraglobs={"torch": torch})
    assert results.failed == 0 and results.attempted > 6


def test_nothing_is_active_on_import() -> None:
    assert attnfast.integrations.diffusers is ours
    assert "attnfast" not in dispatch.AttentionBackendName._value2member_map_
