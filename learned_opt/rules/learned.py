"""The learned rule: whitened polar steps whose controls a neural functional network (NFN) sets on the slow clock.

When the frame is taken anew, the NFN reads weights, gradients and momenta in it, and what the rule has measured. Its
answers hold until the next time:

    gain_T  = exp(tanh .)        of every tensor: the size of its step
    fresh_T = exp(2 tanh .)      of every matrix: n = beta1 m + (1 - beta1) fresh_T g
    decay_T = exp(2 tanh .)      of every matrix: its built-in decay
    bias_T  = exp(tanh .)        of every matrix with a bias: the size of the bias' step
    beta1   = 1 - (1 - measured beta1) exp(tanh .)           of the network, after the warm-up of 50 steps
    b_u, c_u = exp(tanh .)       of every hidden unit: rows that write it and columns that read it, in a direction

A tensor's controls are read off what is known of it by name (``FEATURES``: its role, its shape, what was measured) and
off the NFN's embedding of it, by one linear map; so :meth:`Learned.reasons` can say what each of the former did. The
last maps start at zero, where all of these are 1: the hand-made rule. Tensors see even features of their entries, units
the means of such features, so the controls do not depend on signs and positive scales of units and move with their
permutations: the update is as equivariant as the hand-made one, whatever the learned weights are.
"""

import math
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
from learned_opt.rules.numerics import ROUNDING, is_known_zero
from learned_opt.rules.slots import Slots, framed, norms, numel_of
from learned_opt.rules.whitened_polar import Control, WhitenedPolar
from learned_opt.symmetry import Symmetry

STACK_KINDS = ("matrix", "embedding", "vector", "gain")  # of what the NFN embeds
N_SHAPE = 3 + len(STACK_KINDS) + 2
N_TENSOR = 3
CONTROLS = {"gain": 1.0, "fresh": 2.0, "decay": 2.0, "bias": 1.0}  # of a tensor: the largest size of their logarithms
OF_NETWORK = ("horizon known", "length of the horizon", "done", "slope", "rate", "correlation of gradients")
FEATURES = (
    *("matrix", "thin matrix", "embedding", "vector", "reads the input", "writes the output"),
    *("log rows", "log columns", "small weights", "share of gradients", "agreement of gradients"),
    *OF_NETWORK,
)
MEASURED = ("agreement of gradients", "slope", "rate", "correlation of gradients")
SLOPES = {  # what a search over many kinds of tasks may read controls off, beside the constants
    "gain": ("log rows", "log columns", "length of the horizon", *MEASURED),
    "fresh": MEASURED,
    "decay": MEASURED[:1],
}
USUAL = 64  # rows and columns of which the logs are zero
LAST = ("tensor_controls", "unit_controls", "network_controls")  # maps that start at zero


