"""Tiny random models of timm with attnfast, against timm's own unfused path: logits and gradients.

The models differ in their attention: plain, with a relative position bias that wants a gradient, in shifted windows
with a mask, over channels, of a class token, of a learned query that pools.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_timm import import_timm
from torch import Tensor, nn

import attnfast
from attnfast.integrations import timm as ours
from attnfast.integrations import torch_sdpa

timm = import_timm()
SIZE = 16
sizes: dict[str, Any] = {"img_size": SIZE, "num_classes": 5}
tiny: dict[str, Any] = {**sizes, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}


def made(module: str, name: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(f"timm.models.{module}"), name)(**options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: made("vision_transformer", "VisionTransformer", **tiny, qk_norm=True),
    "vit, attention pool": lambda: made("vision_transformer", "VisionTransformer", **tiny, global_pool="map",
                                        class_token=False),
    "vit, relative positions": lambda: made("vision_transformer_relpos", "VisionTransformerRelPos", **tiny),
    "beit, relative position bias": lambda: made("beit", "Beit", **tiny, use_rel_pos_bias=True, init_values=1.0),
    "eva, rotary": lambda: made("eva", "Eva", **tiny, use_rot_pos_emb=True, init_values=1.0),
    "swin, shifted windows": lambda: made("swin_transformer", "SwinTransformer", **sizes, patch_size=2, embed_dim=16,
                                          depths=(2, 2), num_heads=(2, 4), window_size=4),
    "cait, class attention": lambda: made("cait", "Cait", **tiny, init_values=1.0),
    "xcit, over channels": lambda: made("xcit", "Xcit", **{**tiny, "patch_size": 8}, eta=1.0),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that attnfast.scaled_dot_product_attention is called with."""
    seen: list[tuple[int, ...]] = []
    original = torch_sdpa.functional.scaled_dot_product_attention

    def call(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch_sdpa.functional, "scaled_dot_product_attention", call)
    return seen


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The same model twice: all of it unfused, and with attnfast."""
    torch.manual_seed(3)
    theirs = MODELS[name]().eval()
    for parameter in theirs.parameters():  # position biases and class tokens begin as zero, scales of layers near it
        parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    model = ours.replace_attention(copy.deepcopy(theirs))
    for module in theirs.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return theirs, model


def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits, and gradients of a random function of them."""
    images = images.clone().requires_grad_()
    logits = model(images)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad((logits * probe).sum(), [images, *model.parameters()], allow_unused=True)
    return {"logits": logits, **{n: g for n, g in zip(["images", *names], grads, strict=True) if g is not None}}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, calls: list[Any]) -> None:
    theirs, model = pair(name)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = run(theirs, images)
    assert not calls
    got = run(model, images)
    attending = [module for module in model.modules() if hasattr(module, "fused_attn")]
    assert len(calls) >= len(attending) >= 2
    assert got.keys() == expected.keys() and len(got) > 20
    for key, x in expected.items():
        limit = (1e-5 if key == "logits" else 1e-4) * max(x.abs().max().item(), 0.05)
        torch.testing.assert_close(got[key], x, rtol=0, atol=limit, msg=lambda text, key=key: f"{key}: {text}")
    bias = [key for key in expected if "relative_position_bias_table" in key]
    assert bool(bias) == ("bias" in name or "swin" in name)
    assert all(expected[key].abs().max() > 1e-3 for key in bias)


def test_restored_exactly_copies_and_pickles_too() -> None:
    """swin's modules are unfused in timm, vit's fused: both flags come back."""
    for name, flag in (("swin, shifted windows", False), ("vit", True)):
        model = MODELS[name]().eval()
        keys = [vars(module).keys() - {"forward"} for module in model.modules()]
        images = torch.randn(1, 3, SIZE, SIZE)
        expected = model(images)
        parameters = {n: p.data_ptr() for n, p in model.named_parameters()}
        ours.replace_attention(ours.replace_attention(model))  # twice is once
        assert all(r.replaced for r in ours.replacements(model))
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for each in (model, *copies):
            for module in each.modules():
                if hasattr(module, "fused_attn"):
                    assert module.forward.args[0] is module and module.fused_attn is True  # type: ignore[union-attr]
            torch.testing.assert_close(each(images), expected)
            assert ours.restore_attention(each) is each
            assert torch.equal(each(images), expected)
            for module in each.modules():
                assert "forward" not in vars(module)
                assert getattr(module, "fused_attn", flag) is flag
        assert [vars(module).keys() for module in model.modules()] == keys
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == parameters


def test_hooks_and_training_state_stay(calls: list[Any]) -> None:
    model = made("vision_transformer", "VisionTransformer", **tiny, attn_drop_rate=0.5)
    seen: list[bool] = []
    model.blocks[0].attn.register_forward_hook(lambda module, *_: seen.append(module.training))  # type: ignore
    ours.replace_attention(model)
    images = torch.randn(1, 3, SIZE, SIZE)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(model.train()(images))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])  # the dropout of the module
    model.eval()(images)
    assert seen == [True, True, True, False] and len(calls) == 8


def test_the_override_ends_with_an_error(calls: list[Any]) -> None:
    attention = ours.replace_attention(timm.layers.Attention(32, 4))
    with pytest.raises(RuntimeError):
        attention(torch.randn(1, 5, 31))
    x = torch.randn(1, 2, 5, 8)
    nn.functional.scaled_dot_product_attention(x, x, x)
    assert not calls


def test_compiled_whole() -> None:
    """The graph that torch.compile takes has attnfast's operator and not torch's."""
    model = ours.replace_attention(MODELS["vit"]().eval())
    images = torch.randn(2, 3, SIZE, SIZE)
    targets: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        expected = model(images)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(images), expected)
    assert any("attnfast" in target for target in targets)
    assert not any("scaled_dot_product_attention" in target for target in targets)


def test_the_report_names_what_was_left_and_why() -> None:
    patched = timm.layers.Attention(32, 4)
    patched.forward = patched.forward
    scripted = torch.jit.script(timm.layers.Attention(32, 4))
    model = nn.ModuleDict({"plain": timm.layers.Attention(32, 4), "patched": patched, "scripted": scripted})
    assert {(r.name, r.replaced, r.reason) for r in ours.replacements(model)} == {
        ("plain", False, "not replaced yet"),
        ("patched", False, "its forward was replaced already"),
        ("scripted", False, "scripted: its code is fixed"),
    }
    ours.replace_attention(model)
    found = {r.name: r for r in ours.replacements(model)}
    assert [found[name].replaced for name in ("plain", "patched", "scripted")] == [True, False, False]
    assert found["plain"].kind == "timm.layers.attention.Attention"


def test_other_models_are_told() -> None:
    with pytest.raises(ValueError, match=r"model: no module of it has timm's flag fused_attn; .*replace_modules"):
        ours.replace_attention(nn.TransformerEncoderLayer(16, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        ours.replace_attention([])  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        ours.restore_attention([])  # type: ignore[type-var]


def test_nothing_is_active_on_import() -> None:
    assert attnfast.integrations.timm is ours
    assert ours.replacements(MODELS["vit"]()) and not any(r.replaced for r in ours.replacements(MODELS["vit"]()))
