"""One truncated unroll of a batch of inner problems.

A *particle* is one run of the task: its own initial weights, data and horizon. Particles of one
unroll share the task, so every tensor has a leading particle axis ``P`` and one step of all of them
is one batched program. A particle that reaches its horizon is replaced by a fresh one where it
stands, so runs of different lengths stay one batch.

``copies`` particles share initial weights, data and horizon (an antithetic pair has two); copy
``c`` of run ``i`` is particle ``c * (P // copies) + i``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.symmetry import Symmetry
from tasks.task import Batch, Task, check_ceiling, check_losses

Particles = dict[str, Any]
"""Plain tensors: ``params`` and ``state`` (leading axis P); ``step``, ``horizon`` (what the rule is
told) and ``stop`` (when the run ends: the horizon, or earlier in a desynchronised first run), [P]
int64."""

DATA_CHUNK = 8  # inner steps whose batches are drawn at once: one gather, bounded memory


class Trace(NamedTuple):
    """What an unroll of K steps saw."""

    loss: Tensor  # [K, P] normalised, clipped, weighted: its mean is the meta-loss
    raw: Tensor  # [K, P] the task's loss, no graph; NaN or inf where the run has diverged
    segment: Tensor  # [K, P] int64, how often the particle was reset before this step


class _KnownGradient(torch.autograd.Function):
    """The loss as a function of weights at which its gradient is known: one pass by the task."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        pulled = [outer[0].view(-1, *[1] * (g.ndim - 1)) * g for g in grads]
        return (None, None, *pulled, *[None] * len(grads))


