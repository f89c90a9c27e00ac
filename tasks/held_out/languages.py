"""Texts of other kinds than help texts: sources of Python's library, and names of characters."""

import functools
import importlib.util
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks.data import Batch
from tasks.held_out.layers import join_heads, split_heads
from tasks.task import Problem, cross_entropy

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
MODULES = "argparse ast difflib doctest fractions inspect optparse pickle statistics tarfile turtle typing zipfile"
HELD_OUT_WINDOWS = 128


def windows(
    text: str, alphabet: str, length: int
) -> tuple[Callable[[Generator, int], Batch], Callable[[], Batch]]:
    """Sample and held-out functions of (x, y) windows [count, length] of a text, y moved by one; its last tenth is
    held out. A character that is not in the alphabet is that after its last."""
    index = {character: i for i, character in enumerate(alphabet)}
    tokens = torch.tensor([index.get(character, len(alphabet)) for character in text])
    cut = tokens.unfold(0, length + 1, 1)
    train = len(tokens) * 9 // 10

    def sample(generator: Generator, count: int) -> Batch:
        x = cut[torch.randint(train - length, (count,), generator=generator)]
        return x[:, :-1], x[:, 1:]

    def held_out() -> Batch:
        x = cut[train::length][:HELD_OUT_WINDOWS]
        return x[:, :-1], x[:, 1:]

    return sample, held_out


def language_model(
    name: str, build: Callable[[int], nn.Module], text: str, alphabet: str, length: int, **settings
) -> Problem:
    """Predict the next character of windows of `text`; build: of the number of tokens."""
    sample, held_out = windows(text, alphabet, length)
    tokens = len(alphabet) + 1
    return Problem(
        name,
        lambda: build(tokens),
        sample,
        lambda model, x, y: cross_entropy(model(x), y),
        held_out=held_out,
        ceiling=math.log(tokens),
        eval_size=128,
        **settings,
    )


# ------------------------------------------------------------------------------- sources of Python


@functools.cache
def python_sources() -> str:
    """The sources of `MODULES`, about 800,000 characters; they vary with the Python version."""
    found = [importlib.util.find_spec(name) for name in MODULES.split()]
    return "\n".join(Path(spec.origin).read_text(encoding="utf-8") for spec in found if spec and spec.origin)


def rotate(x: Tensor) -> Tensor:
    """Turn the pairs (i, i + size / 2) of x [..., T, size] by angles that grow with the position (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2]).unsqueeze(-1) * 100.0 ** (-torch.arange(half) / half)
    cos, sin = torch.cos(angle).to(x), torch.sin(angle).to(x)
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GroupedQueries(nn.Module):
    """Causal attention with rotated queries and keys, whose keys and values are shared by groups of heads."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.shared = heads, shared
        self.q, self.proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, shared * size, bias=False), nn.Linear(width, shared * size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        group = self.heads // self.shared
        q = rotate(split_heads(self.q(x), self.heads)).unflatten(-3, (self.shared, group))
        k, v = rotate(split_heads(self.k(x), self.shared)), split_heads(self.v(x), self.shared)
        scores = q @ k.unsqueeze(-3).transpose(-2, -1) / math.sqrt(q.shape[-1])
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v.unsqueeze(-3)
        return self.proj(join_heads(mixed.flatten(-4, -3)))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Llama(nn.Module):
    """A decoder as of Touvron et al. 2023, "LLaMA": RMSNorm, SwiGLU, rotated grouped queries, no biases.

    Tokens [B, T] -> logits [B, T, tokens].
    """

    def __init__(self, tokens: int, *, width: int, heads: int, shared: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.attend = nn.ModuleList(GroupedQueries(width, heads, shared) for _ in range(depth))
        self.feed = nn.ModuleList(SwiGLU(width, hidden) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, tokens, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, (attend, feed) in enumerate(zip(self.attend, self.feed, strict=True)):
            h = h + attend(self.norms[2 * i](h))
            h = h + feed(self.norms[2 * i + 1](h))
        return self.head(self.norm(h))


def llama_python() -> Problem:
    """The next character of Python's sources."""
    return language_model(
        "llama-python",
        lambda tokens: Llama(tokens, width=108, heads=6, shared=2, hidden=290, depth=4),
        python_sources(),
        CHARACTERS,
        64,
        batch_size=8,
        steps=900,
    )


# ----------------------------------------------------------------------------- names of characters


@functools.cache
def character_names() -> str:
    """The names of the characters of Unicode 3.2, which every Python has, a line each, in a fixed random order."""
    names = [unicodedata.ucd_3_2_0.name(chr(code), "") for code in range(0x110000)]
    names = [name for name in names if name and not name.startswith(("CJK", "HANGUL SYLLABLE"))]
    order = torch.randperm(len(names), generator=Generator().manual_seed(0)).tolist()
    return "\n".join(names[i] for i in order)


class DilatedBlock(nn.Module):
    """x + mix(a * sigmoid(b)), where a and b are causal convolutions of norm(x) with gaps between their three taps."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.LayerNorm(width)
        self.conv, self.mix = nn.Conv1d(width, 2 * width, 3, dilation=dilation), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        past = functional.pad(self.norm(x).transpose(-2, -1), (2 * self.dilation, 0))
        return x + self.mix(functional.glu(self.conv(past), -2)).transpose(-2, -1)


class TemporalConvolutions(nn.Module):
    """Tokens [B, T] -> logits [B, T, tokens] by `DilatedBlock`s whose gaps double (Bai et al. 2018, "An Empirical
    Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling")."""

    def __init__(self, tokens: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(DilatedBlock(width, 2**i) for i in range(depth)))
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


def tcn_names() -> Problem:
    """The next character of the names of Unicode's characters."""
    text = character_names()
    alphabet = "".join(sorted(set(text)))
    return language_model(
        "tcn-names",
        lambda tokens: TemporalConvolutions(tokens, width=100, depth=5),
        text,
        alphabet,
        48,
        batch_size=16,
        steps=1000,
    )
