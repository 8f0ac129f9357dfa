"""Encoder-decoders for examples/translate.py, each with the traps of its paper heeded, and beam search for all of them.

A model encodes a batch once (`encode`) and then gives logits for the next token (`step`); its state is a tuple of
tensors whose first axis is the batch, so that search can reorder it. `forward` gives the logits of all steps for a
known target; a model whose steps do not depend on one another computes them side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sentences import BEGIN, END, PAD
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attnfast.nn import BahdanauAttention, LuongAttention, MultiheadAttention, ProjectedMemory

State = tuple[Tensor, ...]


class Encoder(nn.Module):
    """A bidirectional GRU or LSTM over embedded words; padding is neither read nor written."""

    def __init__(
        self, words: int, embedding: int, hidden: int, kind: type[nn.GRU] | type[nn.LSTM] = nn.GRU, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=PAD)
        self.rnn = kind(embedding, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Annotations ``[B, S, 2n]``, 0 behind each length, and the last states of both directions, ``[B, n]`` each."""
        packed = pack_padded_sequence(
            self.dropout(self.embedding(source)), lengths, batch_first=True, enforce_sorted=False
        )
        out, last = self.rnn(packed)
        forward, backward = last[0] if isinstance(last, tuple) else last
        return (
            self.dropout(pad_packed_sequence(out, batch_first=True, total_length=source.shape[1])[0]),
            forward,
            backward,
        )


