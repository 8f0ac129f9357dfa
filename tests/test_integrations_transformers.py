"""Tiny random models of Hugging Face transformers, from configurations, with attnfast and with their own attention.

Nothing is downloaded. In float32, because the softmax of the models' own attention is in float32 whatever they are in.
Padded positions are not compared: a row that sees nothing is an average of everything there, and zero here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfast.integrations import transformers as ours

transformers = pytest.importorskip("transformers")
VOCABULARY, LAYERS, HEADS = 99, 2, 4

decoder: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attention_dropout": 0.0,
}  # fmt: skip
encoder: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
layered = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", decoder),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**decoder, "sliding_window": 5}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config",
              {**decoder, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config",
               {**decoder, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16,
                "layer_types": layered}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig",
                {**decoder, "sliding_window": 5, "layer_types": layered, "num_local_experts": 2,
                 "num_experts_per_tok": 1}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128,
              "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None,
              "pad_token_id": 0}),
    "bert": ("BertForMaskedLM", "BertConfig", {**encoder, "vocab_size": VOCABULARY, "max_position_embeddings": 128}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**encoder, "image_size": 12, "patch_size": 4, "num_labels": 3}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS,
            "dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}),
    "bart": ("BartForConditionalGeneration", "BartConfig",
             {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
              "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48,
              "decoder_ffn_dim": 48, "dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 128,
              "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1, "forced_eos_token_id": None}),
}  # fmt: skip
GENERATING = sorted(set(MODELS) - {"bert", "vit"})


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ours.register()
    yield
    ours.unregister()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each call of attnfast.attention."""
    seen: list[dict[str, Any]] = []
    original = ours.functional.attention

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ours.functional, "attention", call)
    return seen


@functools.cache
def _made(name: str) -> Any:
    model_name, config_name, options = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, config_name)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_name)(config)
    for parameter in model.parameters():  # far from uniform attention, and biases and sinks that matter
        parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def pair(name: str) -> tuple[Any, Any]:
    """The same model twice, the second with attnfast."""
    theirs = copy.deepcopy(_made(name)).eval()
    model = copy.deepcopy(theirs)
    model.set_attn_implementation("attnfast")
    return theirs, model


def inputs(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments, and which positions of the output count."""
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}, torch.ones(2, dtype=torch.bool)
    tokens = torch.randint(2, VOCABULARY, (2, 11), generator=generator)
    seen = torch.ones(2, 11, dtype=torch.long)
    if name in ("t5", "bart"):
        seen[1, 7:] = 0
        target = torch.randint(2, VOCABULARY, (2, 6), generator=generator)
        return {"input_ids": tokens, "attention_mask": seen, "decoder_input_ids": target}, torch.ones(2, 6).bool()
    seen[1, :4] = 0  # padded at the left, as for generation
    return {"input_ids": tokens, "attention_mask": seen}, seen.bool()


def close(got: Tensor, expected: Tensor, limit: float) -> None:
    """Within `limit` of the largest element."""
    torch.testing.assert_close(got, expected, rtol=0, atol=limit * max(expected.abs().max().item(), 0.05))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, calls: list[Any]) -> None:
    theirs, model = pair(name)
    given, valid = inputs(name)
    results = []
    for each in (theirs, model):
        logits = each(**given).logits[valid]
        weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(7))
        (logits * weights).sum().backward()
        results.append((logits, {n: p.grad for n, p in each.named_parameters()}))
    assert len(calls) >= LAYERS
    close(results[1][0], results[0][0], 1e-5)
    for parameter, grad in results[0][1].items():
        if grad is not None:
            close(results[1][1][parameter], grad, 1e-4)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"t5", "bart"}))
def test_without_a_mask_the_kernels_know_who_sees_whom(name: str, calls: list[Any]) -> None:
    """Sequences shorter than the window, so that transformers leaves the mask out."""
    theirs, model = pair(name)
    given = {key: x for key, x in inputs(name)[0].items() if key != "attention_mask"}
    if "input_ids" in given:
        given["input_ids"] = given["input_ids"][:, :4]
    close(model(**given).logits, theirs(**given).logits, 1e-5)
    assert all(call["mask"] is None for call in calls) and calls
    causal = None if name in ("bert", "vit") else "top_left"
    assert {call["causal"] for call in calls} == {causal}


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache(name: str, calls: list[Any]) -> None:
    theirs, model = pair(name)
    given, _ = inputs(name)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        expected, got = (each.generate(**given, **options) for each in (theirs, model))
    assert torch.equal(got.sequences, expected.sequences)
    for x, y in zip(got.logits, expected.logits, strict=True):
        close(x, y, 1e-5)
    assert len(calls) >= 8 * LAYERS


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_weights_on_request(name: str) -> None:
    theirs, model = pair(name)
    given, valid = inputs(name)
    expected, got = (each(**given, output_attentions=True).attentions for each in (theirs, model))
    assert len(got) == LAYERS
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.transpose(1, 2)[valid], y.transpose(1, 2)[valid])


def test_what_a_model_passes_arrives(calls: list[Any]) -> None:
    for name in ("gemma2", "gpt_oss", "t5"):
        pair(name)[1](**inputs(name)[0])
    assert {call["softcap"] for call in calls} == {0.0, 2.0}
    assert sum(call["sink"] is not None for call in calls) == LAYERS
    assert sum(call["bias"] is not None for call in calls) >= 2 * LAYERS


def test_dropout_is_the_module_s_in_training_only(calls: list[Any]) -> None:
    config = transformers.LlamaConfig(**{**decoder, "attention_dropout": 0.5})
    config._attn_implementation = "attnfast"
    model = transformers.LlamaForCausalLM(config)
    given, _ = inputs("llama")
    model.train()(**given)
    model.eval()(**given)
    assert [call["dropout_p"] for call in calls] == [0.5] * LAYERS + [0.0] * LAYERS


class Layer(nn.Module):
    is_causal = True


def direct(**options: Any) -> Tensor:
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    return ours.attention_forward(Layer(), query, key, key, None, **options)[0]


def test_a_window_without_a_mask(calls: list[Any]) -> None:
    assert direct(sliding_window=3).shape == (1, 6, 4, 8)
    direct(sliding_window=3, is_causal=False)
    assert [(call["causal"], call["window"]) for call in calls] == [("top_left", (2, -1)), (None, None)]


def test_unknown_keywords_are_errors_unless_they_say_nothing() -> None:
    assert direct(position_ids=torch.arange(6), cu_seq_lens_q=None, use_cache=True, unheard_of=False).shape[1] == 6
    with pytest.raises(NotImplementedError, match="Layer passes cu_seq_lens_q, unheard_of, of which"):
        direct(unheard_of=1, cu_seq_lens_q=torch.tensor([0, 6]))


def test_registered_and_not() -> None:
    attention, masks, _ = ours._interfaces()
    sdpa = attention._global_mapping["sdpa"], masks._global_mapping["sdpa"]
    ours.register("sdpa")
    assert attention._global_mapping["sdpa"] is ours.attention_forward
    ours.register("sdpa")
    ours.unregister("sdpa")
    assert (attention._global_mapping["sdpa"], masks._global_mapping["sdpa"]) == sdpa
    ours.unregister()
    assert "attnfast" not in attention._global_mapping and "attnfast" not in masks._global_mapping
    ours.unregister()
    for name in ("eager", "flash_attention_2", "paged|attnfast"):
        with pytest.raises(ValueError, match="name: expected one that transformers gives no meaning to"):
            ours.register(name)


def test_without_transformers_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    function: Callable[[], None] = ours.register
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 4.53 or later .*pip install"):
        function()
