"""The learned rule: whitened polar steps whose controls a neural functional network (NFN) sets on the slow clock.

When the frame is taken anew, the NFN reads weights, gradients and momenta in it, and what the rule has measured. Its
answers hold until the next time:

    gain_T  = exp(tanh .)        of every tensor: the size of its step
    fresh_T = exp(2 tanh .)      of every matrix: n = beta1 m + (1 - beta1) fresh_T g
    b_u, c_u = exp(tanh .)       of every hidden unit: rows that write it and columns that read it, in a direction

The last maps start at zero, where all of these are 1: the hand-made rule. Tensors see even features of their entries,
units the means of such features, so the controls do not depend on signs and positive scales of units and move with
their permutations: the update is as equivariant as the hand-made one, whatever the learned weights are.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from learned_opt.batch_layout import scaling_of
from learned_opt.batches import BatchLayout, FlatBatch, Scaling
from learned_opt.blocks import BlockLayout, MatrixBatch, layout_of, unit_tables
from learned_opt.rules import auto_lr, features
from learned_opt.rules.auto_lr import Number
from learned_opt.rules.base import State, Weights
from learned_opt.rules.clock import Clock, when
from learned_opt.rules.directions import BETA2
from learned_opt.rules.embedding import Embedding
from learned_opt.rules.slots import Slots, framed
from learned_opt.rules.whitened_polar import Control, WhitenedPolar
from learned_opt.symmetry import Symmetry

KINDS = ("matrix", "embedding", "vector", "gain")
N_SHAPE = 3 + len(KINDS) + 2
N_TENSOR = 2
N_NETWORK = 9
LAST = ("tensor_controls", "unit_controls")  # maps that start at zero


class Learned(WhitenedPolar):
    """Whitened polar steps at a rate that they measure, under controls of a learned NFN.

    Args:
        width: channels of the embeddings.
        pool: False leaves out units and network: a tensor's controls depend on that tensor and on the rate alone.
    """

    parts = {
        "gain": (("tensor_controls.weight", 0), ("tensor_controls.bias", 0)),
        "fresh": (("tensor_controls.weight", 1), ("tensor_controls.bias", 1)),
        "units": (("unit_controls.weight", slice(None)), ("unit_controls.bias", slice(None))),
    }

    spreads = False  # the NFN reads the whole network

    def __init__(self, width: int = 8, pool: bool = True) -> None:
        super().__init__()
        self.width, self.pool = width, pool
        self.embedding = Embedding(features.N_EVEN, features.N_STATISTICS + N_SHAPE + N_TENSOR, N_NETWORK, width, pool)
        self.hidden = nn.Linear(2 * width, width)  # of a unit: its own embedding, and the mean of the matrices'
        self.tensor_controls = nn.Linear(width, 2)
        self.unit_controls = nn.Linear(width, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden maps at random from a fixed seed, last maps at zero: the hand-made rule."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear):
                    bound = 0.0 if name in LAST else module.in_features**-0.5
                    module.weight.uniform_(-bound, bound, generator=generator)
                    module.bias.zero_()

    def init(self, params: Weights, symmetry: Symmetry) -> State:
        state = super().init(params, symmetry)
        zeros = torch.zeros_like(state["tensor"]["step"])
        state["tensor"] |= {"log_gain": zeros, "log_fresh": zeros.clone()}
        _, n_units = unit_tables(symmetry, "label")
        state["network"]["log_unit_gain"] = zeros.new_zeros(n_units + 1, 2)
        return state

    def controls(
        self,
        layout: BatchLayout,
        params: Weights,
        g: Mapping[str, Tensor],
        new: State,
        clock: Clock,
        total_steps: Number | None,
    ) -> dict[str, Control]:
        network, tensor = new["network"], new["tensor"]
        if clock.frame is not False:
            answer = self._answer(layout, params, g, new, total_steps)
            held = tensor["log_gain"], tensor["log_fresh"], network["log_unit_gain"]
            found = (when(clock.frame, x, old) for x, old in zip(answer, held, strict=True))
            tensor["log_gain"], tensor["log_fresh"], network["log_unit_gain"] = found
        scalings, (written, read) = _unit_scalings(layout), network["log_unit_gain"].unbind(-1)
        each = zip(layout.all, *(tensor[k].exp().split(layout.counts) for k in ("log_gain", "log_fresh")), strict=True)
        return {
            b.key: Control(gain, fresh, scalings[b.key](written, read) if b.key in scalings else {})
            for b, gain, fresh in each
        }

    def _answer(
        self,
        batches: BatchLayout,
        params: Weights,
        g: Mapping[str, Tensor],
        new: State,
        total_steps: Number | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logs of gains and of fresh shares ``[T]`` each, and of units' gains ``[n_units + 1, 2]``."""
        tensors: list[Weights] = [{}, {}, {}]
        for b in batches.all:
            own = new[b.key]
            w = framed(b, b.gather(params), own, False, inverse=True)
            for x, into in zip((g[b.key], own["m"].to(w.dtype), w), tensors, strict=True):
                into |= b.scatter(x)
        layout = layout_of(batches.symmetry, batches.names, batches.device)
        gradients, momenta, weights = (layout.gather(x) for x in tensors)
        gradients, momenta = features.without_noise(gradients), features.without_noise(momenta)
        owner = _owners(batches, layout)
        age = new["tensor"]["step"].index_select(0, owner)
        of_tensor = _tensor_features(new["tensor"], self.pool).index_select(0, owner)
        even, layers = [], []
        own_parts = (x.split(layout.counts) for x in (age, of_tensor))
        parts = zip(layout.stacks, gradients, momenta, weights, *own_parts, strict=True)
        for stack, gradient, m, w, step, own_features in parts:
            x = features.odd_features(gradient, m, w)
            even.append(features.even_features(x))
            corrected = m / (1 - auto_lr.BETA1**step)[:, None, None]
            measured = features.statistics(x, gradient, corrected, w)
            layers.append(torch.cat([measured, _shape_features(stack, w), own_features], -1))
        network = network_features(new["network"], total_steps)
        units, embedded = self.embedding(layout, even, layers, network)
        every = torch.cat(embedded)
        whole = _means(every, owner, len(batches.members))
        gain, fresh = torch.tanh(self.tensor_controls(whole)).unbind(-1)
        if not self.pool:
            return gain, 2 * fresh, units.new_zeros(len(units), 2)
        shared = every.mean(0).expand(len(units), -1)
        of_units = torch.tanh(self.unit_controls(torch.tanh(self.hidden(torch.cat([units, shared], -1)))))
        return gain, 2 * fresh, torch.cat([of_units[:-1], torch.zeros_like(of_units[:1])])