class Learned(WhitenedPolar):
    """Whitened polar steps at a rate that they measure, under controls of a learned NFN.

    Args:
        width: channels of the embeddings.
        pool: False leaves out units and network: a tensor's controls depend on that tensor and on what is measured of
            the network as a whole.
    """

    parts = {control: (("tensor_controls.weight", i),) for i, control in enumerate(CONTROLS)} | {
        "units": (("unit_controls.weight", slice(None)), ("unit_controls.bias", slice(None))),
        "momentum": (("network_controls.weight", 0), ("network_controls.bias", 0)),
    }

    constants = {
        **{f"gain: {f}": ("tensor_controls.weight", (0, FEATURES.index(f))) for f in (*FEATURES[:6], "done")},
        **{k: ("tensor_controls.weight", (i, 0)) for i, k in enumerate(CONTROLS) if k != "gain"},  # of matrices
        "momentum": ("network_controls.bias", (0,)),
    }
    slopes = {
        f"{control}: {f}": ("tensor_controls.weight", (list(CONTROLS).index(control), FEATURES.index(f)))
        for control, known in SLOPES.items()
        for f in known
    } | {f"momentum: {f}": ("network_controls.weight", (0, OF_NETWORK.index(f))) for f in OF_NETWORK[3:]}
    spreads = False  # the NFN reads the whole network

    def __init__(self, width: int = 8, pool: bool = True) -> None:
        super().__init__()
        self.width, self.pool = width, pool
        layer = features.N_STATISTICS + N_SHAPE + N_TENSOR
        self.embedding = Embedding(features.N_EVEN, layer, 1 + len(OF_NETWORK), width, pool)
        self.hidden = nn.Linear(2 * width, width)  # of a unit: its own embedding, and the mean of the matrices'
        self.tensor_controls = nn.Linear(len(FEATURES) + width, len(CONTROLS), bias=False)  # roles are its constants
        self.unit_controls = nn.Linear(width, 2)
        self.network_controls = nn.Linear(len(OF_NETWORK), 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden maps at random from a fixed seed, last maps at zero: the hand-made rule."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear):
                    bound = 0.0 if name in LAST else module.in_features**-0.5
                    module.weight.uniform_(-bound, bound, generator=generator)
                    if module.bias is not None:
                        module.bias.zero_()

    def init(self, params: Weights, symmetry: Symmetry) -> State:
        state = super().init(params, symmetry)
        zeros = torch.zeros_like(state["tensor"]["step"])
        state["tensor"] |= {f"log_{control}": zeros.clone() for control in CONTROLS}
        _, n_units = unit_tables(symmetry, "label")
        state["network"]["log_unit_gain"] = zeros.new_zeros(n_units + 1, 2)
        state["network"]["log_momentum"] = zeros.new_zeros(())
        return state

    def reasons(self, layout: BatchLayout, state: State, total_steps: Number | None) -> dict[str, Tensor]:
        """What each of ``FEATURES`` adds to the logarithm of a control before that is bounded; in the last column the
        rest: the embedding, and what has changed since the control was set.

        Returns:
            For every control ``[T, len(FEATURES) + 1]``. Tensors are ordered as ``layout.members``.
        """
        known = self.known(layout, state, total_steps)
        found = {}
        for (control, most), weight in zip(CONTROLS.items(), self.tensor_controls.weight.to(known), strict=True):
            each = most * known * weight[: len(FEATURES)]
            told = most * torch.atanh((state["tensor"][f"log_{control}"] / most).clamp(-1 + 1e-6, 1 - 1e-6))
            found[control] = torch.cat([each, (told - each.sum(-1))[:, None]], -1)
        return found

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
            told, units, momentum = self._answer(layout, params, g, new, total_steps)
            for k, x in told.items():
                tensor[f"log_{k}"] = when(clock.frame, x, tensor[f"log_{k}"])
            network["log_unit_gain"] = when(clock.frame, units, network["log_unit_gain"])
            network["log_momentum"] = when(clock.frame, momentum, network["log_momentum"])
            for k, control in (("size", "gain"), ("decay", "decay")):  # sizes and decays are of this moment too
                tensor[k] = when(clock.frame, tensor[k] * told[control].exp(), tensor[k])
        scalings, (written, read) = _unit_scalings(layout), network["log_unit_gain"].unbind(-1)
        scalings = {} if self._is_silent() else scalings
        each = zip(layout.all, *(tensor[f"log_{k}"].exp().split(layout.counts) for k in ("fresh", "bias")), strict=True)
        return {
            b.key: Control(fresh, bias, scalings[b.key](written, read) if b.key in scalings else {})
            for b, fresh, bias in each
        }

    def momentum(self, measured: Tensor, network: Slots) -> Tensor:
        told = network["log_momentum"] * (network["clock"] > auto_lr.LONGEST)  # before, Adam's directions count on 0.9
        return 1 - (1 - measured) * told.exp()

    def _answer(
        self,
        batches: BatchLayout,
        params: Weights,
        g: Mapping[str, Tensor],
        new: State,
        total_steps: Number | None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Logs of every tensor's controls ``[T]``, of units' gains ``[n_units + 1, 2]``, and of the momentum (0-d)."""
        network = network_features(new["network"], total_steps)
        of_tensor = _tensor_features(batches, new, self.pool)
        known = _named(batches, of_tensor, network)
        units = torch.zeros_like(new["network"]["log_unit_gain"])
        if self._is_silent():
            asked = known @ self.tensor_controls.weight[:, : len(FEATURES)].T
        else:
            whole, units = self._embedded(batches, params, g, new, of_tensor, network)
            asked = self.tensor_controls(torch.cat([known, whole], -1))
        told = {k: CONTROLS[k] * torch.tanh(x) for k, x in zip(CONTROLS, asked.unbind(-1), strict=True)}
        return told, units, torch.tanh(self.network_controls(network)).squeeze(-1)

    def _is_silent(self) -> bool:
        """Whether nothing is read off the embeddings, as after a search of constants: then they need not be made."""
        maps = [self.tensor_controls.weight[:, len(FEATURES) :], self.unit_controls.weight, self.unit_controls.bias]
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in maps)
        return not learning and is_known_zero(*maps)

    def _embedded(
        self,
        batches: BatchLayout,
        params: Weights,
        g: Mapping[str, Tensor],
        new: State,
        of_tensor: Tensor,
        network: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The NFN's embedding of every tensor ``[T, width]``, and logs of units' gains ``[n_units + 1, 2]``."""
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
        even, layers = [], []
        own_parts = (x.split(layout.counts) for x in (age, of_tensor.index_select(0, owner)))
        parts = zip(layout.stacks, gradients, momenta, weights, *own_parts, strict=True)
        for stack, gradient, m, w, step, own_features in parts:
            x = features.odd_features(gradient, m, w)
            even.append(features.even_features(x))
            corrected = m / (1 - auto_lr.BETA1**step)[:, None, None]
            measured = features.statistics(x, gradient, corrected, w)
            layers.append(torch.cat([measured, _shape_features(stack, w), own_features], -1))
        aged = torch.cat([torch.log10(new["network"]["clock"])[None] / 4, network])
        units, embedded = self.embedding(layout, even, layers, aged)
        every = torch.cat(embedded)
        whole = _means(every, owner, len(batches.members))
        if not self.pool:
            return whole, units.new_zeros(len(units), 2)
        shared = every.mean(0).expand(len(units), -1)
        of_units = torch.tanh(self.unit_controls(torch.tanh(self.hidden(torch.cat([units, shared], -1)))))
        return whole, torch.cat([of_units[:-1], torch.zeros_like(of_units[:1])])

    def known(self, layout: BatchLayout, state: State, total_steps: Number | None) -> Tensor:
        """``FEATURES`` of every tensor, of a state that has answered: ``[T, len(FEATURES)]``."""
        tensor = state["tensor"] | {"size": state["tensor"]["size"] * (-state["tensor"]["log_gain"]).exp()}
        of_tensor = _tensor_features(layout, state | {"tensor": tensor}, self.pool)
        network = network_features(state["network"], total_steps)
        return _named(layout, of_tensor, network)


def _named(layout: BatchLayout, of_tensor: Tensor, network: Tensor) -> Tensor:
    """``FEATURES`` of every tensor: ``[T, len(FEATURES)]``."""
    return torch.cat([_roles(layout, network.dtype), of_tensor, network.expand(len(of_tensor), -1)], -1)


def network_features(network: Slots, total_steps: Number | None) -> Tensor:
    """``OF_NETWORK``: what is known of a horizon, or zeros; what the rule has measured."""
    t = network["clock"]
    if total_steps is None:
        horizon = list(t.new_zeros(3).unbind())
    else:
        total = torch.as_tensor(total_steps, dtype=t.dtype, device=t.device)
        done = ((t - 1) / total).clamp(max=1.0)
        horizon = [torch.ones_like(t), torch.log10(total / auto_lr.HORIZON), 2 * done - 1]
    correlation = network["correlation"] / (1 + network["correlation"])
    return torch.stack([*horizon, network["slope"] / auto_lr.OSCILLATION, network["log_lr"], correlation])


def _tensor_features(layout: BatchLayout, state: State, pool: bool) -> Tensor:
    """``[T, N_TENSOR]``: how small the weights are, the share of the network's mean square gradients, and how much the
    gradients of the last steps agree: about 0 where they are independent, 1 where they are the same."""
    tensor, beta1 = state["tensor"], state["network"]["beta1"]
    step = tensor["step"].clamp(min=1)
    square = tensor["mean_square"] / (1 - BETA2**step)
    share = features.log_ratio(square, square.mean()) if pool else torch.zeros_like(square)
    momentum = torch.cat([norms(b, state[b.key]["m"].to(square.dtype)) for b in layout.all])
    weight = 1 - beta1**step  # of all gradients in the momentum
    momentum = (momentum / weight).square() / numel_of(layout, square.dtype)
    independent = (1 - beta1) / (1 + beta1) * (1 + beta1**step) / weight  # the share of the square that is left of them
    above_noise = square > (ROUNDING * torch.finfo(square.dtype).eps) ** 2 * square.amax()
    agreement = (momentum / torch.where(above_noise, square, 1) - independent) / (1 - independent).clamp(min=0.1)
    return torch.stack([torch.log(tensor["size"]), share, torch.where(above_noise, agreement.clamp(-1, 2), 0)], -1)


@lru_cache(maxsize=256)
def _roles(layout: BatchLayout, dtype: torch.dtype) -> Tensor:
    """The first eight of ``FEATURES``: ``[T, 8]``."""
    rows = []
    for b in layout.all:
        if isinstance(b, FlatBatch):
            rows += [[0.0, 0, 0, 1, 0, 0, 0, 0]] * len(b.names)
            continue
        kind = [float(b.is_matrix), float(b.thin), float(b.factored), 0.0]
        ends = [float(b.is_matrix and b.order[i] not in b.hidden) for i in (-1, 0)]
        rows += [[*kind, *ends, math.log2(b.R / USUAL) / 4, math.log2(b.C / USUAL) / 4]] * len(b.names)
    return torch.tensor(rows, dtype=dtype, device=layout.device)


def _shape_features(stack: MatrixBatch, like: Tensor) -> Tensor:
    """``[N, N_SHAPE]``: logs of the shape, the kind, whether it reads the input or writes the output."""
    _, r, c = stack.shape
    logs = torch.log2(torch.tensor([r, c], dtype=like.dtype, device=like.device)) / 8
    kind = [float(stack.kind == k) for k in STACK_KINDS]
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
