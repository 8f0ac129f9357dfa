"""Threads, forks, signals and exceptions around the kernels."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnfast

# Each takes another path to the threads: split keys (decode and forward), tiles, backward over heads and over keys.
SHAPES = {
    "decode": (1, 2, 2, 1, 4096, 64),
    "split keys": (1, 1, 1, 40, 3000, 32),
    "tiles": (2, 4, 2, 300, 300, 64),
    "one head": (1, 1, 1, 700, 700, 40),
    "three heads": (1, 3, 3, 300, 900, 24),
    "grouped heads": (1, 6, 1, 130, 600, 16),
}


def inputs(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    B, H, H_kv, T_q, T_k, D = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(B, H, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, D)]
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


def forward_backward(tensors: list[Tensor], **options: object) -> list[Tensor]:
    output = attnfast.attention(*tensors, **options)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(got, wanted):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right"}], ids=["plain", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...], options: dict[str, object]) -> None:
    tensors = inputs(shape)
    results = []
    for threads in (1, 2, 4, 16):
        torch.set_num_threads(threads)
        results.append(forward_backward(tensors, **options))
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("causal", [None, "bottom_right"])
@pytest.mark.parametrize("lengths", [[40, 700, 3, 0, 129], [900], [64] * 9], ids=["ragged", "one", "many"])
def test_packed_sequences_do_not_depend_on_the_number_of_threads(lengths: list[int], causal: str | None) -> None:
    tensors = [torch.randn(sum(lengths), 2, 24, requires_grad=True) for _ in range(3)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    results = []
    for threads in (1, 2, 4, 16):
        torch.set_num_threads(threads)
        output = attnfast.varlen_attention(*tensors, offsets, offsets, max(lengths), max(lengths), causal=causal)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), tensors)])
    for other in results[1:]:
        assert_equal(other, results[0])


def test_padded_batches_do_not_depend_on_the_number_of_threads() -> None:
    tensors = inputs((5, 1, 1, 400, 500, 16))
    key_lengths, query_lengths = torch.tensor([500, 1, 60, 0, 130]), torch.tensor([10, 400, 0, 50, 300])
    results = []
    for threads in (1, 2, 4, 16):
        torch.set_num_threads(threads)
        results.append(forward_backward(tensors, key_lengths=key_lengths, query_lengths=query_lengths, window=(90, 20)))
    for other in results[1:]:
        assert_equal(other, results[0])


# Shared by samples and queries, by heads, by keys, by nobody: who adds to an element differs.
@pytest.mark.parametrize("shape", ["tiles", "three heads"])
@pytest.mark.parametrize("broadcast", ["BQ", "H", "BHK", "", "Q", "K", "QK"])
def test_bias_and_weights_do_not_depend_on_the_number_of_threads(broadcast: str, shape: str) -> None:
    tensors = inputs(SHAPES[shape])
    (B, H, T_q, _), T_k = tensors[0].shape, tensors[1].size(2)
    size = [1 if axis in broadcast else length for axis, length in zip("BHQK", (B, H, T_q, T_k))]
    bias = torch.randn(size, requires_grad=True)

    def run() -> list[Tensor]:
        result = attnfast.attention(*tensors, bias=bias, return_weights="column_sum", return_lse=True)
        loss = result.output.square().sum() + result.weights.square().sum() + result.lse.sum()
        return [result.output.detach(), result.weights.detach(), *torch.autograd.grad(loss, [*tensors, bias])]

    results = []
    for threads in (1, 2, 4, 16):
        torch.set_num_threads(threads)
        results.append(run())
    for other in results[1:]:
        assert_equal(other, results[0])


def test_eight_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    cases = [inputs(list(SHAPES.values())[i % len(SHAPES)], seed=i) for i in range(8)]
    expected = [forward_backward(case) for case in cases]
    barrier = threading.Barrier(8)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            barrier.wait(timeout=60)
            for _ in range(5):
                assert_equal(forward_backward(cases[i]), expected[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not errors, errors[0]


def test_one_tensor_read_by_many_threads_while_the_isa_changes() -> None:
    """Calls under way keep the table they started with, so each result is that of some variant."""
    from attnfast._ext import _C

    tensors = inputs(SHAPES["tiles"])
    before = _C.get_isa()
    allowed = []
    for name in _C.available_isas():
        _C.set_isa(name)
        allowed.append(attnfast.attention(*tensors).detach())
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            for name in _C.available_isas():
                _C.set_isa(name)

    switcher = threading.Thread(target=switch)
    switcher.start()
    try:
        for _ in range(20):
            result = attnfast.attention(*tensors).detach()
            assert any(torch.equal(result, other) for other in allowed)
    finally:
        stop.set()
        switcher.join()
        _C.set_isa(before)


def long_call(seconds: float) -> Callable[[], Tensor]:
    """Return a forward call on one thread that takes about `seconds` on this machine, now."""
    torch.set_num_threads(1)
    tokens, taken = 512, 0.0
    while True:
        query = torch.randn(1, 1, tokens, 64)
        start = time.perf_counter()
        attnfast.attention(query, query, query)
        taken = time.perf_counter() - start
        if taken >= seconds:
            return lambda: attnfast.attention(query, query, query)
        tokens *= 2


def test_the_gil_is_released() -> None:
    call = long_call(0.3)
    interval: list[float] = []
    started = threading.Event()

    def work() -> None:
        torch.set_num_threads(1)
        started.set()
        interval.append(time.perf_counter())
        call()
        interval.append(time.perf_counter())

    worker = threading.Thread(target=work)
    ticks = []
    worker.start()
    started.wait()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    begin, end = interval
    margin = 0.2 * (end - begin)
    inside = [tick for tick in ticks if begin + margin < tick < end - margin]
    # With the GIL held this thread could not run at all between the two ends.
    assert len(inside) >= 5, f"{len(inside)} ticks in {end - begin:.3f} s"


def test_a_keyboard_interrupt_during_a_call_leaves_everything_usable() -> None:
    call = long_call(0.3)
    expected = call()
    caught = False
    old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        call()
    except KeyboardInterrupt:
        caught = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert caught
    assert torch.equal(call(), expected)


def test_an_exception_in_a_hook_leaves_everything_usable() -> None:
    tensors = inputs(SHAPES["tiles"])
    expected = forward_backward(tensors)

    def fail(grad: Tensor) -> None:
        raise RuntimeError("from the hook")

    output = attnfast.attention(*tensors)
    handle = output.register_hook(fail)
    with pytest.raises(RuntimeError, match="from the hook"):
        output.sum().backward()
    handle.remove()
    assert_equal(forward_backward(tensors), expected)


def test_an_error_in_the_middle_of_other_threads() -> None:
    """Wrong calls on one thread do not disturb right ones on another."""
    tensors = inputs(SHAPES["one head"])
    expected = forward_backward(tensors)
    stop = threading.Event()
    refused = 0

    def misuse() -> None:
        nonlocal refused
        while not stop.is_set():
            with pytest.raises(ValueError):
                attnfast.attention(tensors[0], tensors[1][..., :7], tensors[2])
            refused += 1

    thread = threading.Thread(target=misuse)
    thread.start()
    try:
        for _ in range(5):
            assert_equal(forward_backward(tensors), expected)
    finally:
        stop.set()
        thread.join()
    assert refused > 0


FORK = """
import os, sys, torch, attnfast
torch.set_num_threads(2)
torch.manual_seed(0)
# Few enough elements for torch's own ops to stay on one thread: with more, they wait for ever in a forked child.
# Enough work for ours to want several.
tensors = [torch.randn(1, 2, 240, 64, requires_grad=True) for _ in range(3)]
def run():
    output = attnfast.attention(*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, torch.ones_like(output))]
expected = run()                      # the pool has started
child = os.fork()
if child == 0:
    torch.autograd.set_multithreading_enabled(False)
    try:
        same = all(x.tolist() == y.tolist() for x, y in zip(run(), expected))
        os._exit(0 if same else 3)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(4)
_, status = os.waitpid(child, 0)
assert all(torch.equal(x, y) for x, y in zip(run(), expected)), "parent"   # the parent keeps its pool
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_works() -> None:
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_calls_inside_a_torch_worker_thread() -> None:
    """Backward hooks and DataLoader-like threads call from threads that torch did not start."""
    tensors = inputs(SHAPES["split keys"])
    expected = forward_backward(tensors)
    results: list[list[Tensor]] = []
    for _ in range(3):  # a new thread each time: its scratch memory starts empty and is freed
        thread = threading.Thread(target=lambda: results.append(forward_backward(tensors)))
        thread.start()
        thread.join()
    assert len(results) == 3
    for result in results:
        assert_equal(result, expected)
