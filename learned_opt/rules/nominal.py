"""The nominal rule: steps in the frame that need no tuning. What NFNOpt takes, at a rate that the paced rule measures.

On every matrix (folded convolution, attention block by axis role, first and last layer included) of fan-in C, with
momentum ``n = 0.9 m + 0.1 g`` and roots P of its hidden units' second moments (:mod:`learned_opt.rules.whitening`),

    d = 0.2 (512 / C)^(1/4) sqrt(max(R, C)) P polar(P n P) P,    at the size of the polar factor,

and ``0.025 (800 / T)^(1/2) (512 / C)^(1/4)`` times as much toward zero weights, over a horizon of T steps. The inputs
and outputs of the network have no P; matrices that have them take ``n / v_hat^(1/4)`` for n. A bias is one more column
of its matrix (:mod:`learned_opt.rules.biases`). Exceptions: matrices of at most four rows or columns move along
``m_hat / sqrt(v_hat)``, whitened at the beginning of a run; weights smaller than usual, RMS ``r < 0.5 / sqrt(C)``, take
steps ``2 r sqrt(C)`` times as large; gains, embeddings and other vectors twice ``m_hat / sqrt(v_hat)``. One rate for
all, decaying.
A gradient more than four times as large as the last hundred were on average, as a matrix or vector in the frame,
counts as four times as large: steps have one size whatever the gradient's, so one that is wild would be followed
until the momentum has forgotten it (experiments, 35).
The pull to zero is a decoupled weight decay (of weights up to the usual size) that takes the same share of them
whatever the width and the length of the run. A constant part of the step takes one that grows like T^(1/2) C^(1/4):
too much in wide networks and long runs (39 and 40).
The power of the fan-in lies between steps of one RMS (power 0) and steps in proportion to fan-in-scaled weights
(power 1/2), that of v between Muon's direction (power 0) and that of Adam (power 1/2). Both were chosen on VALID, the
exceptions, the whitening and the biases on other tasks (experiments, 18, 23, 26, 28, 36, 47 and 48).
All of it commutes with permutations and signs, and in the frame also with positive scale. The learned rule starts from
this one and is judged by what it adds.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from learned_opt import features
from learned_opt.frame import potentials, scales
from learned_opt.layout import Layout, Stack, layout_of
from learned_opt.rules import whitening
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.biases import NOISE, SIZE, Biases, biases_of, is_wide
from learned_opt.rules.polar import newton_schulz
from learned_opt.rules.whitening import Whitening
from learned_opt.symmetry import Symmetry

RATE = 0.01  # half the size of a step of Adam's at lr = 1 before decay; times 0.2 the RMS of a matrix's
VECTOR = 2.0  # times the Adam direction of gains, embeddings and vectors that are no matrix's bias
USUAL = 0.5  # RMS times root fan-in of weights below which they are small
SMALLEST = 0.1  # relative to usual ones: smaller ones (zeros) count as that
OUTLIER = 4.0  # times the RMS of those before it: what a gradient counts at most
SHRINK = 0.025  # of a matrix's step goes straight toward zero weights, over HORIZON steps and at FAN_IN
NEWTON_SCHULZ = 4  # iterations: a fifth does not help, and lifts directions that are mostly noise
FAN_IN = 512  # at which a matrix takes steps of RMS 0.2
_ROUNDING = 64  # times the machine epsilon: a vector's gradient below this share of the largest is noise
HORIZON = 800  # at which the rate starts at RATE
TO_COME = 500.0  # steps that the pull to zero expects besides those done where there is no horizon
SHORTEST, LONGEST, SHARE = 10.0, 50.0, 0.125  # a run's beginning in steps, and as a share of the horizon
ANYTIME = 100.0  # steps after which the rate without horizon starts to decay like 1 / sqrt(t)


def schedule(step: Tensor, total_steps: float | Tensor | None) -> Tensor:
    """Multiple of the rate at ``step`` (counted from 1).

    Over a horizon T a straight line to zero from ``sqrt(800 / T)`` (at most 4): measured on VALID, the best rate is
    2 at T = 200, 1 at 800, 0.7 at 1600. Without a horizon ``1 / sqrt(1 + t / 100)``.
    """
    if total_steps is None:
        return decay(step, None)
    return of_length(step, total_steps) * decay(step, total_steps)


def of_length(step: Tensor, total_steps: float | Tensor) -> Tensor:
    """``sqrt(800 / T)``, at most 4 (0-d, like ``step``)."""
    total = torch.as_tensor(total_steps, dtype=step.dtype, device=step.device)
    return torch.rsqrt(total / HORIZON).clamp(max=4.0)


def pull(step: Tensor, total_steps: float | Tensor | None) -> Tensor:
    """Part of a step that goes toward zero weights, of a matrix whose fan-in is 512 (0-d)."""
    return SHRINK * of_length(step, step + TO_COME if total_steps is None else total_steps)


def beginning(total_steps: float | Tensor | None) -> float | Tensor:
    """Steps of a run's beginning: an eighth of the horizon, 10 to 50; 50 without one (0-d)."""
    return LONGEST if total_steps is None else (SHARE * torch.as_tensor(total_steps)).clamp(SHORTEST, LONGEST)