class EncoderDecoder(nn.Module):
    """Base: what training and search need of a model."""

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        """What all steps share, and what the first one starts from; the batch is the first axis of every part."""
        raise NotImplementedError

    def step(self, token: Tensor, state: State, position: int) -> tuple[Tensor, State, Tensor | None]:
        """Logits ``[B, V]`` after `token` ``[B]``, the next state, and weights ``[B, S]`` where there are any."""
        raise NotImplementedError

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of each next token, target ``[B, T]`` given."""
        state = self.encode(source, lengths)
        logits = []
        for position in range(target.shape[1]):
            step, state, _ = self.step(target[:, position], state, position)
            logits.append(step)
        return torch.stack(logits, dim=1)


class FixedContext(EncoderDecoder):
    r"""RNN encoder-decoder with one context for all steps (Cho et al. 2014; Sutskever et al. 2014).

    The context is the last valid state of the encoder (``"last"``), :math:`\tanh(W h_T)` of it (``"mapped"``), or
    :math:`\tanh` of the mean over all states (``"pooled"``). It feeds every step of the decoder and the read-out.
    """

    def __init__(
        self, form: str, source_words: int, target_words: int, embedding: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.form = form
        self.encoder = Encoder(source_words, embedding, hidden, dropout=dropout)
        self.map = nn.Linear(2 * hidden, 2 * hidden) if form == "mapped" else None
        self.start = nn.Linear(2 * hidden, hidden)
        self.embedding = nn.Embedding(target_words, embedding, padding_idx=PAD)
        self.rnn = nn.GRU(embedding + 2 * hidden, hidden, batch_first=True)
        self.readout = Readout(hidden, embedding, 2 * hidden, hidden, target_words, dropout)

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        annotations, forward, backward = self.encoder(source, lengths)
        context = torch.cat([forward, backward], dim=-1)
        if self.map is not None:
            context = torch.tanh(self.map(context))
        elif self.form == "pooled":
            context = torch.tanh(annotations.sum(1) / lengths.unsqueeze(1))
        return context, torch.tanh(self.start(context))

    def step(self, token: Tensor, state: State, position: int) -> tuple[Tensor, State, Tensor | None]:
        context, hidden = state
        logits, hidden = self._run(token.unsqueeze(1), context, hidden)
        return logits.squeeze(1), (context, hidden), None

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        return self._run(target, *self.encode(source, lengths))[0]

    def _run(self, target: Tensor, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embedding(target)
        contexts = context.unsqueeze(1).expand(-1, target.shape[1], -1)
        states, last = self.rnn(torch.cat([embedded, contexts], dim=-1), hidden.unsqueeze(0))
        return self.readout(states, embedded, contexts), last.squeeze(0)


class Readout(nn.Module):
    """Pairwise maxout of state, embedding and context, then the logits (Bahdanau et al. 2015, appendix A.2.2)."""

    def __init__(self, state: int, embedding: int, context: int, size: int, words: int, dropout: float) -> None:
        super().__init__()
        self.parts = nn.Linear(state + embedding + context, 2 * size)
        self.words = nn.Linear(size, words)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor, embedded: Tensor, context: Tensor) -> Tensor:
        parts = self.parts(torch.cat([state, embedded, context], dim=-1))
        return self.words(self.dropout(parts.unflatten(-1, (-1, 2)).amax(-1)))


class Bahdanau(EncoderDecoder):
    """Bahdanau, Cho and Bengio (2015): scores from the state *before* the step; keys projected once for a sentence."""

    def __init__(self, source_words: int, target_words: int, embedding: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.encoder = Encoder(source_words, embedding, hidden, dropout=dropout)
        self.start = nn.Linear(hidden, hidden)
        self.attention = BahdanauAttention(hidden, 2 * hidden, hidden)
        self.embedding = nn.Embedding(target_words, embedding, padding_idx=PAD)
        self.cell = nn.GRUCell(embedding + 2 * hidden, hidden)
        self.readout = Readout(hidden, embedding, 2 * hidden, hidden, target_words, dropout)

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        annotations, _, backward = self.encoder(source, lengths)
        projected = self.attention.project_memory(annotations)
        return projected.keys, projected.values, lengths, torch.tanh(self.start(backward))

    def step(self, token: Tensor, state: State, position: int) -> tuple[Tensor, State, Tensor | None]:
        keys, values, lengths, hidden = state
        embedded = self.embedding(token)
        context, weights = self.attention.step(hidden, ProjectedMemory(keys, values), lengths)
        logits = self.readout(hidden, embedded, context)
        return logits, (keys, values, lengths, self.cell(torch.cat([embedded, context], -1), hidden)), weights

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """The loop holds what depends on the step before; words are read out for all steps at once."""
        keys, values, lengths, hidden = self.encode(source, lengths)
        memory = ProjectedMemory(keys, values)
        embedded = self.embedding(target)
        states, contexts = [], []
        for word in embedded.unbind(1):
            context, _ = self.attention.step(hidden, memory, lengths, return_weights=False)
            states.append(hidden)
            contexts.append(context)
            hidden = self.cell(torch.cat([word, context], -1), hidden)
        return self.readout(torch.stack(states, 1), embedded, torch.stack(contexts, 1))


class Luong(EncoderDecoder):
    r"""Luong, Pham and Manning (2015): scores from the state *after* the step, :math:`\tilde h = \tanh(W_c [c; h])`.

    With `feeding` each step's :math:`\tilde h` is part of the next one's input; without, all steps attend at once.
    """

    def __init__(
        self, source_words: int, target_words: int, embedding: int, hidden: int, dropout: float, score: str,
        local: str | None = None, feeding: bool = False, window: int = 5, max_length: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = Encoder(source_words, embedding, hidden // 2, nn.LSTM, dropout)
        self.start = nn.Linear(hidden, hidden)
        length = max_length if score == "location" else None
        self.attention = LuongAttention(hidden, hidden, score, local, window, length)
        self.embedding = nn.Embedding(target_words, embedding, padding_idx=PAD)
        self.feeding = feeding
        self.rnn = nn.LSTM(embedding + (hidden if feeding else 0), hidden, batch_first=True)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.words = nn.Linear(hidden, target_words)
        self.dropout = nn.Dropout(dropout)

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        annotations, forward, backward = self.encoder(source, lengths)
        hidden = torch.tanh(self.start(torch.cat([forward, backward], -1)))
        projected = self.attention.project_memory(annotations)
        return projected.keys, projected.values, lengths, hidden, torch.zeros_like(hidden), torch.zeros_like(hidden)

    def step(self, token: Tensor, state: State, position: int) -> tuple[Tensor, State, Tensor | None]:
        return self._step(self.embedding(token), state, position, True)

    def _step(self, embedded: Tensor, state: State, position: int, wanted: bool) -> tuple[Tensor, State, Tensor | None]:
        keys, values, lengths, hidden, cell, fed = state
        x = torch.cat([embedded, fed], -1) if self.feeding else embedded
        out, (hidden, cell) = self.rnn(x.unsqueeze(1), (hidden.unsqueeze(0), cell.unsqueeze(0)))
        top = out.squeeze(1)
        options = {"position": position} if self.attention.local == "m" else {}
        context, weights = self.attention.step(
            top, ProjectedMemory(keys, values), lengths, return_weights=wanted, **options
        )
        fed = torch.tanh(self.combine(torch.cat([context, top], -1)))
        return self.words(self.dropout(fed)), (keys, values, lengths, hidden[0], cell[0], fed), weights

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        state = self.encode(source, lengths)
        embedded = self.embedding(target)
        if self.feeding:
            logits = []
            for position, word in enumerate(embedded.unbind(1)):
                step, state, _ = self._step(word, state, position, False)
                logits.append(step)
            return torch.stack(logits, 1)
        keys, values, lengths, hidden, cell, _ = state
        states, _ = self.rnn(embedded, (hidden.unsqueeze(0), cell.unsqueeze(0)))
        context, _ = self.attention(states, ProjectedMemory(keys, values), lengths, return_weights=False)
        return self.words(self.dropout(torch.tanh(self.combine(torch.cat([context, states], -1)))))


class TransformerLayer(nn.Module):
    """Post-norm layer of Vaswani et al. (2017), with attention to a memory where `cross`."""

    def __init__(self, size: int, heads: int, dropout: float, cross: bool) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(size, heads, dropout, batch_first=True)
        self.cross_attention = MultiheadAttention(size, heads, dropout, batch_first=True) if cross else None
        self.inner = nn.Sequential(nn.Linear(size, 4 * size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * size, size))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3 if cross else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, padding: Tensor | None, causal: Tensor | None, memory: Tensor | None = None,
        memory_padding: Tensor | None = None, weights: bool = False, last: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """`last`: what comes out is that of the last position of x alone."""
        query = x[:, -1:] if last else x
        y, _ = self.self_attention(query, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)
        x = self.norms[0](query + self.dropout(y))
        seen = None
        if self.cross_attention is not None:
            y, seen = self.cross_attention(x, memory, memory, key_padding_mask=memory_padding, need_weights=weights)
            x = self.norms[1](x + self.dropout(y))
        return self.norms[-1](x + self.dropout(self.inner(x))), seen


class Transformer(EncoderDecoder):
    """Vaswani et al. (2017): embeddings times sqrt(d), sinusoidal positions, output tied to the target embedding."""

    def __init__(
        self, source_words: int, target_words: int, size: int, heads: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.size = size
        self.source_embedding = nn.Embedding(source_words, size, padding_idx=PAD)
        self.target_embedding = nn.Embedding(target_words, size, padding_idx=PAD)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=size**-0.5)
        self.encoder = nn.ModuleList(TransformerLayer(size, heads, dropout, False) for _ in range(layers))
        self.decoder = nn.ModuleList(TransformerLayer(size, heads, dropout, True) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        padding = source == PAD
        x = self._embed(self.source_embedding, source)
        for layer in self.encoder:
            x, _ = layer(x, padding, None)
        return x, padding, *(x[:, :0] for _ in self.decoder)

    def step(self, token: Tensor, state: State, position: int) -> tuple[Tensor, State, Tensor | None]:
        """The state holds what entered each layer of the decoder so far; only the new position goes through them."""
        memory, padding, *entered = state
        x = self._embed(self.target_embedding, token.unsqueeze(1), position)
        weights = None
        for number, layer in enumerate(self.decoder):
            entered[number] = torch.cat([entered[number], x], 1)
            x, weights = layer(entered[number], None, None, memory, padding, number == len(self.decoder) - 1, True)
        logits = nn.functional.linear(x, self.target_embedding.weight).squeeze(1)
        return logits, (memory, padding, *entered), None if weights is None else weights.squeeze(1)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        memory, padding, *_ = self.encode(source, lengths)
        tokens = target.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)  # torch's polarity: True is hidden
        x = self._embed(self.target_embedding, target)
        for layer in self.decoder:
            x, _ = layer(x, None, causal, memory, padding)
        return nn.functional.linear(x, self.target_embedding.weight)

    def _embed(self, table: nn.Embedding, tokens: Tensor, first: int = 0) -> Tensor:
        places = sinusoids(first + tokens.shape[1], self.size)[first:]
        return self.dropout(table(tokens) * self.size**0.5 + places)


def sinusoids(tokens: int, size: int) -> Tensor:
    """Positions of Vaswani et al. (2017, section 3.5), ``[tokens, size]``."""
    rates = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(tokens).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


@torch.no_grad()
def greedy(model: EncoderDecoder, source: Tensor, lengths: Tensor, most: int) -> list[list[int]]:
    """The likeliest token at each step, ``[B]`` lists that may contain an end."""
    return search(model, source, lengths, most, 1)


@torch.no_grad()
def search(model: EncoderDecoder, source: Tensor, lengths: Tensor, most: int, beam: int) -> list[list[int]]:
    """Beam search, batched; the best finished hypothesis of each sentence by mean log-probability of its tokens.

    Hypotheses that have ended keep their place in the beam, so that a longer one must beat them.
    """
    B = source.shape[0]
    state = tuple(part.repeat_interleave(beam, 0) for part in model.encode(source, lengths))
    total = torch.full((B, beam), -torch.inf)
    total[:, 0] = 0.0  # all beams are equal at first: one of them counts
    tokens = torch.full((B * beam, 1), BEGIN)
    ended = torch.zeros(B * beam, dtype=torch.bool)
    length = torch.ones(B * beam)
    for position in range(most):
        logits, state, _ = model.step(tokens[:, -1], state, position)
        scores = logits.float().log_softmax(-1)
        words = scores.shape[-1]
        # What has ended goes on as padding, at no cost.
        scores[ended] = -torch.inf
        scores[ended, PAD] = 0.0
        scores[~ended, PAD] = -torch.inf
        total, chosen = (total.reshape(-1, 1) + scores).view(B, beam * words).topk(beam, -1)
        rows = (torch.arange(B).unsqueeze(1) * beam + chosen // words).flatten()
        word = (chosen % words).flatten()
        state = tuple(part[rows] for part in state)
        length = length[rows] + (~ended[rows]).float()
        ended = ended[rows] | (word == END)
        tokens = torch.cat([tokens[rows], word.unsqueeze(1)], 1)
        if ended.all():
            break
    mean = total / length.view(B, beam)
    mean = mean.where(ended.view(B, beam), mean - 1e4)  # unfinished ones only where nothing has ended
    best = torch.arange(B) * beam + mean.argmax(-1)
    return tokens[best, 1:].tolist()


@torch.no_grad()
def alignment(model: EncoderDecoder, source: Tensor, lengths: Tensor, output: list[int]) -> Tensor:
    """Weights ``[len(output), S]`` of one sentence while its own output is read back."""
    state = model.encode(source, lengths)
    rows = []
    token = torch.tensor([BEGIN])
    for position, word in enumerate(output):
        _, state, weights = model.step(token, state, position)
        if weights is None:
            raise ValueError("this model has no weights to draw")
        rows.append(weights[0])
        token = torch.tensor([word])
    return torch.stack(rows)


Maker = Callable[[], EncoderDecoder]
