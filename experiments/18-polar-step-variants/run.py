"""Variants of the nominal rule on VALID or another suite, several seeds of a task in one batch.

    python experiments/18-polar-step-variants/run.py [--suite VALID] [--out runs/nominal] \
      decay=cosine power=0,iterations=5 ...

Each argument is a variant: options that differ from the rule as it is, joined by commas. What it prints:
``batched.compare``. Constants of the rule, and the paced one:
``experiments/28-longer-momentum/constants.py``.
"""

import argparse
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from batched import PLAIN, SEEDS, compare, final_losses

from learned_opt import features
from learned_opt.rules.biases import SIZE, Biases, biases_of
from learned_opt.rules.nominal import (
    FAN_IN,
    RATE,
    SHRINK,
    Nominal,
    View,
    heard,
    of_length,
    polar_size,
    schedule,
    whitened_polar,
)
from meta_train.bench.suites import suite_named
from tasks.task import Task


@dataclass(frozen=True)
class Options:
    """The rule as it is, unless told otherwise."""

    rate: float = 1.0  # of everything
    decay: str = "line"  # or "cosine", "square"
    warm_up: float = 0.0  # fraction of the run
    frame: float = 1.0
    whiten: float = 1.0  # 0: matrices step in the units of the frame
    momentum: float = 0.9
    look_ahead: float = 0.9  # n = look_ahead m + (1 - look_ahead) g
    slow: float = 0.0  # times the momentum of decay 0.99, added
    power: float = 0.5  # of the root of the second moment that the momentum is divided by; 1 is Adam
    iterations: float = 4
    column: float = 1.0  # 0: biases move like other vectors
    vector: float = 2.0  # those of networks without normalisation
    normalised: float = 2.0  # vectors of those with it
    gain: float = 2.0
    thin: float = 4.0  # matrices of at most so many rows or columns take one Adam direction
    early: float = 1.0  # 0: at the beginning as well as later
    embedding: float = 2.0
    shrink: float = SHRINK  # part of a matrix's step that goes toward zero weights
    shrink_steps: float = 0.5  # power of 800 / T in it
    shrink_fan_in: float = 0.25  # power of 512 / C in it
    first: float = 1.0
    last: float = 1.0
    small: float = 1.0  # power of the RMS times root fan-in of weights smaller than usual in their step
    size: float = 0.0  # power of the matrix's own RMS times root fan-in in its step
    after: float = 0.0  # decay of an average of the directions, after the polar factor
    horizon: float = 1.0  # times the task's own

    def label(self) -> str:
        """Only what differs."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items()) or PLAIN


class Variant(Nominal):
    """The nominal rule with options."""

    averages = features.AVERAGES  # with the slow one, for the option of that name

    def __init__(self, options: Options) -> None:
        super().__init__(frame=bool(options.frame))
        self.options, self.whiten = options, bool(options.whiten)

    def init(self, params):
        """Fresh state, with one more average where it is asked for."""
        state = super().init(params)
        return {n: s | {"after": torch.zeros_like(s["m"])} if self.options.after else s for n, s in state.items()}

    def rate(self, views, state, clock, total_steps):
        """Decaying, perhaps after a warm-up."""
        o = self.options
        done = ((clock - 1) / total_steps).clamp(max=1.0)
        ramp = (done / o.warm_up).clamp(max=1.0) if o.warm_up else 1.0
        left = ((1 - done) / (1 - o.warm_up)).clamp(max=1.0)
        shape = {"line": left, "cosine": 0.5 * (1 - torch.cos(torch.pi * left)), "square": left**2}[o.decay]
        return RATE * schedule(torch.ones_like(clock), total_steps) * ramp * shape, state

    def forward(self, params, grads, state, symmetry, *, total_steps=None, weight_decay=0.0):
        """As the rule's, perhaps with an average of the updates."""
        before, decay = state, self.options.after
        updates, state = super().forward(params, grads, state, symmetry, total_steps=total_steps)
        for n, s in state.items() if decay else ():
            s["after"] = before[n]["after"].lerp(updates[n], 1 - decay)
            updates[n] = s["after"] / (1 - decay ** s["step"])
        return updates, state

    def directions(self, layout, views: list[View], white, clock, total_steps) -> list[Tensor]:
        """What to subtract at unit rate."""
        o = self.options
        self.shrink = o.shrink * of_length(clock, total_steps) ** (2 * o.shrink_steps)
        normalised = any(b.kind == "gain" for blocks in layout.symmetry.blocks.values() for b in blocks)
        whole = white.whole if white else (False,) * len(views)
        x = [self.momentum(v, w) for v, w in zip(views, whole, strict=True)]
        biases = biases_of(layout) if o.column else Biases({}, {})
        x, columns = whitened_polar(biases, x, [v.stack.kind == "matrix" for v in views], white, int(o.iterations))
        entrywise = {i: v.adam for i, v in enumerate(views)}
        if white and o.early:
            entrywise = white.turned([v.nesterov for v in views], entrywise)
        found = [self.direction(v, d, entrywise[i], normalised) for i, (v, d) in enumerate(zip(views, x, strict=True))]
        adam = biases.columns({j: views[j].adam for j in biases.stacks})
        pace = {i: SIZE * polar_size(views[i].g) * views[i].smallness ** o.small * heard(adam[i]) for i in columns}
        return [o.rate * d for d in biases.replaced(found, {i: pace[i] * x for i, x in columns.items()})]

    def momentum(self, v: View, whole: Tensor | bool) -> Tensor:
        """What the polar factor is taken of, before it is whitened."""
        o = self.options
        n = v.g.lerp(v.m, o.look_ahead)
        if o.slow:
            n = n / (1 - o.momentum**v.step) + o.slow * v.slow / (1 - 0.99**v.step)
        return n * torch.where(torch.as_tensor(whole), 1, features.quarter_power(v.v, v.step) ** (2 * o.power))

    def direction(self, v: View, polar: Tensor, entrywise: Tensor, normalised: bool) -> Tensor:
        """Of one stack."""
        o, kind = self.options, v.stack.kind
        if kind != "matrix":
            return getattr(o, "normalised" if normalised and kind == "vector" else kind) * entrywise
        step = entrywise if min(v.g.shape[-2:]) <= o.thin else self.of_matrix(v, polar)
        step = step * v.smallness**o.small
        last, first = v.stack.fixed.T[..., None, None]  # writes the network's outputs, reads its inputs
        return step * torch.where(first > 0, o.first, 1.0) * torch.where(last > 0, o.last, 1.0)

    def of_matrix(self, v: View, polar: Tensor) -> Tensor:
        """Of a matrix that is not thin."""
        step = polar_size(polar) * polar
        if self.options.size:
            step = step * (features.mean_square(v.w) * v.w.shape[-1]).clamp(1e-4, 9).sqrt() ** self.options.size
        shrink = self.shrink * (FAN_IN / v.w.shape[-1]) ** self.options.shrink_fan_in
        return step + shrink * features.root_mean_square(step) * features.unit_rms(v.w)


@mock.patch.object(features, "MOMENTUM", features.MOMENTUM)  # restored afterwards
def losses(options: Options, task: Task, multiple: float) -> list[float]:
    """Final train loss of every seed, after a multiple of the variant's own steps."""
    features.MOMENTUM = options.momentum
    return final_losses(task, Variant(options), SEEDS, round(multiple * options.horizon * task.steps))


def main() -> None:
    """Run what is missing and print a row per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--suite", default="VALID", help="or package.module:DICT")
    parser.add_argument("--out", type=Path, default=Path("runs/nominal"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {f.name: type(f.default) for f in fields(Options)}
    told = [dict(pair.split("=") for pair in variant.split(",")) for variant in args.variants]
    variants = [Options(**{k: kinds[k](v) for k, v in pairs.items()}) for pairs in told]
    runs = {o.label(): partial(losses, o) for o in (Options(), *variants)}
    compare(suite_named(args.suite), runs, args.out)


if __name__ == "__main__":
    main()