def youth(step: Tensor, total_steps: float | Tensor | None) -> Tensor:
    """1 at the beginning of a run, then a line to zero that is as long (0-d)."""
    return (2 - step / beginning(total_steps)).clamp(0.0, 1.0)


def decay(step: Tensor, total_steps: float | Tensor | None) -> Tensor:
    """The schedule's form: from 1 at the first step."""
    if total_steps is None:
        return torch.rsqrt(1 + (step - 1) / ANYTIME)
    return 1 - ((step - 1) / total_steps).clamp(max=1.0)


Frame = Tensor | None  # a stack's scales [N, R, C]; None: all ones


def into(x: Tensor, frame: Frame) -> Tensor:
    """Where gradients enter the frame, and updates leave it: ``[N, R, C]``."""
    return x if frame is None else x * frame


class View:
    """One stack ``[N, R, C]`` in the frame: weights, gradient and accumulators, all invariant to positive scale."""

    def __init__(self, stack: Stack, frame: Frame, memory: float | Tensor, **tensors: Tensor) -> None:
        def inverse(x: Tensor) -> Tensor:
            return x if frame is None else x / frame

        self.stack, self.memory = stack, memory
        self.step = tensors["step"]  # [N, 1, 1]
        self.like_weights = {k: inverse(tensors[k]) for k in ("w", "moved") if k in tensors}
        self.like_gradients = {k: into(tensors[k], frame) for k in ("g", "m", "m_slow") if k in tensors}
        self.v = into(into(tensors["v"], frame), frame)

    @property
    def w(self) -> Tensor:
        """Weights."""
        return self.like_weights["w"]

    @property
    def moved(self) -> Tensor:
        """The last update, of a rule that remembers it."""
        return self.like_weights["moved"]

    @property
    def g(self) -> Tensor:
        """Gradient."""
        return self.like_gradients["g"]

    @property
    def m(self) -> Tensor:
        """Its average over 10 steps."""
        return self.like_gradients["m"]

    @property
    def slow(self) -> Tensor:
        """Its average over 100 steps."""
        return self.like_gradients["m_slow"]

    @property
    def nesterov(self) -> Tensor:
        """The momentum that the direction is taken of."""
        return features.nesterov(self.m, self.g, self.memory)

    @cached_property
    def adam(self) -> Tensor:
        """``m_hat / sqrt(v_hat)``."""
        return features.adam_direction(self.m, self.v, self.step)

    @property
    def by_entry(self) -> bool:
        """Whether it moves along the Adam direction, as all do but matrices that are not thin."""
        return not is_wide(self.stack)

    @property
    def smallness(self) -> Tensor:
        """The weights' RMS relative to usual ones, 1 for those that are not small: ``[N, 1, 1]``."""
        relative = features.root(self._mean_square) * (self.w.shape[-1] ** 0.5 / USUAL)
        return relative.clamp(SMALLEST, 1.0)

    @cached_property
    def _mean_square(self) -> Tensor:
        return features.mean_square(self.w)

    def entrywise(self, adam: Tensor) -> Tensor:
        """The step along an Adam direction: ``[N, R, C]``."""
        return adam * (self.smallness if self.stack.kind == "matrix" else VECTOR)

    def preconditioned(self, momentum: Tensor, whole: Tensor | bool) -> Tensor:
        """Divided by ``v_hat^(1/4)`` where it is not whitened on both sides (``Whitening.whole``): ``[N, R, C]``."""
        if whole is True:
            return momentum
        root = features.quarter_power(self.v, self.step)
        return momentum * (root if whole is False else torch.where(whole, 1, root))

    @property
    def pace(self) -> Tensor:
        """What a direction of the polar factor's size is multiplied by: ``[N, 1, 1]``."""
        return self.smallness * polar_size(self.g)

    def along(self, direction: Tensor, shrink: Tensor) -> Tensor:
        """A matrix's step along a direction of its polar factor's size, and a little toward zero: ``[N, R, C]``."""
        step = self.pace * direction
        to_size = features.root_mean_square(step) * features.rsqrt(self._mean_square)
        return torch.addcmul(step, self.w, shrink * relative_fan_in(direction) * to_size)


