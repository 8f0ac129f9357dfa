"""attnfast.nn.EndToEndMemory against the paper's equations, one story, sentence, word and element at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfast.nn import EndToEndMemory

F64 = torch.float64
V, D, B, N, J = 11, 4, 3, 6, 5
LENGTHS = [6, 4, 1]


def story(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Stories and questions whose sentences have one word or more and are padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, V, (B, N + 1, J), generator=generator)
    count = torch.randint(1, J + 1, (B, N + 1), generator=generator)
    words = words * (torch.arange(J) < count.unsqueeze(-1))
    return words[:, :N], words[:, N]


def model(**options: Any) -> EndToEndMemory:
    module = EndToEndMemory(V, D, **({"hops": 3, "slots": 8} | options)).double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module


def encode(module: EndToEndMemory, words: list[int], table: Tensor) -> Tensor:
    words = [word for word in words if word]
    total = torch.zeros(D, dtype=F64)
    for j, word in enumerate(words, 1):
        for k in range(1, D + 1):
            weight = (1 - j / len(words)) - (k / D) * (1 - 2 * j / len(words)) if module.position_encoding else 1.0
            total = total + weight * table[word, k - 1] * torch.eye(D, dtype=F64)[k - 1]
    return total


def paper(module: EndToEndMemory, sentences: Tensor, question: Tensor, length: int, ages: list[int] | None = None):
    """(logits, weights of each hop) of one story; padded slots are zero vectors, and are there."""
    adjacent = module.tying == "adjacent"
    A = [module.words[k if adjacent else 0] for k in range(module.hops)]
    C = [module.words[k + 1 if adjacent else 1] for k in range(module.hops)]
    B_ = module.words[0 if adjacent else 2]
    W = module.words[module.hops] if adjacent else module.readout
    T_A = [None if module.ages is None else module.ages[k if adjacent else 0] for k in range(module.hops)]
    T_C = [None if module.ages is None else module.ages[k + 1 if adjacent else 1] for k in range(module.hops)]
    if ages is None:
        ages = [length - 1 - i for i in range(length)]
    u = encode(module, question.tolist(), B_)
    found = []
    for k in range(module.hops):
        m, c = [], []
        for i in range(len(sentences)):
            if i >= length:
                m.append(torch.zeros(D, dtype=F64))
                c.append(torch.zeros(D, dtype=F64))
                continue
            m.append(encode(module, sentences[i].tolist(), A[k]) + (0 if T_A[k] is None else T_A[k][ages[i]]))
            c.append(encode(module, sentences[i].tolist(), C[k]) + (0 if T_C[k] is None else T_C[k][ages[i]]))
        seen = length if module.mask_padding else len(sentences)
        s = torch.stack([u @ x for x in m])[:seen]
        p = s if module.linear_start else s.exp() / s.exp().sum()
        p = torch.cat([p, torch.zeros(len(sentences) - seen, dtype=F64)])
        o = sum(weight * x for weight, x in zip(p, c, strict=True))
        u = (u if adjacent else module.carry @ u) + o
        found.append(p)
    return W @ u, torch.stack(found)


VARIANTS: dict[str, dict[str, Any]] = {
    "adjacent": {},
    "layerwise": {"tying": "layerwise"},
    "layerwise-answers": {"tying": "layerwise", "answers": 5},
    "one-hop": {"hops": 1},
    "bags": {"position_encoding": False},
    "ageless": {"temporal_encoding": False, "tying": "layerwise"},
    "masked": {"mask_padding": True},
}


@pytest.mark.parametrize("linear", [False, True], ids=["softmax", "linear"])
@pytest.mark.parametrize("name", VARIANTS)
def test_follows_the_paper(name: str, linear: bool) -> None:
    module = model(**VARIANTS[name])
    module.linear_start = linear
    sentences, question = story()
    got = module(sentences, question, torch.tensor(LENGTHS))
    for b, length in enumerate(LENGTHS):
        logits, weights = paper(module, sentences[b], question[b], length)
        torch.testing.assert_close(got.answers[b], logits)
        torch.testing.assert_close(got.weights[b], weights)
    whole = module(sentences, question)
    torch.testing.assert_close(whole.answers[2], paper(module, sentences[2], question[2], N)[0])


def test_padded_sentences_take_part_of_the_softmax_unless_masked() -> None:
    sentences, question = story()
    sentences[:, 3:] = 5  # what stands there is no sentence
    found = [model(mask_padding=mask)(sentences, question, torch.tensor([3] * B)).weights for mask in (False, True)]
    assert (found[0][..., 3:] > 0.01).all() and found[1][..., 3:].eq(0).all()
    shorter = model(mask_padding=True)(sentences[:, :3], question).weights
    torch.testing.assert_close(found[1][..., :3], shorter)


@pytest.mark.parametrize("positions", [False, True])
def test_nil_adds_nothing_whatever_its_row_holds(positions: bool) -> None:
    module, (sentences, question) = model(position_encoding=positions), story()
    expected = module(sentences, question).weights
    with torch.no_grad():
        module.words[:, 0] = 3.0
    padded = torch.nn.functional.pad(sentences, (0, 3)), torch.nn.functional.pad(question, (0, 2))
    torch.testing.assert_close(module(*padded).weights, expected)


def test_of_a_long_story_the_newest_sentences_are_read() -> None:
    module, (sentences, question) = model(slots=3), story()
    got = module(sentences, question, torch.tensor(LENGTHS))
    assert got.weights.shape == (B, 3, 3)
    for b, length in enumerate(LENGTHS):
        kept = sentences[b, max(0, length - 3) : length]
        padded = torch.cat([kept, torch.zeros(3 - len(kept), J, dtype=torch.int64)])
        logits, weights = paper(module, padded, question[b], len(kept))
        torch.testing.assert_close(got.answers[b], logits)
        torch.testing.assert_close(got.weights[b], weights)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("tying", ["adjacent", "layerwise"])
def test_gradients(tying: str, linear: bool) -> None:
    module, (sentences, question) = model(tying=tying, hops=2), story()
    module.linear_start = linear
    names = [name for name, _ in module.named_parameters()]

    def run(*parameters: Tensor) -> Any:
        given = dict(zip(names, parameters, strict=True))
        return tuple(torch.func.functional_call(module, given, (sentences, question, torch.tensor(LENGTHS))))

    leaves = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(run, leaves)
    gradients = torch.autograd.grad(run(*leaves)[0].square().sum(), leaves)
    assert all(g.abs().amax((-2, -1)).min() > 1e-6 for g in gradients), "a table without influence"
    if tying == "layerwise":
        assert gradients[names.index("words")][:, 0].eq(0).all(), "nil has learnt something"


# --- random noise ----------------------------------------------------------------------------------------------------


def drawn_ages(module: EndToEndMemory, lengths: list[int], count: int) -> Tensor:
    return module._ages(torch.tensor(lengths), count)


def test_noise_moves_ages_apart_and_keeps_their_order() -> None:
    module = model(slots=200, noise=0.1).train()
    lengths = [45, 30, 8, 1, 0]
    most, least = torch.zeros(5), torch.full((5,), 1e9)
    for seed in range(300):
        torch.manual_seed(seed)
        ages = drawn_ages(module, lengths, 45)
        for b, length in enumerate(lengths):
            own = ages[b, :length]
            assert (own[:-1] > own[1:]).all(), "oldest first, no two of one age"
            if length:
                assert own.min() >= 0
                gap = own.max() - (length - 1)
                assert 0 <= gap < max(1, math.ceil(0.1 * length))
                most[b], least[b] = max(most[b], gap), min(least[b], gap)
    assert most.tolist() == [4, 2, 0, 0, 0] and least[:4].eq(0).all()
    module.eval()
    assert drawn_ages(module, [3], 4)[0, :3].tolist() == [2, 1, 0]


def test_every_place_is_a_gap_equally_often() -> None:
    """Of 12 ages with one gap (noise gives none or one), each of the 13 is left out with the same probability."""
    module, count = model(slots=50, noise=0.1).train(), 40_000
    ages = drawn_ages(module, [12] * count, 12)
    moved = ages[ages[:, 0] == 12]  # the gap is not the oldest age
    missing = 12 * 13 // 2 - moved.sum(1)
    counts = torch.bincount(missing, minlength=13)
    assert len(counts) == 13 and counts[12] == 0
    expected = count / 2 / 13
    assert (counts[:12] - expected).abs().max() < 5 * math.sqrt(expected)
    assert abs(len(moved) - 12 * expected) < 5 * math.sqrt(12 * expected)


def test_noise_is_for_training_and_ages_end_at_the_last_slot() -> None:
    module, (sentences, question) = model(slots=6, noise=1.0), story()
    expected = module(sentences, question, torch.tensor(LENGTHS))
    torch.manual_seed(1)
    noisy = module.train()(sentences, question, torch.tensor(LENGTHS))
    assert not torch.equal(noisy.answers, expected.answers)
    torch.manual_seed(1)
    torch.testing.assert_close(module(sentences, question, torch.tensor(LENGTHS)), noisy)
    torch.manual_seed(1)
    ages = drawn_ages(module, LENGTHS, N)
    assert ages.max() == 5 and (ages[0] == 5).sum() > 1
    for b, length in enumerate(LENGTHS):
        logits, weights = paper(module, sentences[b], question[b], length, ages[b].tolist())
        torch.testing.assert_close(noisy.answers[b], logits)
        torch.testing.assert_close(noisy.weights[b], weights)
    quiet = model(slots=6, noise=0.0).train()
    torch.testing.assert_close(quiet(sentences, question, torch.tensor(LENGTHS)).answers, expected.answers)


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tying", ["adjacent", "layerwise"])
def test_begins_as_published(tying: str) -> None:
    module = EndToEndMemory(400, 50, tying=tying, slots=100, answers=400)
    for parameter in module.parameters():
        drawn = parameter.detach()[:, 1:] if parameter is module.words else parameter.detach()
        assert abs(drawn.mean()) < 6 * 0.1 / math.sqrt(drawn.numel())
        assert abs(drawn.std() / 0.1 - 1) < 6 / math.sqrt(2 * drawn.numel())
        assert abs((drawn / 0.1).pow(4).mean() - 3) < 6 * math.sqrt(96 / drawn.numel())
    assert module.words[:, 0].eq(0).all()
    assert not module.linear_start


def test_machinery() -> None:
    module, (sentences, question) = model().float(), story()
    given = sentences, question, torch.tensor(LENGTHS)
    expected = module(*given)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(tuple(compiled), tuple(expected))
    torch._dynamo.reset()
    program = torch.export.export(module, given).module()
    torch.testing.assert_close(tuple(program(*given)), tuple(expected))
    torch.testing.assert_close(tuple(copy.deepcopy(module)(*given)), tuple(expected))
    for half in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(module).to(half)
        truth = copy.deepcopy(low).double()(*given)
        for a, b in zip(low(*given), truth, strict=True):
            assert a.dtype == half and (a - b).abs().max() < 16 * torch.finfo(half).eps * b.abs().max()
        with torch.autocast("cpu", dtype=half):
            assert (module(*given).weights - expected.weights).abs().max() < 16 * torch.finfo(half).eps


def test_learns_where_something_is() -> None:
    """Stories of moves, and the question where one of three is: what the newest sentence about him says."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)

    def stories(count: int) -> tuple[Tensor, Tensor, Tensor]:
        who, place = (torch.randint(0, 3, (count, 5), generator=generator) for _ in range(2))
        who[:, 0], asked = who[:, 4], who[torch.arange(count), torch.randint(0, 5, (count,), generator=generator)]
        last = (who == asked.unsqueeze(1)).long().mul(torch.arange(1, 6)).argmax(1)
        said = torch.stack([1 + who, 4 + place], -1)
        return said, (1 + asked).unsqueeze(1), 4 + place[torch.arange(count), last]

    module = EndToEndMemory(7, 16, hops=1, slots=5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for step in range(300):
        module.linear_start = step < 60
        said, asked, answer = stories(64)
        loss = torch.nn.functional.cross_entropy(module(said, asked).answers, answer, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 40.0)
        optimizer.step()
    said, asked, answer = stories(1000)
    accuracy = (module.eval()(said, asked).answers.argmax(-1) == answer).float().mean()
    assert accuracy > 0.95, f"{accuracy} (guessing among three gives 0.33)"


q, s = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4, 3, dtype=torch.int64)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "size": (lambda: EndToEndMemory(5, 0), ValueError, "size: expected an integer > 0, got 0"),
    "tying": (lambda: EndToEndMemory(5, tying="none"), ValueError, "tying: expected one of 'adjacent'.*got 'none'"),
    "answers": (lambda: EndToEndMemory(5, answers=3), ValueError, "answers: W is a table .*expected 5, got 3"),
    "noise": (lambda: EndToEndMemory(5, noise=1.5), ValueError, r"noise: expected a share in \[0, 1\], got 1\.5"),
    "story-type": (
        lambda: EndToEndMemory(5)(s.float(), q),
        TypeError,
        r"story: expected integers \[B, N, J\], got",
    ),
    "story": (lambda: EndToEndMemory(5)(q, q), ValueError, r"story: expected \[B, N, J\], got \[2, 3\]"),
    "question": (lambda: EndToEndMemory(5)(s, q[:1]), ValueError, r"question: expected B = 2 \(the story's\), got 1"),
    "lengths": (lambda: EndToEndMemory(5)(s, q, q), ValueError, r"lengths: expected \[B\] = \[2\], got \[2, 3\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    call, exception, pattern = WRONG[name]
    with pytest.raises(exception, match=pattern):
        call()


def test_text() -> None:
    shown = EndToEndMemory(9, 5, hops=2, tying="layerwise").extra_repr()
    assert shown == (
        "vocabulary=9, size=5, hops=2, slots=50, tying='layerwise', position_encoding=True, temporal_encoding=True, "
        "noise=0.1"
    )
