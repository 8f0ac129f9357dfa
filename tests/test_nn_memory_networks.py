"""attnfast.nn.MemoryNetwork and its parts against the paper's formulas with Phi and U written out, D columns wide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfast.nn import (
    ContextBags,
    Generalization,
    InputMap,
    Memory,
    MemoryNetwork,
    OutputMap,
    Response,
    RNNResponse,
    Text,
    TextScore,
    WordSegmenter,
)

F64 = torch.float64
V, EXTRA, SIZE, B, N, J = 8, 3, 4, 4, 6, 5


def loud(module: nn.Module, scale: float = 0.7) -> Any:
    module, generator = module.double(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module


def texts(*shape: int, seed: int, top: int = V) -> Tensor:
    """Words with padding at the end, at least one each."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, top, shape, generator=generator)
    count = torch.randint(1, shape[-1] + 1, shape[:-1], generator=generator)
    return words * (torch.arange(shape[-1]) < count.unsqueeze(-1))


def text(words: Tensor) -> Text:
    return InputMap(V)(words)


def bags() -> ContextBags:
    module = ContextBags(V, V + EXTRA)
    module.observe(texts(12, J, seed=40, top=V + EXTRA))
    return module.double()


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "contexts": lambda: {"contexts": bags()},
    "matches": lambda: {"matches": True},
    "mixed": lambda: {"mixed": 0.3},
    "all": lambda: {"contexts": bags(), "matches": True, "mixed": 0.3},
}

# --- Phi and U, as in the paper --------------------------------------------------------------------------------------

WORDS_Y, QUESTION, SUPPORT, LEFT, RIGHT, MATCH = 0, V, 2 * V, 3 * V, 4 * V, 5 * V
D = 8 * V + 3


def matrix(score: TextScore) -> Tensor:
    """U, ``[n, D]``."""
    U = torch.zeros(SIZE, D, dtype=F64)
    for block in range(3):
        U[:, block * V : block * V + V] = score.words[block].t()
    if score.neighbours is not None:
        U[:, LEFT:RIGHT], U[:, RIGHT:MATCH] = score.neighbours[0].t(), score.neighbours[1].t()
    if score.matches is not None:
        for block in range(3):
            U[:, MATCH + block * V : MATCH + block * V + V] = score.matches[block].t()
    if score.times is not None:
        U[:, 8 * V :] = score.times.t()
    return U


def add(phi: Tensor, score: TextScore, words: list[int], block: int) -> None:
    for word in words:
        if 0 < word < V:
            phi[block + word] += 1
        elif word and score.contexts is not None:
            for side, start in ((score.contexts.left, LEFT), (score.contexts.right, RIGHT)):
                phi[start : start + V] += side[word]


def phi_x(score: TextScore, question: list[int], supports: list[list[int]]) -> Tensor:
    phi = torch.zeros(D, dtype=F64)
    add(phi, score, question, QUESTION)
    for support in supports:
        add(phi, score, support, SUPPORT)
    return phi


def phi_y(score: TextScore, words: list[int], question: list[int], supports: list[list[int]]) -> Tensor:
    phi = torch.zeros(D, dtype=F64)
    add(phi, score, words, WORDS_Y)
    if score.matches is not None:
        for number, source in enumerate([question, *supports]):
            for word in words:
                if 0 < word < V and word in source:
                    phi[MATCH + min(number, 2) * V + word] += 1
    return phi


def by_hand(score: TextScore, question: list[int], supports: list[list[int]], words: list[int]) -> Tensor:
    U = matrix(score)
    x, y = phi_x(score, question, supports), phi_y(score, words, question, supports)
    equal = sum(a == b != 0 for source in (question, *supports) for a in source for b in words)
    return x @ U.t() @ U @ y + score.mixed * equal


