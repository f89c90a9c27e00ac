"""Sequences with a rule behind them, drawn afresh: recall, sorting, and nested expressions."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks.data import Batch
from tasks.held_out.layers import dense, join_heads, split_heads
from tasks.task import Problem, cross_entropy

# ------------------------------------------------------------------------------------------ recall

KEYS, VALUES, PAIRS, WRONG = 20, 30, 8, 0.1


def recall(generator: Generator, count: int) -> Batch:
    """Pairs key, value, of different keys, then all keys once more in another order: x [count, 3 PAIRS] tokens, and
    the values that belong to the last PAIRS of them, of which a share WRONG is replaced by any value."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (count, PAIRS), generator=generator)
    order = torch.rand(count, PAIRS, generator=generator).argsort(1)
    pairs = torch.stack([keys, KEYS + values], -1).flatten(1)
    y, other = values.gather(1, order), torch.randint(VALUES, (count, PAIRS), generator=generator)
    y = torch.where(torch.rand(count, PAIRS, generator=generator) < WRONG, other, y)
    return torch.cat([pairs, keys.gather(1, order)], 1), y


class Retention(nn.Module):
    """Linear attention whose memory decays by another factor for each head, without a softmax (Sun et al. 2023,
    "Retentive Network", equation 5), gated. A causal convolution of three steps comes before queries and keys.

    [B, T, width] -> [B, T, width]
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.near = nn.Conv1d(width, width, 3, groups=width)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.norm, self.proj = nn.RMSNorm(width // heads), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        near = x + self.near(functional.pad(x.transpose(-2, -1), (2, 0))).transpose(-2, -1)
        q, k, v = (split_heads(y, self.heads) for y in (self.q(near), self.k(near), self.v(x)))
        steps = torch.arange(x.shape[-2], dtype=torch.float32)
        ago = (steps.unsqueeze(1) - steps).to(x)
        decay = 1 - 2.0 ** (-4 - torch.arange(self.heads)).to(x)
        kept = torch.where(ago >= 0, decay[:, None, None] ** ago.clamp(min=0), 0.0)
        mixed = (q @ k.transpose(-2, -1) * kept / math.sqrt(q.shape[-1])) @ v
        return self.proj(functional.silu(self.gate(x)) * join_heads(self.norm(mixed)))


class RetentiveNetwork(nn.Module):
    """Blocks of retention and a network of each token: tokens [B, T] -> logits of the last, [B, answers, values]."""

    def __init__(self, tokens: int, values: int, answers: int, *, width: int, heads: int, hidden: int, depth: int):
        super().__init__()
        self.answers = answers
        self.embed = nn.Embedding(tokens, width)
        self.mix = nn.ModuleList(Retention(width, heads) for _ in range(depth))
        self.feed = nn.ModuleList(dense([width, hidden, width], nn.GELU) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, values)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, (mix, feed) in enumerate(zip(self.mix, self.feed, strict=True)):
            h = h + mix(self.norms[2 * i](h))
            h = h + feed(self.norms[2 * i + 1](h))
        return self.head(self.norm(h)[..., -self.answers :, :])


def retention_recall() -> Problem:
    """Which value came after a key."""
    return Problem(
        "stream-retention-recall",
        lambda: RetentiveNetwork(KEYS + VALUES, VALUES, PAIRS, width=76, heads=4, hidden=152, depth=2),
        recall,
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=32,
        steps=1200,
        ceiling=math.log(VALUES),
        eval_size=256,
    )


# ----------------------------------------------------------------------------------------- sorting

LENGTH, SYMBOLS = 10, 40
ORDER = torch.randperm(SYMBOLS, generator=Generator().manual_seed(0))


def unsorted(generator: Generator, count: int) -> Batch:
    """Symbols, then the same in the order of a secret alphabet without the last, begun by a mark: [count, 2 LENGTH];
    and the sorted ones [count, LENGTH]."""
    rank = torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
    y = ORDER[rank.sort(1).values]
    begin = torch.full((count, 1), SYMBOLS)
    return torch.cat([ORDER[rank], begin, y[:, :-1]], 1), y


class GatedUnit(nn.Module):
    """A step of a gated recurrent unit (Cho et al. 2014): the reset gate multiplies the state before its matrix."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.gates, self.new = nn.Linear(fan_in + width, 2 * width), nn.Linear(fan_in + width, width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        reset, keep = torch.sigmoid(self.gates(torch.cat([x, h], -1))).chunk(2, -1)
        return keep * h + (1 - keep) * torch.tanh(self.new(torch.cat([x, reset * h], -1)))


