"""Recurrent networks, written out so that they can be vmapped: language models and readers of images by rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tasks import data
from tasks.task import Supervised, Task, choice, horizon, log_uniform

GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}


class Recurrence(nn.Module):
    """One recurrent layer, [B, T, fan_in] -> [B, T, width]; the state begins at zero.

    kind: "tanh" or "relu", h = f(W x + b + U h); "gru" (Cho et al. 2014, in the form of cuDNN: the reset gate
    multiplies U h) with gates r, z, n; "lstm" (Hochreiter & Schmidhuber 1997) with gates i, f, g, o. `input` holds
    W and b of all gates, `hidden` U.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, kind: str, fan_in: int, width: int) -> None:
        super().__init__()
        if kind not in GATES:
            raise ValueError(f"no recurrent layer {kind!r}. Choose one of {sorted(GATES)}.")
        self.kind = kind
        self.input = nn.Linear(fan_in, GATES[kind] * width)
        self.hidden = nn.Linear(width, GATES[kind] * width, bias=False)

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, x: Tensor) -> Tensor:
        state: State | None = None
        outputs = []
        for given in self.input(x).unbind(-2):
            # No zeros at the start: nothing is added to the first input, so that its signs and scales are free.
            state = STEPS[self.kind](given, None if state is None else self.hidden(state[0]), state)
            outputs.append(state[0])
        return torch.stack(outputs, -2)


State = tuple[Tensor, Tensor]  # what the layer shows and, for an LSTM, its memory


def _tanh(x: Tensor, u: Tensor | None, state: State | None) -> State:
    h = torch.tanh(_sum(x, u))
    return h, h


def _relu(x: Tensor, u: Tensor | None, state: State | None) -> State:
    h = torch.relu(_sum(x, u))
    return h, h


def _gru(x: Tensor, u: Tensor | None, state: State | None) -> State:
    xr, xz, xn = x.chunk(3, -1)
    if u is None or state is None:
        n = torch.tanh(xn)
        h = n - torch.sigmoid(xz) * n
    else:
        ur, uz, un = u.chunk(3, -1)
        r, z = torch.sigmoid(xr + ur), torch.sigmoid(xz + uz)
        n = torch.tanh(xn + r * un)
        h = n + z * (state[0] - n)
    return h, h


def _lstm(x: Tensor, u: Tensor | None, state: State | None) -> State:
    i, f, g, o = _sum(x, u).chunk(4, -1)
    c = torch.sigmoid(i) * torch.tanh(g)
    if state is not None:
        c = c + torch.sigmoid(f) * state[1]
    return torch.sigmoid(o) * torch.tanh(c), c


def _sum(x: Tensor, u: Tensor | None) -> Tensor:
    return x if u is None else x + u


STEPS: dict[str, Callable[[Tensor, Tensor | None, State | None], State]] = {
    "tanh": _tanh,
    "relu": _relu,
    "gru": _gru,
    "lstm": _lstm,
}


class Recurrent(nn.Module):
    """Recurrent layers and a linear head.

    Args:
        embed: from the input to [B, T, embed]: nn.Embedding of tokens, or nn.Identity of vectors.
        fan_in: the size of what `embed` gives.
        last: True reads the state after the last step alone (logits [B, classes]), False that after each
            ([B, T, classes]).
    """

    def __init__(
        self, embed: nn.Module, fan_in: int, classes: int, *, kind: str, width: int, depth: int, last: bool
    ) -> None:
        super().__init__()
        self.last = last
        self.embed = embed
        sizes = [fan_in] + depth * [width]
        self.layers = nn.Sequential(*(Recurrence(kind, n, width) for n in sizes[:-1]))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.embed(x))
        return self.head(h[..., -1, :] if self.last else h)


def language_model(
    name: str, source: data.Windows, *, kind: str, embed: int, width: int, depth: int = 1, **settings
) -> Supervised:
    """A recurrent network predicting the next token of `source`; settings of `Supervised`."""
    tokens = source.classes

    def build() -> Recurrent:
        return Recurrent(nn.Embedding(tokens, embed), embed, tokens, kind=kind, width=width, depth=depth, last=False)

    return Supervised(name, build, source, eval_size=256, **{"embed_std": 1.0, **settings})


def row_reader(name: str, source: data.Data, *, kind: str, width: int, depth: int = 1, **settings) -> Supervised:
    """A recurrent network that classifies images after reading their rows in turn; settings of `Supervised`."""
    source = Rowwise(source)
    _, row = source.shape

    def build() -> Recurrent:
        return Recurrent(nn.Identity(), row, source.classes, kind=kind, width=width, depth=depth, last=True)

    return Supervised(name, build, source, **settings)


class Rowwise(data.View):
    """Images [channels, height, width] as sequences of rows [height, channels * width]."""

    @property
    def shape(self) -> tuple[int, ...]:
        channels, height, width = self.data.shape
        return height, channels * width

    def _see(self, x: Tensor, y: Tensor) -> data.Batch:
        return x.transpose(1, 2).flatten(2), y


def sample(generator: Generator) -> Task:
    """One layer of 16 to 48 units: characters in windows of 12 or 16, or images of 8 rows (8 to 24 numbers each)."""
    kind, width = choice(generator, tuple(GATES)), choice(generator, (16, 24, 32, 48))
    settings: dict[str, Any] = {
        "steps": horizon(generator),
        "batch_size": choice(generator, (16, 32)),
        "scale": log_uniform(generator, 0.5, 1.5),
    }
    source = choice(generator, (None, data.digits(), data.photos(8, (2, 3))))
    if source is None:
        return language_model(
            f"rnn-{kind}-{width}-char",
            data.text(choice(generator, (12, 16))),
            kind=kind,
            embed=choice(generator, (8, 16)),
            width=width,
            embed_std=log_uniform(generator, 0.1, 1.0),
            **settings,
        )
    noisy = data.Noisy(source, log_uniform(generator, 0.1, 0.5))
    return row_reader(f"rnn-{kind}-{width}-rows-{source.shape[0]}", noisy, kind=kind, width=width, **settings)