def preference(score: TextScore, question: list[int], supports: list[list[int]], one: tuple, other: tuple, asked: int):
    """s_Ot of (words, time) against (words, time)."""
    phi_t = torch.zeros(D, dtype=F64)
    phi_t[8 * V :] = torch.tensor([asked < one[1], asked < other[1], one[1] < other[1]], dtype=F64)
    U = matrix(score)
    extra = phi_x(score, question, supports) @ U.t() @ U @ phi_t
    return by_hand(score, question, supports, one[0]) - by_hand(score, question, supports, other[0]) + extra


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_scores_are_the_papers(name: str, count: int) -> None:
    score, top = loud(TextScore(V, SIZE, **VARIANTS[name]())), V + EXTRA
    question, facts = texts(B, J, seed=1, top=top), [texts(B, J, seed=9 + i, top=top) for i in range(count)]
    memory = texts(B, N, J, seed=2, top=top)
    got = score(text(question), [text(f) for f in facts], text(memory))
    for b in range(B):
        given = question[b].tolist(), [f[b].tolist() for f in facts]
        expected = [by_hand(score, *given, m) for m in memory[b].tolist()]
        torch.testing.assert_close(got[b], torch.stack(expected))


def memory_of(words: Tensor, counts: list[int]) -> Memory:
    times = torch.arange(words.shape[1]).expand(words.shape[:2])
    return Memory(text(words), times.where(times < torch.tensor(counts).unsqueeze(1), -1))


@pytest.mark.parametrize("name", VARIANTS)
def test_supporting_facts_one_given_the_ones_before(name: str) -> None:
    output = loud(OutputMap(V, SIZE, supports=3, **VARIANTS[name]()))
    question, words, counts = texts(B, J, seed=1, top=V + EXTRA), texts(B, N, J, seed=2, top=V + EXTRA), [6, 1, 4, 0]
    places, facts = output(text(question), memory_of(words, counts))
    assert places[3].eq(-1).all()
    for b, count in enumerate(counts[:3]):
        found: list[list[int]] = []
        for hop in range(3):
            rated = [by_hand(output.score, question[b].tolist(), found, words[b, i].tolist()) for i in range(count)]
            best = int(torch.stack(rated).argmax())
            assert places[b, hop] == best
            assert torch.equal(facts[hop].words[b], words[b, best])
            found.append(words[b, best].tolist())


@pytest.mark.parametrize("name", ["plain", "all"])
def test_with_times_facts_win_a_tournament(name: str) -> None:
    output = loud(OutputMap(V, SIZE, supports=2, times=True, **VARIANTS[name]()))
    with torch.no_grad():
        output.score.times.mul_(3)
    batch, counts = 60, [6, 3, 1] * 20
    question, words = texts(batch, J, seed=1), texts(batch, N, J, seed=2)
    places, _ = output(text(question), memory_of(words, counts))
    differs = 0
    for b, count in enumerate(counts):
        asked, facts, slots = count, [], [(words[b, i].tolist(), i) for i in range(count)]
        for hop in range(2):
            t = 0
            for i in range(1, count):
                if preference(output.score, question[b].tolist(), facts, slots[t], slots[i], asked) < 0:
                    t = i
            assert places[b, hop] == t
            plain = [by_hand(output.score, question[b].tolist(), facts, slot[0]) for slot in slots]
            differs += t != int(torch.stack(plain).argmax())
            facts.append(slots[t][0])
            asked = t
    assert differs > 10, "the times decide nothing"


