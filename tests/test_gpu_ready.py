"""What turns on where torch sees a GPU: backend "cuda" of the tests, and the benchmark there. As far as a CPU can tell.

Tensors of device "meta" have no data and mix with none of another device, so that they show what was left behind.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BACKENDS, emulated, on_device

import attnfast
from attnfast.cli import CommandError, bench
from attnfast.cli._benchmarks import load_benchmarks

registry, measure, runner = (load_benchmarks(name) for name in ("registry", "measure", "runner"))
peers, machine = load_benchmarks("peers"), load_benchmarks("machine")


def test_tests_run_on_a_gpu_where_there_are_one_and_kernels() -> None:
    from attnfast.ops import has_cuda

    assert ("cuda" in BACKENDS) == (torch.cuda.is_available() and has_cuda())


def test_a_call_is_moved_and_its_results_are_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real, moves = torch.Tensor.to, []

    def to(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args in (("cuda",), ("cpu",)):
            moves.append((args[0], x.dtype))
            return x
        return real(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    query, slopes = torch.randn(1, 2, 4, 8), torch.ones(2)
    prior = ("gaussian", torch.zeros(1, 2, 4), 1.0)
    moved = on_device(attnfast.attention, "cuda")
    result = moved(query, query, query, alibi_slopes=slopes, prior=prior, window=(1, 1), return_lse=True)
    assert isinstance(result, attnfast.AttentionOutput) and result.weights is None
    assert moves == [("cuda", torch.float32)] * 5 + [("cpu", torch.float32)] * 2


def test_gradients_come_back_and_a_refusal_skips() -> None:
    moved = on_device(attnfast.attention, "cpu")
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    (found,) = torch.autograd.grad(moved(query, key, value, causal="top_left").sum(), query)
    (wanted,) = torch.autograd.grad(attnfast.attention(query, key, value, causal="top_left").sum(), query)
    assert torch.equal(found, wanted)

    def refuse() -> None:
        raise NotImplementedError("attnfast has no CUDA kernel with wings")

    with pytest.raises(pytest.skip.Exception, match="with wings"):
        on_device(refuse, "cpu")()


def test_the_emulated_backend_launches_kernels_or_fails() -> None:
    launched = iter([3, 4, 4, 4, 4, 4])
    call = emulated(attnfast.attention, SimpleNamespace(launches=lambda: next(launched)))  # type: ignore[arg-type]
    query = torch.randn(1, 2, 4, 8)
    assert torch.equal(call(query, query, query), attnfast.attention(query, query, query))
    with pytest.raises(AssertionError, match="no kernel was launched"):
        call(query, query, query)
    call(query, query, query, normalizer="sparsemax")  # by torch
    with pytest.raises(pytest.skip.Exception, match="134 million multiply-adds"):
        call(*[torch.zeros(1, 1, 1024, 64)] * 3)


@pytest.mark.parametrize(
    ("wanted", "gpu", "kernels", "expected"),
    [
        ("", True, True, "cuda"),
        ("", True, False, "cpu"),
        ("", False, True, "cpu"),
        ("cpu", True, True, "cpu"),
        ("cuda", True, True, "cuda"),
        ("cuda", True, False, "this build of attnfast has no CUDA kernels"),
        ("cuda", False, True, "torch sees no GPU"),
    ],
)
def test_the_benchmark_chooses_its_device(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpu: bool, kernels: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(bench, "has_cuda", lambda: kernels)
    if expected in ("cpu", "cuda"):
        assert bench.choose_device(wanted) == expected
    else:
        with pytest.raises(CommandError, match=expected):
            bench.choose_device(wanted)


def test_a_gpu_runs_its_own_suites_with_one_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    def measured(arguments: argparse.Namespace, suites: Any, threads: Any, console: Any) -> Any:
        plans.append((arguments.device, suites, threads))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "has_cuda", lambda: True)
    monkeypatch.setattr(bench, "_measure", measured)
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    with pytest.raises(KeyboardInterrupt):
        bench.run(parser.parse_args(["bench"]))
    assert plans == [("cuda", ("dot", "gpu"), (1,))]
    with pytest.raises(CommandError, match="suite 'gpu' takes hours on a CPU"):
        bench.run(parser.parse_args(["bench", "--device", "cpu", "--suite", "gpu"]))


def test_inputs_are_leaves_on_their_device() -> None:
    case = registry.find_case("dot", "1,8,512,64 bias with gradient").small()
    inputs = case.inputs()
    assert inputs.to("cpu") is inputs
    moved = inputs.to("meta")
    assert moved.wanted == inputs.wanted and moved.grad_out.device.type == "meta"
    for name, x in moved.tensors.items():
        assert x.device.type == "meta" and x.is_leaf and x.requires_grad == inputs[name].requires_grad


def test_what_a_peer_prepares_lies_on_the_inputs_device() -> None:
    """Every call of suite "dot": a mask left on the CPU would fail among tensors of another device."""
    ran = 0
    for case in registry.cases("dot"):
        if not case.varlen:  # see below: where sequences begin is read, which a tensor without data cannot say
            workload = registry.find_peer("dot", "sdpa").build(case, case.inputs().to("meta"))
            assert workload.call().device.type == "meta"
            ran += bool(case.mask or case.key_lengths or case.bias)
    assert ran >= 4


def test_a_padded_batch_lies_on_its_device() -> None:
    case = next(case for case in registry.cases("dot") if case.varlen and case.causal)
    inputs = case.inputs().to("meta")
    inputs.tensors["cu_seqlens"] = case.inputs()["cu_seqlens"]
    workload = peers._padded(case, inputs)
    assert workload.call().device.type == "meta"


def test_a_sample_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    workload: Any = SimpleNamespace(
        call=lambda: order.append("call"), wanted=(), grad_out=SimpleNamespace(is_cuda=True)
    )
    sample = measure.sampler(registry.Peer(), workload, "forward")
    order.clear()
    sample(2)
    assert order == ["wait", "call", "call", "wait"]
    workload.grad_out.is_cuda = False
    sample = measure.sampler(registry.Peer(), workload, "forward")
    order.clear()
    sample(2)
    assert order == ["call", "call"]


def test_a_row_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = machine.environment("cuda")
    assert (found["cpu"], found["isa"]) == ("NVIDIA Something", "sm_90")
    assert machine.environment()["cpu"] == machine.cpu_name()


def test_a_run_takes_its_inputs_to_the_device_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole runner, with another device's name and every tensor left where it is."""
    asked: list[str] = []

    def to(self: Any, device: str) -> Any:
        asked.append(device)
        return self

    monkeypatch.setattr(registry.Inputs, "to", to)
    monkeypatch.setattr(runner, "environment", lambda device: {"cpu": device})
    monkeypatch.setattr(runner, "measure_cuda", lambda peer, workload, which: 3 * 2**20)
    settings = measure.Settings(sample_s=0.0, budget_s=0.0, min_rounds=3, max_rounds=3)
    plan = runner.Plan(("dot",), (1,), quick=True, case="1,8,512,64 fp64", settings=settings, device="cuda")
    rows = [row for row in runner.Run(plan).execute() if row.status == "ok"]
    assert asked == ["cuda"] and {row.peer for row in rows} >= {"attnfast", "sdpa"}
    for row in rows:
        assert row.cpu == "cuda" and row.gflops and row.of_fma_peak is None and row.over_one_thread is None
        assert row.pass_ != "backward" or row.peer not in ("attnfast", "sdpa") or row.peak_extra_mib == 3
