"""Sequence models beyond the transformer: a selective state space, and attention as a robust density estimate."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks import data
from tasks.task import Problem, cross_entropy
from tasks.transformer import Attention, Block

# ---------------------------------------------------------------------------- selective state space


def linear_scan(decay: Tensor, given: Tensor) -> Tensor:
    """h_t = decay_t * h_(t-1) + given_t along axis 1, from h = 0; all [B, T, ...]."""
    h, states = None, []
    for a, b in zip(decay.unbind(1), given.unbind(1), strict=True):
        h = b if h is None else a * h + b
        states.append(h)
    return torch.stack(states, 1)


class Selective(nn.Module):
    """The Mamba block (Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2).

    x, z = W_in u; x = silu(causal depthwise convolution of x). Step size and both maps of the state depend on the
    input, which is the selection: delta = softplus(W_delta W_x x), B = W_B x, C = W_C x. With A = -exp(log_a),

        h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t,      y_t = C_t h_t + D x_t      (per channel, `state` numbers)

    and the output is W_out (y * silu(z)). [B, T, width] -> [B, T, width].
    """

    def __init__(self, width: int, inner: int, state: int, rank: int, kernel: int = 4) -> None:
        super().__init__()
        self.sizes = [rank, state, state]
        self.fan = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.select = nn.Linear(inner, rank + 2 * state, bias=False)
        self.delta = nn.Linear(rank, inner)
        self.log_a = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)
        step = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():  # softplus(bias) = step
            self.delta.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.fan(u).chunk(2, -1)
        x = functional.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        decay, given, read = self.recurrence(x)
        y = (linear_scan(decay, given) * read.unsqueeze(-2)).sum(-1) + self.skip * x
        return self.out(y * functional.silu(z))

    def recurrence(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decay and input of the state [B, T, inner, state], and what reads it [B, T, state], from x [B, T, inner]."""
        low, write, read = self.select(x).split(self.sizes, -1)
        delta = functional.softplus(self.delta(low)).unsqueeze(-1)
        decay = torch.exp(-delta * torch.exp(self.log_a))
        return decay, delta * write.unsqueeze(-2) * x.unsqueeze(-1), read


class Mamba(nn.Module):
    """A language model of `Selective` blocks with RMSNorm before each: tokens [B, T] -> logits [B, T, tokens]."""

    def __init__(self, tokens: int, *, width: int, inner: int, state: int, rank: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.blocks = nn.ModuleList(Selective(width, inner, state, rank) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h))
        return self.head(self.norm(h))


def mamba(name: str, source: data.Windows, *, batch_size: int, steps: int, **shape: int) -> Problem:
    """A `Mamba` predicting the next token of `source`; shape: its sizes."""
    return Problem(
        name,
        lambda: Mamba(source.classes, **shape),
        source.sample,
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=batch_size,
        steps=steps,
        held_out=source.held_out,
        ceiling=math.log(source.classes),
        eval_size=256,
    )


# --------------------------------------------------------------------------------- robust attention


class RobustAttention(Attention):
    """Softmax attention as a kernel regression on the keys, with robust densities of keys and of (key, value) pairs.

    Han et al. 2023, "Designing Robust Transformers using Robust Kernel Density Estimation", section 3: attention is
    E[v | q] = sum_j v_j k(q, k_j) / sum_j k(q, k_j) with a Gaussian kernel k. In place of the plain density estimate
    with weights 1/n, sum_j w_j k(., k_j) is the one that minimises a Huber loss of |phi(k_j) - mean|, reached by
    iterative reweighting: w_j is proportional to min(1, a / |phi(k_j) - sum_i w_i phi(k_i)|). So an outlier among the
    tokens weighs less, wherever the query is. The weights of pairs (k_j, v_j) are in the numerator, those of keys in
    the denominator. The radius a is the mean distance (theirs: the median). No causal mask; no iterations leave
    the weights at 1/n.
    """

    def __init__(self, width: int, heads: int, *, iterations: int = 1) -> None:
        super().__init__(width, heads, causal=False, fused=False)
        self.iterations = iterations

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(a) for a in (self.q(x), self.k(x), self.v(x)))
        scores = q @ k.transpose(-2, -1) - k.square().sum(-1).unsqueeze(-2) / 2  # -|q - k|^2 / 2 but for |q|^2
        kernel = (scores / math.sqrt(q.shape[-1])).softmax(-1)  # any factor of a row cancels below
        pairs = density_weights(torch.cat([k, v], -1), self.iterations)
        keys = density_weights(k, self.iterations)
        out = (kernel @ (pairs.unsqueeze(-1) * v)) / (kernel @ keys.unsqueeze(-1))
        return self.proj(out.transpose(-3, -2).flatten(-2))


def density_weights(points: Tensor, iterations: int) -> Tensor:
    """Weights [..., n] of a robust kernel density estimate on points [..., n, d], which sum to n.

    Kim & Scott 2012, "Robust Kernel Density Estimation", section 3 (KIRWLS), with the Gaussian kernel of variance
    sqrt(d), Huber's loss, and its radius at the mean distance.
    """
    n, d = points.shape[-2:]
    squares = points.square().sum(-1)
    gaps = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * points @ points.transpose(-2, -1)
    gram = torch.exp(-gaps / (2 * math.sqrt(d)))
    weights = torch.ones_like(squares) / n
    for _ in range(iterations):
        fit = (gram @ weights.unsqueeze(-1)).squeeze(-1)  # <phi_j, mean>
        norm = (weights * fit).sum(-1, keepdim=True)  # |mean|^2
        distance = (1 - 2 * fit + norm).clamp(min=1e-6).sqrt()
        ratio = distance.mean(-1, keepdim=True) / distance
        weights = 1 - functional.relu(1 - ratio)  # min(1, ratio)
        weights = weights / weights.sum(-1, keepdim=True)
    return n * weights


class RobustClassifier(nn.Module):
    """A transformer of `RobustAttention` that classifies tokens [B, T] by the mean over positions."""

    def __init__(
        self,
        tokens: int,
        length: int,
        classes: int,
        *,
        width: int,
        heads: int,
        depth: int,
        hidden: int,
        iterations: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.pos = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, "gelu", causal=False, fused=False) for _ in range(depth)
        )
        for block in self.blocks:
            block.attn = RobustAttention(width, heads, iterations=iterations)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.pos
        for block in self.blocks:
            h = block(h)
        return self.head(self.ln_f(h).mean(-2))


def robust_classifier(
    name: str, source: data.Data, tokens: int, *, batch_size: int, steps: int, iterations: int = 1, **shape: int
) -> Problem:
    """A `RobustClassifier` of `source`, sequences of tokens; shape: its sizes."""
    (length,), classes = source.shape, source.classes
    return Problem(
        name,
        lambda: RobustClassifier(tokens, length, classes, iterations=iterations, **shape),
        source.sample,
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=batch_size,
        steps=steps,
        held_out=source.held_out,
        ceiling=math.log(classes),
    )