class _Recompute(torch.autograd.Function):
    """``function(*tensors)``, keeping its inputs only and running it again in the backward pass.

    ``torch.utils.checkpoint`` does the same, but its hooks on every saved tensor cost more than the
    many small operations of a rule themselves.
    """

    @staticmethod
    def forward(ctx: Any, function: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        ends = [(y, dy) for y, dy in zip(outputs, outer, strict=True) if y.requires_grad]
        grads = iter(
            torch.autograd.grad(
                [y for y, _ in ends],
                [x for x in inputs if x.requires_grad],
                [dy for _, dy in ends],
                allow_unused=True,
            )
        )
        return (None, *(next(grads) if need else None for need in needed))


@dataclass(frozen=True)
class Unroll:
    """The inner problem of meta-training; calling it takes ``steps`` steps with every particle.

    Attributes:
        task: the problem; its loss, data and initial weights.
        rule: the rule; its parameters come in as theta.
        symmetry: of the task's model.
        horizon: lowest and highest horizon; drawn log-uniformly for every run.
        end_weight: 0: every step of a run counts the same. p > 0: step t of T counts in proportion
            to (t / T)^p, normalised to mean 1 over the run: the rule is judged by where it ends.
        transform: "clip": min(loss / ceiling, clip). "log": the logarithm of that, floored.
        clip: losses above ``clip * task.ceiling`` count as that, and so does NaN.
        floor: "log" counts losses below ``floor * task.ceiling`` as that.
        measure: batch of the meta-loss: the training batch before the update (free), a fresh one,
            or the task's held-out batch.
        grid: runs end at multiples of this, where they are longer. Particles whose ages differ by multiples of ten do
            what the rule does on its slow clock at the same steps, so that it is left out at all others.

    Raises:
        TaskError: the task's ceiling, or a loss, is not positive.
    """

    task: Task
    rule: UpdateRule
    symmetry: Symmetry
    horizon: tuple[int, int]
    end_weight: float = 0.0
    transform: Literal["clip", "log"] = "clip"
    clip: float = 1.5
    floor: float = 1e-3
    measure: Literal["train", "fresh", "held_out"] = "train"
    grid: int = 1

    def __post_init__(self) -> None:
        check_ceiling(self.task)

    def init(
        self,
        particles: int,
        generator: torch.Generator,
        *,
        copies: int = 1,
        spread: bool = False,
        common: bool = False,
    ) -> Particles:
        """Fresh particles.

        Args:
            particles: their number P, a multiple of ``copies``.
            generator: of weights and horizons.
            copies: particles that share a run's initial weights, data and horizon.
            spread: end first runs after a uniform fraction of the horizon, so that at any later
                time the particles are in different phases.
            common: one horizon for all.

        Raises:
            ValueError: ``particles`` is not a positive multiple of ``copies``.
        """
        if particles < 1 or particles % copies:
            raise ValueError(
                f"{particles} particles cannot be split into {copies} copies each. "
                f"Pass a positive multiple of {copies}."
            )
        runs = particles // copies
        horizon = self._horizons(1 if common else runs, generator).expand(runs).clone()
        fraction = torch.rand(runs, generator=generator, dtype=torch.float64) if spread else 1.0
        stop = self._on_grid((horizon * fraction).ceil().long().clamp(min=1)) if spread else horizon
        params, state = self._fresh(runs, copies, generator)
        return {
            "params": params,
            "state": state,
            "step": torch.zeros(particles, dtype=torch.int64),
            "horizon": horizon.repeat(copies),
            "stop": stop.repeat(copies),
        }

    def __call__(
        self,
        theta: Mapping[str, Tensor],
        particles: Particles,
        steps: int,
        generator: torch.Generator,
        *,
        copies: int = 1,
        batched: bool = False,
        detach: bool = True,
        remat: bool = False,
        rates: Sequence[float] | None = None,
        resets: bool = True,
    ) -> tuple[Particles, Trace]:
        """Take ``steps`` steps.

        Differentiable in theta unless gradients are off (``torch.no_grad``): then without a graph.

        Args:
            theta: the rule's named parameters; with ``batched`` each has a leading particle axis.
            particles: as returned by :meth:`init` or the previous call; not changed.
            steps: number of inner steps K.
            generator: of data and of what resets draw.
            copies: as in :meth:`init`.
            batched: every particle has its own theta.
            detach: the inner gradient is a constant in the meta-gradient (no second derivatives).
            remat: keep only weights, state and gradient of a step and recompute the rule in the
                backward pass. Needs ``detach``.
            rates: what the updates of each step are multiplied by; 1 if not given.
            resets: False goes on with runs that are over or have diverged.

        A run whose copies have all diverged is reset at the end of the call. If one of a pair lives
        on, the other stays as it is and costs the clip until both reach the horizon: to end a run
        by diverging must not pay.
        """
        params, state = particles["params"], particles["state"]
        step, horizon, stop = particles["step"], particles["horizon"], particles["stop"]
        runs = step.numel() // copies
        advance = self._advance(batched, remat and torch.is_grad_enabled())
        batches = self._batches(generator, steps, runs, copies)
        segment = torch.zeros_like(step)
        losses, raws, segments = [], [], []

        for rate in [1.0] * steps if rates is None else rates:
            batch, other = next(batches)
            loss, grads = self._loss_and_gradient(params, batch, detach)
            measured = loss if self.measure == "train" else self._losses(params, other)
            losses.append(self._normalise(measured) * self._weight(step, horizon))
            raws.append(measured.detach())
            segments.append(segment)

            moved, state = advance(theta, params, state, grads, horizon, frozenset((step + 1).tolist()))
            params = moved if rate == 1 else {n: torch.lerp(params[n], p, rate) for n, p in moved.items()}
            step = step + 1
            done = step >= stop
            if resets and done.any():
                segment = segment + done
                which = done[:runs].nonzero().flatten()
                reset = self._reset(params, state, step, horizon, stop, which, copies, generator)
                params, state, step, horizon, stop = reset

        lost = (~raws[-1].isfinite() & (step > 0)).view(copies, runs).all(0)
        if resets and lost.any():
            which = lost.nonzero().flatten()
            reset = self._reset(params, state, step, horizon, stop, which, copies, generator)
            params, state, step, horizon, stop = reset
        after = dict(params=params, state=state, step=step, horizon=horizon, stop=stop)
        trace = Trace(torch.stack(losses), torch.stack(raws), torch.stack(segments))
        check_losses(self.task, trace.raw)
        return after, trace

    def judged(self, params: Weights, batches: int, generator: torch.Generator) -> Tensor:
        """The mean loss of each particle's weights over so many fresh batches, normalised: ``[P]``."""
        runs = len(next(iter(params.values())))
        drawn = [b.view(batches, runs, *b.shape[1:]) for b in self.task.batches(generator, batches * runs)]
        losses = [self._losses(params, tuple(b[k] for b in drawn)) for k in range(batches)]
        return self._normalise(torch.stack(losses).mean(0))

    def losses(self, params: Weights, batch: Batch) -> Tensor:
        """Of each particle's weights on a batch of its own, normalised: ``[P]``."""
        return self._normalise(self._losses(params, batch))

    def _losses(self, params: Weights, batch: Batch) -> Tensor:
        return vmap(self.task.loss)(params, batch)

    def _loss_and_gradient(self, params: Weights, batch: Batch, detach: bool) -> tuple[Tensor, Weights]:
        """Losses [P] and their gradients: particles do not interact, so those of the sum."""
        meta = torch.is_grad_enabled()
        if meta and not detach:
            leaves = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
        else:
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        with torch.enable_grad():
            loss = self._losses(leaves, batch)
            grads = torch.autograd.grad(
                loss.sum(),
                list(leaves.values()),
                create_graph=meta and not detach,
                materialize_grads=True,
            )
        if detach or not meta:
            loss = loss.detach()
            if meta and self.measure == "train":
                loss = _KnownGradient.apply(loss, len(params), *params.values(), *grads)
        return loss, dict(zip(params, grads, strict=True))

    def _advance(self, batched: bool, remat: bool) -> Any:
        def advance(
            theta: Weights,
            params: Weights,
            state: State,
            grads: Weights,
            horizon: Tensor,
            ages: frozenset[int] | None = None,
        ) -> tuple[Weights, State]:
            def single(
                theta: Weights, params: Weights, grads: Weights, state: State, total: Tensor
            ) -> tuple[Weights, State]:
                inputs = (params, grads, state, self.symmetry)
                updates, state = functional_call(self.rule, theta, inputs, {"total_steps": total, "ages": ages})
                return {n: p + updates[n] for n, p in params.items()}, state

            every = vmap(single, in_dims=(0 if batched else None, 0, 0, 0, 0))
            total = horizon.to(next(iter(params.values())).dtype)
            inputs = (theta, params, grads, state, total)
            if not remat:
                return every(*inputs)

            def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
                return tuple(_leaves(every(*_like(inputs, iter(tensors)))))

            outputs = _Recompute.apply(flat, *_leaves(inputs))
            return _like((params, state), iter(outputs))

        return advance

    def _normalise(self, loss: Tensor) -> Tensor:
        relative = loss / self.task.ceiling
        relative = torch.where(relative.isfinite(), relative, self.clip).clamp(max=self.clip)
        return relative.clamp(min=self.floor).log() if self.transform == "log" else relative

    def _weight(self, step: Tensor, horizon: Tensor) -> Tensor:
        """[P]; the midpoint rule makes its mean over a run 1 up to p (p + 1) / (24 horizon^2)."""
        p = self.end_weight
        return (p + 1) * ((step + 0.5) / horizon) ** p

    def _horizons(self, count: int, generator: torch.Generator) -> Tensor:
        low, high = self.horizon
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        drawn = torch.exp(math.log(low) + u * math.log((high + 1) / low)).long().clamp(low, high)
        return self._on_grid(drawn)

    def _on_grid(self, steps: Tensor) -> Tensor:
        return torch.where(steps > self.grid, steps // self.grid * self.grid, steps)

    def _fresh(self, runs: int, copies: int, generator: torch.Generator) -> tuple[Weights, State]:
        with torch.no_grad():
            weights = [self.task.init(generator) for _ in range(runs)]
            states = [self.rule.init(w, self.symmetry) for w in weights]
            return _stack(weights, copies), _stack(states, copies)

    def _reset(
        self,
        params: Weights,
        state: State,
        step: Tensor,
        horizon: Tensor,
        stop: Tensor,
        which: Tensor,
        copies: int,
        generator: torch.Generator,
    ) -> tuple[Weights, State, Tensor, Tensor, Tensor]:
        """Replace the runs ``which`` (all their copies) by fresh ones."""
        runs = step.numel() // copies
        index = torch.cat([which + c * runs for c in range(copies)])
        fresh_params, fresh_state = self._fresh(len(which), copies, generator)
        fresh_horizon = self._horizons(len(which), generator).repeat(copies)
        return (
            _put(params, index, fresh_params),
            _put(state, index, fresh_state),
            step.index_fill(0, index, 0),
            horizon.index_copy(0, index, fresh_horizon),
            stop.index_copy(0, index, fresh_horizon),
        )

    def _batches(self, generator: torch.Generator, steps: int, runs: int, copies: int) -> Iterator[tuple[Batch, Batch]]:
        """Per step the training batch and the batch of the meta-loss, leading axis P."""

        def draw(count: int) -> Batch:
            drawn = self.task.batches(generator, count * runs)
            return tuple(b.view(count, runs, *b.shape[1:]) for b in drawn)

        def share(batch: Batch) -> Batch:
            return tuple(torch.cat([b] * copies) if copies > 1 else b for b in batch)

        for start in range(0, steps, DATA_CHUNK):
            count = min(DATA_CHUNK, steps - start)
            train = draw(count)
            fresh = draw(count) if self.measure == "fresh" else ()
            for k in range(count):
                batch = share(tuple(b[k] for b in train))
                if self.measure == "held_out":
                    other = tuple(b.expand(runs * copies, *b.shape) for b in self.task.held_out())
                else:
                    other = share(tuple(b[k] for b in fresh))
                yield batch, other


def _leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested dicts and tuples, names in alphabetical order."""
    if isinstance(tree, Tensor):
        return [tree]
    branches = (tree[k] for k in sorted(tree)) if isinstance(tree, Mapping) else tree
    return [leaf for branch in branches for leaf in _leaves(branch)]


def _like(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """Nested dicts and tuples of the structure of ``tree`` with other tensors."""
    if isinstance(tree, Tensor):
        return next(leaves)
    if isinstance(tree, Mapping):
        branches = {k: _like(tree[k], leaves) for k in sorted(tree)}
        return {k: branches[k] for k in tree}
    return tuple(_like(v, leaves) for v in tree)


def detached(tree: Any) -> Any:
    """The same nested dict without graphs."""
    if isinstance(tree, dict):
        return {k: detached(v) for k, v in tree.items()}
    return tree.detach()


def tiled(tree: Any, copies: int) -> Any:
    """Every tensor of a nested dict repeated ``copies`` times along the particle axis."""
    if isinstance(tree, dict):
        return {k: tiled(v, copies) for k, v in tree.items()}
    return torch.cat([tree] * copies)


def head(tree: Any, count: int) -> Any:
    """The first ``count`` particles of a nested dict, copied (a view would keep the rest)."""
    if isinstance(tree, dict):
        return {k: head(v, count) for k, v in tree.items()}
    return tree[:count].clone()


def _stack(trees: list[Any], copies: int) -> Any:
    if isinstance(trees[0], dict):
        return {k: _stack([t[k] for t in trees], copies) for k in trees[0]}
    return torch.stack([t.detach() for t in trees] * copies)


def _put(tree: Any, index: Tensor, fresh: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _put(v, index, fresh[k]) for k, v in tree.items()}
    return tree.index_copy(0, index, fresh.to(tree.dtype))