def network_features(network: Slots, total_steps: Number | None) -> Tensor:
    """``[N_NETWORK]``: age; length of the horizon, fractions of it done and left, or zeros without one; what the rule
    has measured; a constant.
    """
    t = network["clock"]
    if total_steps is None:
        horizon = list(t.new_zeros(4).unbind())
    else:
        total = torch.as_tensor(total_steps, dtype=t.dtype, device=t.device)
        done = ((t - 1) / total).clamp(max=1.0)
        horizon = [torch.log10(total) / 4, done, 1 - done, torch.ones_like(t)]
    correlation = network["correlation"]
    measured = [network["slope"] / auto_lr.OSCILLATION, network["log_lr"], correlation / (1 + correlation)]
    momentum = (network["beta1"] - auto_lr.BETA1) / auto_lr.LONGER
    return torch.stack([torch.log10(t) / 4, *horizon, *measured, momentum])


def _tensor_features(tensor: Slots, pool: bool) -> Tensor:
    """``[T, N_TENSOR]``: how small the weights are, and the share of the network's mean square gradients."""
    square = tensor["mean_square"] / (1 - BETA2 ** tensor["step"].clamp(min=1))
    share = features.log_ratio(square, square.mean()) if pool else torch.zeros_like(square)
    return torch.stack([torch.log(tensor["size"]), share], -1)


def _shape_features(stack: MatrixBatch, like: Tensor) -> Tensor:
    """``[N, N_SHAPE]``: logs of the shape, the kind, whether it reads the input or writes the output."""
    _, r, c = stack.shape
    logs = torch.log2(torch.tensor([r, c], dtype=like.dtype, device=like.device)) / 8
    kind = [float(stack.kind == k) for k in KINDS]
    row = torch.cat([logs, (logs[0] - logs[1])[None], like.new_tensor(kind)])
    return torch.cat([row.expand(stack.shape[0], -1), stack.fixed.to(like.dtype)], -1)


def _means(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """Over the matrices of every tensor: ``[sum of counts, F] -> [count, F]``."""
    ones = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    total = ones.new_zeros(count, ones.shape[-1]).index_add(0, owner, ones)
    return total[:, :-1] / total[:, -1:]


@lru_cache(maxsize=256)
def _owners(batches: BatchLayout, layout: BlockLayout) -> Tensor:
    """Which tensor every matrix of the stacks belongs to, a bias to its matrix: ``[sum of counts]``."""
    places = {n: i for i, n in enumerate(batches.members)}
    places |= {bias: places[n] for b in batches.batches for n, bias in zip(b.names, b.biases, strict=False)}
    at = torch.tensor([places[n] for n in layout.names], device=batches.device)
    return at.index_select(0, layout.owners)


@lru_cache(maxsize=256)
def _unit_scalings(layout: BatchLayout) -> dict[str, Scaling]:
    """Where the unit gains of the rows and columns of matrices come from, by batch."""
    return {
        b.key: scaling_of(layout.symmetry, b, str(layout.device), "label")
        for b in layout.all
        if not isinstance(b, FlatBatch) and b.is_matrix and b.hidden
    }