def test_time_is_when_a_slot_was_written_and_not_where_it_lies() -> None:
    """A memory whose oldest slots were written over, and three facts: x is as old as the last one found."""
    output = loud(OutputMap(V, SIZE, supports=3, times=True))
    with torch.no_grad():
        output.score.times.mul_(3)
    times, words = [7, 8, 3, 4, 5, 6], texts(120, N, J, seed=2)
    # Without samples that hold the same words twice: there rounding would decide.
    words = words[[len({tuple(sorted(m)) for m in sample}) == N for sample in words.tolist()]]
    batch = len(words)
    assert batch > 30
    question = texts(batch, J, seed=1)
    memory = Memory(text(words), torch.tensor(times).expand(batch, -1))
    places, _ = output(text(question), memory)
    true, false = places.flip(1), (places.flip(1) + 1) % N
    losses, moves = output.loss(text(question), memory, true, false), 0
    for b in range(batch):
        slots = [(words[b, i].tolist(), times[i]) for i in range(N)]
        asked, facts, found = 9, [], []
        for _ in range(3):
            t = 0
            for i in range(1, N):
                if preference(output.score, question[b].tolist(), facts, slots[t], slots[i], asked) < 0:
                    t = i
            found.append(t)
            facts.append(slots[t][0])
            asked = times[t]
        assert places[b].tolist() == found
        moves += found[0] != found[1]
        asked, facts, total = 9, [], torch.zeros((), dtype=F64)
        for o, f in zip(true[b].tolist(), false[b].tolist(), strict=True):
            given = output.score, question[b].tolist(), facts
            total = total + (output.margin - preference(*given, slots[o], slots[f], asked)).clamp(min=0)
            total = total + (output.margin + preference(*given, slots[f], slots[o], asked)).clamp(min=0)
            facts.append(slots[o][0])
            asked = times[o]
        torch.testing.assert_close(losses[b], total)
    assert moves > 10


def test_slots_that_hold_nothing_are_no_facts() -> None:
    output = loud(OutputMap(V, SIZE, supports=2, times=True))
    times = torch.tensor([-1, -1, 2, 3, -1, 4])
    memory = Memory(text(texts(60, N, J, seed=2)), times.expand(60, -1))
    places, _ = output(text(texts(60, J, seed=1)), memory)
    assert set(places.flatten().tolist()) == {2, 3, 5}


def test_a_draw_of_the_tournament_changes_nothing() -> None:
    """Slot 0 is the newest of equal texts, so no feature tells it from the others: it stays."""
    output = loud(OutputMap(V, SIZE, supports=1, times=True))
    same = texts(1, J, seed=2)
    memory = Memory(text(same.expand(20, 3, J)), torch.tensor([5, 3, 4]).expand(20, -1))
    places, _ = output(text(texts(20, J, seed=1)), memory)
    assert places.eq(0).all()


@pytest.mark.parametrize("times", [False, True])
def test_loss_of_the_facts(times: bool) -> None:
    output = loud(OutputMap(V, SIZE, supports=2, times=times, margin=0.5))
    question, words = texts(B, J, seed=1), texts(B, N, J, seed=2)
    memory, true = memory_of(words, [6, 6, 2, 1]), torch.tensor([[2, 4], [0, 0], [1, 0], [0, 0]])
    false = torch.tensor([[3, 1], [5, 2], [0, 1], [0, 0]])
    got = output.loss(text(question), memory, true, false)
    active = 0
    for b, count in enumerate([6, 6, 2, 1]):
        total, facts, asked = torch.zeros((), dtype=F64), [], count
        for hop in range(2 if count > 1 else 0):
            o, f = int(true[b, hop]), int(false[b, hop])
            slots = {i: (words[b, i].tolist(), i) for i in (o, f)}
            given = output.score, question[b].tolist(), facts
            if times:
                terms = [0.5 - preference(*given, slots[o], slots[f], asked),
                         0.5 + preference(*given, slots[f], slots[o], asked)]  # fmt: skip
            else:
                terms = [0.5 - by_hand(*given, slots[o][0]) + by_hand(*given, slots[f][0])]
            active += sum(bool(term > 0) for term in terms)
            total = total + sum(term.clamp(min=0) for term in terms)
            facts.append(slots[o][0])
            asked = o
        torch.testing.assert_close(got[b], total)
    assert active > 1 and (got[:3] > 0).any()


