"""Transformers: a character language model and a classifier of image patches, one module."""

import math

import torch
from torch import Generator, Tensor, nn

from tasks import data
from tasks.task import Supervised, Task, choice, horizon, log_uniform

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Attention(nn.Module):
    """Multi-head self-attention, written out so that it can be differentiated twice and vmapped.

    fused: one projection `qkv` laid out q | k | v, each (heads, head_dim); else `q`, `k` and `v`.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, fused: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads. Change either.")
        self.heads, self.causal, self.fused = heads, causal, fused
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (self._split(a) for a in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return self.proj((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, heads * d] -> [B, heads, T, d]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


class Block(nn.Module):
    """x + attn(ln1(x)), then x + fc2(act(fc1(ln2(x))))."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, *, causal: bool, fused: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal=causal, fused=fused)
        self.ln2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.fc2(self.act(self.fc1(self.ln2(x))))


class Transformer(nn.Module):
    """Pre-norm transformer.

    Args:
        embed: from the input to the stream [B, length, width]: nn.Embedding of tokens or nn.Linear
            of patches.
        length: tokens of an input.
        causal: True predicts at every position, from it and those before it (logits [B, length,
            classes]); False reads the mean over positions (logits [B, classes]).
    """

    def __init__(
        self,
        embed: nn.Embedding | nn.Linear,
        length: int,
        classes: int,
        *,
        width: int,
        heads: int,
        depth: int,
        hidden: int,
        activation: str = "gelu",
        causal: bool,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.embed = embed
        self.pos = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, activation, causal=causal, fused=fused) for _ in range(depth)
        )
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.pos
        for block in self.blocks:
            h = block(h)
        h = self.ln_f(h)
        return self.head(h if self.causal else h.mean(-2))


def language_model(
    name: str,
    source: data.Data,
    *,
    width: int,
    heads: int,
    depth: int,
    hidden: int,
    activation: str = "gelu",
    fused: bool = True,
    **settings,
) -> Supervised:
    """A causal transformer predicting the next token of `source`; settings of `Supervised`."""
    (length,) = source.shape

    def build() -> Transformer:
        return Transformer(
            nn.Embedding(source.classes, width),
            length,
            source.classes,
            width=width,
            heads=heads,
            depth=depth,
            hidden=hidden,
            activation=activation,
            causal=True,
            fused=fused,
        )

    return Supervised(name, build, source, eval_size=256, **settings)


def vit(
    name: str,
    source: data.Data,
    patch: int,
    *,
    width: int,
    heads: int,
    depth: int,
    hidden: int,
    activation: str = "gelu",
    fused: bool = True,
    **settings,
) -> Supervised:
    """A transformer classifying images by their patches; settings of `Supervised`."""
    source = data.Patches(source, patch)
    length, features = source.shape

    def build() -> Transformer:
        return Transformer(
            nn.Linear(features, width),
            length,
            source.classes,
            width=width,
            heads=heads,
            depth=depth,
            hidden=hidden,
            activation=activation,
            causal=False,
            fused=fused,
        )

    return Supervised(name, build, source, **settings)


def sample_language_model(generator: Generator) -> Task:
    """1 or 2 blocks of width 16 to 32 on windows of 16 or 24 characters."""
    architecture = _architecture(generator)
    return language_model(
        f"char-{_label(architecture)}",
        data.text(choice(generator, (16, 24))),
        **architecture,
        batch_size=choice(generator, (8, 16)),
        embed_std=log_uniform(generator, 0.02, 1.0),
        **_settings(generator),
    )


def sample_vit(generator: Generator) -> Task:
    """1 or 2 blocks of width 16 to 32 on 4 or 16 patches of digits or photographs."""
    source, patch = choice(
        generator,
        [
            (data.digits(), 2),
            (data.digits(), 4),
            (data.photos(8, (2, 3)), 2),
            (data.photos(8, (2, 3)), 4),
        ],
    )
    architecture = _architecture(generator)
    return vit(
        f"vit-{_label(architecture)}",
        data.Noisy(source, log_uniform(generator, 0.1, 0.5)),
        patch,
        **architecture,
        batch_size=choice(generator, (16, 32)),
        **_settings(generator),
    )


def _architecture(generator: Generator) -> dict:
    width = choice(generator, (16, 24, 32))
    return {
        "width": width,
        "heads": choice(generator, (1, 2, 4)),
        "depth": choice(generator, (1, 2)),
        "hidden": width * choice(generator, (1, 2, 4)),
        "activation": choice(generator, tuple(ACTIVATIONS)),
        "fused": choice(generator, (False, True)),
    }


def _settings(generator: Generator) -> dict:
    return {"steps": horizon(generator), "scale": log_uniform(generator, 0.5, 2.0)}


def _label(architecture: dict) -> str:
    return "{activation}-w{width}-h{heads}-d{depth}".format(**architecture)