def moderation(square: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """What to multiply a gradient by, so that its RMS is at most ``OUTLIER`` times that of those before it.

    Args:
        square: mean squares of gradients in the frame, ``[N]``.
        v: the averages of those up to the step before, ``[N]``.
        step: how many steps those are, ``[N]``.

    Returns:
        ``[N]``, at most 1; 1 where all gradients before were zero.
    """
    usual = v / (1 - features.SQUARE ** step.clamp(min=1))
    known = usual > 0
    ratio = torch.where(known, usual, 1).sqrt() * features.rsqrt(square)
    return torch.where(known, OUTLIER * ratio, 1).clamp(max=1.0)


def moderated(layout: Layout, frames: list[Frame], g: list[Tensor], v: list[Tensor], steps: Tensor) -> list[Tensor]:
    """The gradients ``[N, R, C]`` of all stacks, outliers shortened; their matrices are ``steps`` [.., 1, 1] old."""
    squares = torch.cat([features.mean_square(into(x, f)) for x, f in zip(g, frames, strict=True)])
    usual = torch.cat([into(into(x, f), f).mean((-2, -1), keepdim=True) for x, f in zip(v, frames, strict=True)])
    factors = moderation(squares, usual, steps).split(layout.counts)
    return [x * factor.to(x.dtype) for x, factor in zip(g, factors, strict=True)]


def age(state: State) -> Tensor:
    """Steps that the network has made, each of which some tensors may have sat out (0-d)."""
    return torch.stack([s["clock"] for s in state.values()]).amax()


def hush(views: list[View]) -> None:
    """Silence vectors whose momentum is rounding noise beside the network's largest.

    Some have a gradient that is zero but for rounding (a key's bias: softmax cannot see it). Relative to its own
    size that noise would become full steps and features.
    """
    size = [v.m.abs().amax((-2, -1), keepdim=True) for v in views]
    loudest = torch.stack([x.amax() for x in size]).amax()
    for view, x in zip(views, size, strict=True):
        if view.stack.kind in ("vector", "gain"):
            heard = x > _ROUNDING * torch.finfo(x.dtype).eps * loudest
            view.like_gradients = {k: g * heard for k, g in view.like_gradients.items()}


def polar_size(x: Tensor) -> float:
    """``0.2 (512 / C)^(1/4) sqrt(max(R, C))``: a polar factor of full rank and fan-in 512 gets the RMS 0.2."""
    return 0.2 * relative_fan_in(x) * max(x.shape[-2:]) ** 0.5


def relative_fan_in(x: Tensor) -> float:
    """``(512 / C)^(1/4)``."""
    return (FAN_IN / x.shape[-1]) ** 0.25


class Nominal(UpdateRule):
    """Decaying polar steps on matrices, Adam steps on the rest; ``frame=False`` leaves out the frame."""

    ends = True
    averages: tuple[str, ...] = ("m", "v")  # of the gradient, as :func:`features.averaged` names them
    remembers: tuple[str, ...] = ()  # what else of the state is like a weight
    moderate = True  # whether outliers among gradients are shortened
    whiten = True  # whether matrices step in the whitened units of their hidden axes

    def __init__(self, frame: bool = True) -> None:
        super().__init__()
        self.frame = frame

    def init(self, params: Weights) -> State:
        state = features.fresh(params, self.averages)
        return {n: s | whitening.fresh(params[n]) for n, s in state.items()} if self.whiten else state

    def forward(
        self,
        params: Weights,
        grads: Weights,
        state: State,
        symmetry: Symmetry,
        *,
        total_steps: float | Tensor | None = None,
        weight_decay: float | Mapping[str, float] = 0.0,
    ) -> tuple[Weights, State]:
        if not grads:
            return {}, state
        memory = self.memory(state)
        layout, frames = self._laid_out(params, grads, symmetry)
        seen, state = self._seen(layout, frames, grads, state, memory)
        clock = age(state) + 1
        views = self._views(layout, frames, params, seen, state, memory)
        rate, state = self.rate(views, state, clock, total_steps)
        young = youth(clock, total_steps)
        white = Whitening(layout, [v.g for v in views], state, young) if self.whiten else None
        state = white.state if white else state
        directions = self.directions(layout, views, white, clock, total_steps)
        back = -rate
        updates = layout.scatter([into(back * d, frame) for d, frame in zip(directions, frames, strict=True)])
        decays = weight_decay if isinstance(weight_decay, Mapping) else dict.fromkeys(grads, weight_decay)
        for n, wd in decays.items():
            if wd and n in updates:
                updates[n] = updates[n] - rate * wd * params[n]
        return updates, {n: s | {"clock": clock} for n, s in self.remember(updates, state).items()}

    def _laid_out(self, params: Weights, grads: Weights, symmetry: Symmetry) -> tuple[Layout, list[Frame]]:
        layout = layout_of(symmetry, tuple(grads), next(iter(grads.values())).device)
        log_c = potentials(symmetry, params) if self.frame else None
        return layout, [scales(log_c, stack.row_scales, stack.col_scales) for stack in layout.stacks]

    def _seen(
        self, layout: Layout, frames: list[Frame], grads: Weights, state: State, memory: float | Tensor
    ) -> tuple[list[dict[str, Tensor]], State]:
        """Gradient (outliers shortened), its averages and their age of every stack; and the next state."""
        old = {k: _slots(layout, state, k) for k in self.averages}
        g = layout.gather(grads)
        steps = torch.stack([state[n]["step"] for n in layout.names])
        ages = steps.index_select(0, layout.owners)[:, None, None]
        if self.moderate:
            g = moderated(layout, frames, g, old["v"], ages)
        seen = [
            {"g": x, "step": step.to(x.dtype), **features.averaged(x, {k: y[i] for k, y in old.items()}, memory)}
            for i, (x, step) in enumerate(zip(g, (ages + 1).split(layout.counts), strict=True))
        ]
        new = {k: layout.scatter([x[k] for x in seen]) for k in self.averages}
        new["step"] = dict(zip(layout.names, (steps + 1).unbind(), strict=True))
        return seen, state | {n: state[n] | {k: x[n] for k, x in new.items()} for n in layout.names}

    def _views(
        self,
        layout: Layout,
        frames: list[Frame],
        params: Weights,
        seen: list[dict[str, Tensor]],
        state: State,
        memory: float | Tensor,
    ) -> list[View]:
        others = {"w": layout.gather(params), **{k: _slots(layout, state, k) for k in self.remembers}}
        views = [
            View(stack, frame, memory, **seen[i], **{k: x[i] for k, x in others.items()})
            for i, (stack, frame) in enumerate(zip(layout.stacks, frames, strict=True))
        ]
        hush(views)
        return views

    def memory(self, state: State) -> float | Tensor:
        """Decay rate of the momentum at the next step (0-d)."""
        return features.MOMENTUM

    def rate(
        self, views: list[View], state: State, clock: Tensor, total_steps: float | Tensor | None
    ) -> tuple[Tensor, State]:
        """What the directions are multiplied by at a step (0-d), and the next state."""
        return RATE * schedule(clock, total_steps), state

    def remember(self, updates: Weights, state: State) -> State:
        """The next state, once the updates are known."""
        return state

    def directions(
        self,
        layout: Layout,
        views: list[View],
        white: Whitening | None,
        clock: Tensor,
        total_steps: float | Tensor | None,
    ) -> list[Tensor]:
        """What to subtract at unit rate, per stack, in the frame: ``[N, R, C]``."""
        momenta = [v.nesterov if v.stack.kind in ("matrix", "vector") else v.m for v in views]
        return steps(layout, views, momenta, white, pull(clock, total_steps))


def steps(
    layout: Layout, views: list[View], momenta: list[Tensor], white: Whitening | None, shrink: Tensor
) -> list[Tensor]:
    """The nominal steps, ``[N, R, C]`` per stack: of matrices and biases along a momentum, of all else along Adam's.

    Args:
        layout: of the tensors.
        views: of all stacks.
        momenta: of all stacks; looked at are those of matrices and of vectors.
        white: in whose units matrices step; None: in those of the frame.
        shrink: the part of their steps that goes toward zero, as :func:`pull` has it (0-d).
    """
    biases = biases_of(layout)
    directions, columns = polar_directions(biases, views, momenta, white)
    adam = biases.columns({j: views[j].adam for j in biases.stacks})
    columns = {i: SIZE * views[i].pace * heard(adam[i]) * x for i, x in columns.items()}
    by_entry = {i: v.adam for i, v in enumerate(views) if v.by_entry}
    by_entry = white.turned(momenta, by_entry) if white else by_entry
    found = [
        v.entrywise(by_entry[i]) if v.by_entry else v.along(d, shrink)
        for i, (v, d) in enumerate(zip(views, directions, strict=True))
    ]
    return biases.replaced(found, columns)


def heard(adam: Tensor) -> Tensor:
    """How much of their steps biases with this Adam direction make, ``[N, 1, 1]``: all, unless gradients alternate."""
    return (features.root_mean_square(adam) / NOISE).clamp(max=1.0)


def polar_directions(
    biases: Biases, views: list[View], momenta: list[Tensor], white: Whitening | None
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """:func:`whitened_polar` of the preconditioned momenta of matrices and their biases."""
    whole = white.whole if white else (False,) * len(views)
    x = [
        v.preconditioned(m, w) if not v.by_entry or i in biases.stacks else m
        for i, (v, m, w) in enumerate(zip(views, momenta, whole, strict=True))
    ]
    return whitened_polar(biases, x, [not v.by_entry for v in views], white)


def whitened_polar(
    biases: Biases, x: list[Tensor], wide: list[bool], white: Whitening | None, iterations: int = NEWTON_SCHULZ
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """``P polar(P n P) P`` of matrices and their biases, at the size of the polar factor.

    Args:
        biases: of the matrices, whose last columns they are.
        x: ``[N, R, C]`` per stack.
        wide: of which stacks; the others stay as they are.
        white: what has P; None: no P.
        iterations: of Newton and Schulz.

    Returns:
        ``[N, R, C]`` per stack, and of stacks with biases ``[N, R, 1]``.
    """
    x = white(x) if white else x
    columns = biases.columns(dict(enumerate(x)))
    joined = [torch.cat([m, SIZE * columns[i]], -1) if i in columns else m for i, m in enumerate(x)]
    polar = [newton_schulz(m, iterations) if w else m for m, w in zip(joined, wide, strict=True)]
    columns = {i: polar[i][..., -1:] for i in columns}
    polar = [p[..., :-1] if i in columns else p for i, p in enumerate(polar)]
    if white is None:
        return polar, columns
    x = white(biases.replaced(polar, columns))
    columns = biases.columns(dict(enumerate(x)))
    sizes = {i: features.to_rms(x[i], p) for i, p in enumerate(polar) if wide[i]}
    return [d * sizes[i] if i in sizes else d for i, d in enumerate(x)], {i: c * sizes[i] for i, c in columns.items()}


def _slots(layout: Layout, state: State, key: str) -> list[Tensor]:
    """What the state holds by this name: ``[N, R, C]`` per stack."""
    return layout.gather({n: state[n][key] for n in layout.names})


class DecayingPolar(Nominal):
    """The strongest optimizer of the design study, as it was there: an opponent, without theta and without frame.

    ``0.2 sqrt(max(R, C)) polar(0.9 m + 0.1 g)`` in five iterations on every matrix, Adam on the rest, the rate 0.01
    decayed along a half cosine (constant without a horizon).
    """

    moderate = whiten = False

    def __init__(self) -> None:
        super().__init__(frame=False)

    def rate(
        self, views: list[View], state: State, clock: Tensor, total_steps: float | Tensor | None
    ) -> tuple[Tensor, State]:
        """A half cosine to zero."""
        if total_steps is None:
            return RATE * torch.ones_like(clock), state
        total = torch.as_tensor(total_steps, dtype=clock.dtype, device=clock.device)
        progress = ((clock - 1) / total).clamp(max=1.0)
        return RATE * 0.5 * (1 + torch.cos(torch.pi * progress)), state

    def directions(
        self,
        layout: Layout,
        views: list[View],
        white: Whitening | None,
        clock: Tensor,
        total_steps: float | Tensor | None,
    ) -> list[Tensor]:
        """What to subtract at unit rate, per stack: ``[N, R, C]``."""
        return [
            0.2 * max(v.g.shape[-2:]) ** 0.5 * newton_schulz(v.nesterov) if v.stack.kind == "matrix" else v.adam
            for v in views
        ]