class Called(nn.Module):
    def __init__(self, inner: nn.Module, call: Callable[[], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self) -> Tensor:
        return self.call()


def assert_gradients(module: nn.Module, call: Callable[[], Tensor]) -> None:
    """gradcheck of a call by the module's parameters, each of which has an influence."""
    whole = Called(module, call)
    names = [name for name, _ in whole.named_parameters()]

    def run(*leaves: Tensor) -> Tensor:
        return torch.func.functional_call(whole, dict(zip(names, leaves, strict=True)), ())

    leaves = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(run, leaves)
    for name, gradient in zip(names, torch.autograd.grad(run(*leaves), leaves), strict=True):
        assert gradient.abs().max() > 1e-6, f"{name} has no influence"


def test_gradients_of_the_losses() -> None:
    contexts, top = bags(), V + EXTRA
    question, words, top = text(texts(B, J, seed=1, top=top)), texts(B, N, J, seed=2, top=top), top
    memory, true = memory_of(words, [6] * B), torch.tensor([[2, 4], [0, 5], [1, 0], [3, 3]])
    for times in (False, True):
        output = loud(OutputMap(V, SIZE, margin=20.0, times=times, matches=True, contexts=contexts))
        assert_gradients(output, lambda o=output: o.loss(question, memory, true, (true + 1) % N).sum())
    facts = [text(texts(B, J, seed=7)), text(texts(B, J, seed=8))]
    response = loud(Response(V, SIZE, margin=20.0, matches=True, contexts=contexts))
    answer = torch.tensor([1, 2, 3, 4])
    assert_gradients(response, lambda: response.loss(question, facts, answer, answer + 1).sum())


def test_negatives_are_other_written_slots_all_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    output, seen = loud(OutputMap(V, SIZE, supports=1)), []
    import attnfast.nn._memory_networks as networks

    real = networks.drawn
    monkeypatch.setattr(networks, "drawn", lambda weights: seen.append(real(weights)[1]) or real(weights))
    count = 6000
    memory = memory_of(texts(1, N, J, seed=2).expand(count, -1, -1), [5] * count)
    output.loss(text(texts(1, J, seed=1).expand(count, -1)), memory, torch.full((count, 1), 2))
    counts = torch.bincount(seen[0], minlength=N)
    assert counts[2] == 0 and counts[5] == 0
    assert (counts[[0, 1, 3, 4]] - count / 4).abs().max() < 5 * math.sqrt(count * 3 / 16)
    alone = output.loss(text(texts(2, J, seed=1)), memory_of(texts(2, N, J, seed=3), [1, 1]), torch.zeros(2, 1).long())
    assert alone.eq(0).all()


# --- R ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_response_ranks_words(name: str) -> None:
    response = loud(Response(V, SIZE, margin=0.4, **VARIANTS[name]()))
    question, fact = texts(B, J, seed=1, top=V + EXTRA), texts(B, J, seed=2, top=V + EXTRA)
    got = response(text(question), [text(fact)])
    assert got.shape == (B, V) and got[:, 0].eq(-math.inf).all()
    answer, other = torch.tensor([1, 5, 3, 7]), torch.tensor([2, 1, 4, 6])
    loss = response.loss(text(question), [text(fact)], answer, other)
    for b in range(B):
        rated = [by_hand(response.score, question[b].tolist(), [fact[b].tolist()], [w]) for w in range(1, V)]
        torch.testing.assert_close(got[b, 1:], torch.stack(rated))
        term = 0.4 - rated[answer[b] - 1] + rated[other[b] - 1]
        torch.testing.assert_close(loss[b], term.clamp(min=0))


def test_response_ranks_words_that_were_never_seen() -> None:
    contexts = bags()
    response = loud(Response(V, SIZE, margin=0.4, contexts=contexts, mixed=0.3, words=V + EXTRA))
    question, fact = texts(B, J, seed=1, top=V + EXTRA), texts(B, J, seed=2, top=V + EXTRA)
    got = response(text(question), [text(fact)])
    assert got.shape == (B, V + EXTRA) and got[:, 0].eq(-math.inf).all()
    for b in range(B):
        rated = [by_hand(response.score, question[b].tolist(), [fact[b].tolist()], [w]) for w in range(1, V + EXTRA)]
        torch.testing.assert_close(got[b, 1:], torch.stack(rated))
    assert got[:, V:].std(-1).min() > 0.01, "unseen words are told apart"


def test_response_hides_candidates_in_training_alone() -> None:
    response = loud(Response(V, SIZE, contexts=bags(), words=V + EXTRA, hide=0.5))
    given = text(texts(1, J, seed=1)), [text(texts(1, J, seed=2))]
    own = response.eval()(*given)[0, 1:V]
    with torch.no_grad():
        word = torch.arange(1, V).view(1, -1, 1)
        company = response.score(*given, Text(word, word < 0))[0]
    torch.manual_seed(0)
    response.train()
    runs = torch.stack([response(*given)[0] for _ in range(400)]).detach()
    assert runs[:, V:].std(0).max() == 0, "these have nothing to hide"
    hidden = (runs[:, 1:V] - company).abs() < 1e-12
    assert (hidden | ((runs[:, 1:V] - own).abs() < 1e-12)).all()
    assert (hidden.double().mean(0) - 0.5).abs().max() < 5 * math.sqrt(0.25 / 400)


@pytest.mark.parametrize("name", ["plain", "contexts"])
def test_stored_texts_are_keys_whose_products_are_scores(name: str) -> None:
    score, top = loud(TextScore(V, SIZE, **VARIANTS[name]())), V + EXTRA
    question, facts = text(texts(B, J, seed=1, top=top)), [text(texts(B, J, seed=9, top=top))]
    memory = text(texts(1, N, J, seed=2, top=top))
    keys = score.stored(memory)
    assert keys.shape == (1, N, SIZE)
    torch.testing.assert_close(score.asked(question, facts) @ keys[0].t(), score(question, facts, memory))


def test_wrong_answers_are_any_other_word(monkeypatch: pytest.MonkeyPatch) -> None:
    response, count, seen = loud(Response(V, SIZE)), 7000, []
    import attnfast.nn._memory_networks as networks

    real = networks.pick
    monkeypatch.setattr(networks, "pick", lambda x, place: seen.append(place) or real(x, place))
    answer = torch.full((count,), 3)
    response.loss(text(texts(1, J, seed=1).expand(count, -1)), [], answer)
    counts = torch.bincount(seen[1], minlength=V)
    assert len(counts) == V and counts[0] == 0 and counts[3] == 0
    others = counts[[1, 2, 4, 5, 6, 7]]
    assert (others - count / 6).abs().max() < 5 * math.sqrt(count * 5 / 36)


def next_word_by_hand(module: Any, sources: list[list[int]], begun: list[int]) -> Tensor:
    """Logarithms of the probabilities of the word after a sentence's beginning, the LSTM cell written out."""
    lstm, h, c = module.lstm, torch.zeros(SIZE, dtype=F64), torch.zeros(SIZE, dtype=F64)
    read = [word for source in sources for word in source if 0 < word < V]
    for word in [*read, module.end, *begun]:
        x = module.embedding.weight[word]
        i, f, g, o = (lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return (module.output.weight @ h + module.output.bias).log_softmax(0)


def test_an_rnn_writes_sentences() -> None:
    module = loud(RNNResponse(V, SIZE, length=4, end=1), 2.0)
    with torch.no_grad():
        module.output.bias[1] += 4.0  # so that some sentences end early
    sources = [texts(B, J, seed=s, top=V + EXTRA) for s in (1, 2, 3)]
    sources[0][:, 0] = torch.tensor([2, 3, 4, 5])  # one known word at least
    given = text(sources[0]), [text(s) for s in sources[1:]]
    answer = torch.tensor([[3, 4, 5], [2, 0, 0], [6, 7, 0], [0, 0, 0]])
    got, written = module.loss(*given, answer), module(*given)
    assert written.shape == (B, 4)
    for b in range(B):
        own = [source[b].tolist() for source in sources]
        words = [w for w in answer[b].tolist() if w] + [1]
        terms = [next_word_by_hand(module, own, words[:i])[word] for i, word in enumerate(words)]
        torch.testing.assert_close(got[b], -sum(terms))
        begun: list[int] = []
        while len(begun) < 4 and (best := 1 + int(next_word_by_hand(module, own, begun)[1:].argmax())) != 1:
            begun.append(best)
        assert written[b].tolist() == begun + [0] * (4 - len(begun))
    lengths = (written != 0).sum(-1)
    assert lengths.max() > 0 and lengths.min() < 4, "no sentence ends"
    assert_gradients(module, lambda: module.loss(*given, answer).sum())


def test_an_rnn_reads_one_word() -> None:
    """No padding is read after it, nor a word that is not known."""
    module = loud(RNNResponse(V, SIZE), 2.0)
    one, answer = torch.tensor([[4, 0, 0], [0, V + 1, 5]]), torch.tensor([[3, 2], [6, 0]])
    got = module.loss(text(one), [text(torch.tensor([[0], [V]]))], answer)
    for b, word in enumerate((4, 5)):
        words = [w for w in answer[b].tolist() if w] + [1]
        terms = [next_word_by_hand(module, [[word]], words[:i])[w] for i, w in enumerate(words)]
        torch.testing.assert_close(got[b], -sum(terms))


# --- I, G, words without an embedding, segmenter ---------------------------------------------------------------------


def test_input_map_hides_words_in_training_alone() -> None:
    words = torch.tensor([[1, V - 1, V, V + 2, 0]])
    read = InputMap(V, hide=0.3)
    assert read.eval()(words).known.tolist() == [[True, True, False, False, False]]
    many = torch.randint(1, V, (20_000,))
    share = read.train()(many).known.double().mean()
    assert abs(share - 0.7) < 5 * math.sqrt(0.21 / 20_000)
    assert torch.equal(read(many).words, many)


def test_generalization_writes_into_the_next_slot() -> None:
    write, read = Generalization(3), InputMap(V)
    memory = write.empty(2, 2)
    stories = torch.tensor([[[1, 2], [3, 0], [4, 5], [6, 7]], [[2, 0], [0, 0], [3, 3], [0, 0]]])
    for i in range(4):
        memory = write(memory, read(stories[:, i]))
    assert memory.text.words.tolist() == [[[6, 7], [3, 0], [4, 5]], [[2, 0], [3, 3], [0, 0]]]
    assert memory.times.tolist() == [[3, 1, 2], [0, 1, -1]]
    assert memory.text.known.tolist()[1] == [[True, False], [True, True], [False, False]]
    memory = write(memory, read(torch.tensor([[1, 1], [4, 4]])))
    memory = write(memory, read(torch.tensor([[2, 2], [5, 5]])))
    assert memory.text.words.tolist() == [[[6, 7], [1, 1], [2, 2]], [[5, 5], [3, 3], [4, 4]]]
    assert memory.times.tolist() == [[3, 4, 5], [3, 1, 2]]
    story = texts(B, N, J, seed=2)
    story[1, 4:] = 0
    network = MemoryNetwork(V, SIZE, slots=N)
    found, expected = network.remember(story), network.generalization.all_at_once(network.input_map(story))
    assert torch.equal(found.text.words, expected.text.words) and torch.equal(found.times, expected.times)


def test_contexts_remember_neighbours() -> None:
    module = ContextBags(V, V + EXTRA)
    module.observe(torch.tensor([[[1, 9, 2, 0], [3, 9, 9, 5]]]))
    assert module.left[9].nonzero().flatten().tolist() == [1, 3]
    assert module.right[9].nonzero().flatten().tolist() == [2, 5]
    assert module.left[2].eq(0).all(), "9 has no embedding and is no company"
    assert module.left[0].eq(0).all() and module.right[2].eq(0).all()


@pytest.mark.parametrize("threshold", [0.6, -0.4])
def test_segmenter_cuts_where_the_score_is_high(threshold: float) -> None:
    module = loud(WordSegmenter(V, SIZE, threshold=threshold))
    stream = texts(B, 12, seed=6)
    got, cuts = module(stream), 0
    for b in range(B):
        current: list[int] = []
        for t, word in enumerate(stream[b].tolist()):
            current.append(word)
            phi = torch.zeros(V, dtype=F64)
            for w in current:
                phi[w] += w != 0
            end = bool(module.weight @ module.embedding.t() @ phi > threshold) and word != 0
            assert got[b, t] == end
            if end:
                current, cuts = [], cuts + 1
    assert cuts > 3
    segments, others = texts(3, J, seed=7), texts(2, J, seed=8)
    terms = [threshold - module.score(segments), threshold + module.score(others)]
    torch.testing.assert_close(module.loss(segments, others), sum(x.clamp(min=0).sum() for x in terms))
    module.threshold = 50.0
    assert_gradients(module, lambda: module.loss(segments, others))


# --- the whole -------------------------------------------------------------------------------------------------------


def world(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who went where; the fact and the answer to "where is he" are of the newest sentence about him.

    Words: 1 to 4 people, 5 to 8 places, 9 "went", 10 "where".
    """
    who, place = (
        1 + torch.randint(0, 4, (count, 6), generator=generator),
        5 + torch.randint(0, 4, (count, 6), generator=generator),
    )
    asked = who[torch.arange(count), torch.randint(0, 6, (count,), generator=generator)]
    newest = (who == asked.unsqueeze(1)).long().mul(torch.arange(1, 7)).argmax(1, keepdim=True)
    story = torch.stack([who, torch.full_like(who, 9), place], -1)
    question = torch.stack([torch.full_like(asked, 10), asked], -1)
    return story, question, newest, place.gather(1, newest).squeeze(1)


@pytest.mark.parametrize("times", [True, False])
def test_learns_a_small_world_if_it_knows_the_time(times: bool) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    network = MemoryNetwork(11, 20, supports=1, slots=6, margin=0.2, times=times)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    read, write = network.input_map, network.generalization
    for _ in range(250):
        story, question, place, answer = world(64, generator)
        loss = network.loss(write.all_at_once(read(story)), question, place, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    story, question, place, answer = world(500, generator)
    found = network(story, question)
    right = (found.answers.argmax(-1) == answer).double().mean()
    facts = (found.places == place).double().mean()
    if times:
        assert right > 0.97 and facts > 0.97, f"{right} of answers, {facts} of facts"
    else:
        assert facts < 0.9, "without the time it cannot tell the newest"


def test_parts_can_be_replaced() -> None:
    class First(nn.Module):
        """O that always finds the first slot."""

        def forward(self, question: Text, memory: Memory) -> tuple[Tensor, list[Text]]:
            return torch.zeros(len(question.words), 1).long(), [Text(*(x[:, 0] for x in memory.text))]

    response = RNNResponse(V, SIZE, length=3)
    network = MemoryNetwork(V, SIZE, slots=N, output_map=First(), response=response)
    story, question = texts(B, N, J, seed=1), texts(B, J, seed=2)
    got = network(story, question)
    assert got.places.eq(0).all()
    assert torch.equal(got.answers, response(text(question), [text(story[:, 0])]))
    assert network.input_map.vocabulary == V and isinstance(network.generalization, Generalization)


def test_what_the_network_is_told_reaches_its_parts() -> None:
    contexts = bags()
    network = MemoryNetwork(
        V, SIZE, slots=7, supports=3, margin=0.7, hide=0.25, contexts=contexts, times=True, matches=True, mixed=0.3
    )
    read, write, output, response = network.input_map, network.generalization, network.output_map, network.response
    assert (read.vocabulary, read.hide, write.slots, output.supports) == (V, 0.25, 7, 3)
    assert output.score.times is not None and response.score.times is None
    for part in (output, response):
        assert (part.margin, part.score.mixed, part.score.vocabulary, part.score.size) == (0.7, 0.3, V, SIZE)
        assert part.score.contexts is contexts and part.score.matches is not None
    assert output.score.words is not response.score.words
    plain = MemoryNetwork(V, SIZE)
    assert plain.output_map.score.times is plain.output_map.score.matches is plain.response.score.matches is None


def test_whole_loss_is_the_sum_of_its_parts_and_the_seed_decides() -> None:
    network = loud(MemoryNetwork(V, SIZE, slots=N, supports=2, matches=True))  # the order of the facts counts
    story, question = texts(B, N, J, seed=1), texts(B, J, seed=2)
    places, answer = torch.tensor([[0, 1], [2, 3], [4, 5], [1, 1]]), torch.tensor([1, 2, 3, 4])
    torch.manual_seed(6)
    got = network.loss(story, question, places, answer)
    torch.manual_seed(6)
    memory, asked = network.remember(story), network.input_map(question)
    facts = [text(story[torch.arange(B), places[:, hop]]) for hop in range(2)]
    expected = network.output_map.loss(asked, memory, places).sum()
    expected = expected + network.response.loss(asked, facts, answer).sum()
    torch.testing.assert_close(got, expected)
    assert not torch.equal(network.loss(story, question, places, answer), got)


def test_begins_as_its_notes_say() -> None:
    score = TextScore(300, 40, contexts=ContextBags(300, 300), matches=True, times=True)
    for parameter in (score.words, score.neighbours, score.matches, WordSegmenter(300, 40).embedding):
        drawn = parameter.detach()
        assert abs(drawn.std() / 0.1 - 1) < 6 / math.sqrt(2 * drawn.numel())
        assert abs((drawn / 0.1).pow(4).mean() - 3) < 6 * math.sqrt(96 / drawn.numel())
    assert 0.06 < score.times.std() < 0.14


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "hide": (lambda: InputMap(5, 2.0), ValueError, r"hide: expected a probability in \[0, 1\], got 2\.0"),
    "slots": (lambda: Generalization(0), ValueError, "slots: expected an integer > 0, got 0"),
    "contexts": (lambda: ContextBags(5, 4), ValueError, "words: expected at least vocabulary = 5, got 4"),
    "vocabulary": (lambda: Response(2, 3), ValueError, "vocabulary: expected at least two words beside nil, got 2"),
    "words of R": (lambda: Response(5, 3, words=6), ValueError, r"words: expected 5 <= words <= 5 \(those with"),
    "too few words": (
        lambda: Response(5, 3, words=4, contexts=ContextBags(5, 9)),
        ValueError,
        "words: expected 5 <= words <= 9",
    ),
    "supports": (lambda: OutputMap(5, 3, supports=0), ValueError, "supports: expected an integer > 0, got 0"),
    "words": (lambda: InputMap(5)(torch.ones(3)), TypeError, "words: expected integers"),
    "story": (
        lambda: MemoryNetwork(5, 3)(torch.ones(2, 3).long(), torch.ones(2, 3).long()),
        ValueError,
        r"story: expected \[B, N, J\], got \[2, 3\]",
    ),
    "question": (
        lambda: MemoryNetwork(5, 3)(torch.ones(2, 3, 1).long(), torch.ones(2).long()),
        ValueError,
        r"question: expected \[B, J\], got \[2\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    call, exception, pattern = WRONG[name]
    with pytest.raises(exception, match=pattern):
        call()