class Translator(nn.Module):
    """A recurrent encoder, and a decoder that looks at all its states (Bahdanau et al. 2015): v . tanh(a h + b s).

    The decoder is given the right symbols so far. Tokens [B, 2 LENGTH] -> logits [B, LENGTH, SYMBOLS].
    """

    def __init__(self, embed: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.source, self.target = nn.Embedding(SYMBOLS, embed), nn.Embedding(SYMBOLS + 1, embed)
        self.read, self.write = GatedUnit(embed, width), GatedUnit(embed + width, width)
        self.seen, self.sought = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.score, self.head = nn.Linear(width, 1, bias=False), nn.Linear(2 * width, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        given, before = x.split(LENGTH, -1)
        h = self.source.weight.new_zeros(*x.shape[:-1], self.width)
        states = []
        for token in self.source(given).unbind(-2):
            h = self.read(token, h)
            states.append(h)
        memory = torch.stack(states, -2)
        seen, outputs = self.seen(memory), []
        for token in self.target(before).unbind(-2):
            weights = self.score(torch.tanh(seen + self.sought(h).unsqueeze(-2))).softmax(-2)
            found = (weights * memory).sum(-2)
            h = self.write(torch.cat([token, found], -1), h)
            outputs.append(torch.cat([h, found], -1))
        return self.head(torch.stack(outputs, -2))


def seq2seq_sort() -> Problem:
    """Sorting by an alphabet that must be found."""
    return Problem(
        "stream-seq2seq-sort",
        lambda: Translator(28, 84),
        unsorted,
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=32,
        steps=1000,
        ceiling=math.log(SYMBOLS),
        eval_size=256,
    )


# ------------------------------------------------------------------------------------- expressions

DIGITS, OPERATORS, ARGUMENTS, DEPTH_TWO = 10, 4, 3, 4
BLANK = DIGITS + OPERATORS


def apply(operator: Tensor, values: Tensor) -> Tensor:
    """Maximum, minimum, median or sum modulo 10 of values [..., n], by the operators 0 to 3 [...]."""
    results = [values.amax(-1), values.amin(-1), values.sort(-1).values[..., (values.shape[-1] - 1) // 2]]
    return torch.stack([*results, values.sum(-1) % DIGITS], -1).gather(-1, operator.unsqueeze(-1)).squeeze(-1)


def expressions(generator: Generator, count: int) -> Batch:
    """An operator and four arguments, each an operator and three digits, or a digit and blanks; the value.

    Tokens [count, 17]: digits, operators, blank. After Nangia & Bowman 2018, "ListOps".
    """
    outer = torch.randint(OPERATORS, (count,), generator=generator)
    inner = torch.randint(OPERATORS, (count, DEPTH_TWO), generator=generator)
    digits = torch.randint(DIGITS, (count, DEPTH_TWO, ARGUMENTS), generator=generator)
    plain = torch.rand(count, DEPTH_TWO, generator=generator) < 0.6
    value = torch.where(plain, digits[..., 0], apply(inner, digits))
    nested = torch.cat([DIGITS + inner.unsqueeze(-1), digits], -1)
    simple = torch.cat([digits[..., :1], torch.full_like(digits, BLANK)], -1)
    tokens = torch.where(plain.unsqueeze(-1), simple, nested).flatten(1)
    return torch.cat([DIGITS + outer.unsqueeze(-1), tokens], 1), apply(outer, value)


class Experts(nn.Module):
    """The two most likely of several networks for every token, weighted by a softmax over these two (Shazeer et al.
    2017, "Outrageously Large Neural Networks", without its noise)."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(dense([width, hidden, width], nn.ReLU) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        second = logits.topk(2, -1).values[..., 1:]
        share = logits.masked_fill(logits < second, -1e4).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return (outputs * share.unsqueeze(-2)).sum(-1)


class SparseTransformer(nn.Module):
    """A transformer whose feed-forward parts are `Experts` and whose attention falls off with distance, by another
    slope for each head (Press et al. 2022, "Train Short, Test Long"); tokens [B, T] -> classes, by the mean of all."""

    def __init__(self, tokens: int, classes: int, *, width: int, heads: int, hidden: int, experts: int, depth: int):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(tokens, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.experts = nn.ModuleList(Experts(width, hidden, experts) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        steps = torch.arange(x.shape[-1])
        gap = (steps.unsqueeze(1) - steps).to(h)
        slopes = 2.0 ** -torch.arange(self.heads).to(h)
        # Before and after are told apart: what comes later is half as far.
        bias = -slopes[:, None, None] * torch.where(gap > 0, gap, -gap / 2)
        for i, (qkv, proj, experts) in enumerate(zip(self.qkv, self.proj, self.experts, strict=True)):
            q, k, v = (split_heads(y, self.heads) for y in qkv(self.norms[2 * i](h)).chunk(3, -1))
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
            h = h + proj(join_heads(weights @ v))
            h = h + experts(self.norms[2 * i + 1](h))
        return self.head(h.mean(-2))


def moe_listops() -> Problem:
    """The value of an expression of two levels."""
    return Problem(
        "stream-moe-listops",
        lambda: SparseTransformer(BLANK + 1, DIGITS, width=60, heads=3, hidden=84, experts=6, depth=3),
        expressions,
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=32,
        steps=1500,
        ceiling=math.log(DIGITS),
        eval_size=512,
    )
