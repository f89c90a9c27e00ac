"""What a first step of meta-learning could gain on top of the paced rule: its meta-gradient by coefficients.

    python experiments/32-first-order-corrections/run.py [--calls 40] [--sigma 0.08] \
      [--out runs/first_order] gain.done slow.snr ...

A coefficient ``HEAD.FEATURE`` says how much of a feature of a layer goes into a correction of its step. With features
``f`` (of unit size, about) and ``a = tanh(sum coefficient * f)``, a matrix's polar step P is taken of ``n + a_slow
rms(n) slow``, then ``P + a_adam rms(P) adam`` brought back to P's size, times ``exp(a_gain)``, and the pull to zero is
``0.2 a_shrink`` more; where steps are Adam's, ``vslow`` and ``vgain`` do the same. At zero this is ``paced``.

Antithetic evolution strategies over whole runs of fresh TRAIN tasks, all families in turn; the loss is the logarithm of
the train loss toward the end of the run. Printed: d log loss / d coefficient with its standard error (every call
weighs the same, whatever the size of its losses), and an unbiased estimate of the squared norm over all coefficients
(about 0 where there is nothing to learn at first order). Calls are kept in ``--out``: more go on from there.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from learned_opt import features
from learned_opt.layout import Layout
from learned_opt.rules.biases import biases_of
from learned_opt.rules.nominal import View, polar_directions, polar_size, pull, relative_fan_in, steps
from learned_opt.rules.paced import Paced
from learned_opt.rules.whitening import Whitening
from meta_train.estimators import ES
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.suites import TRAIN

HEADS = ("gain", "slow", "adam", "shrink", "vgain", "vslow")
CENTRE = torch.tensor([0.5, 0.3, -0.05, -0.45, -0.5, -0.25])  # of features.statistics, on TRAIN
SPREAD = torch.tensor([0.3, 0.2, 0.1, 0.15, 0.25, 0.12])
FEATURES = ("cos_n_slow", "cos_g_n", "cos_n_w", "snr", "snr_slow", "size", "slope", "rows", "cols", "last", "first")
FEATURES += ("age", "horizon", "done", "early", "one")
DEFAULT = (
    "vslow.one vslow.snr vgain.one vgain.size vgain.last vgain.done slow.one slow.snr slow.slope gain.done gain.early "
    "gain.slope gain.snr gain.last gain.first gain.rows shrink.one shrink.done shrink.early adam.one adam.last"
)


class Corrected(Paced):
    """The paced rule with corrections that are linear in features of a layer; theta is the coefficients, at zero."""

    averages = features.AVERAGES

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(len(names)))
        pairs = [name.split(".") for name in names]
        self.at = [(HEADS.index(head), FEATURES.index(feature)) for head, feature in pairs]

    def corrections(self, seen: Tensor) -> dict[str, Tensor]:
        """Per head ``[N, 1, 1]``, of features ``[N, FEATURES]``."""
        table = seen.new_zeros(len(HEADS), len(FEATURES))
        heads, columns = torch.tensor(self.at).T
        table = table.index_put((heads, columns), self.coefficients)
        return dict(zip(HEADS, torch.tanh(seen @ table.T).T[..., None, None], strict=True))

    def directions(
        self, layout: Layout, views: list[View], white: Whitening, clock: Tensor, total_steps: Tensor
    ) -> list[Tensor]:
        """As the paced rule's, corrected."""
        odd = [features.odd_features(v.g, v.nesterov, v.slow, v.w, v.adam) for v in views]
        told = [self.corrections(layer_features(v, x, clock, total_steps)) for v, x in zip(views, odd, strict=True)]
        momenta = [
            v.nesterov + a["slow"] * features.root_mean_square(v.nesterov) * x[2]
            for v, x, a in zip(views, odd, told, strict=True)
        ]
        polar, _ = polar_directions(biases_of(layout), views, momenta, white)
        shrink = pull(clock, total_steps)
        plain = steps(layout, views, momenta, white, shrink)
        return [_direction(*each, shrink) for each in zip(views, plain, polar, odd, told, strict=True)]


def _direction(v: View, plain: Tensor, polar: Tensor, x: Tensor, a: dict[str, Tensor], shrink: Tensor) -> Tensor:
    if v.by_entry:
        return torch.exp(a["vgain"]) * _mixed(plain, a["vslow"] * x[2])
    step = v.smallness * polar_size(polar) * polar
    shrink = shrink * relative_fan_in(polar) + 0.2 * a["shrink"]
    toward_zero = shrink * features.root_mean_square(step) * features.unit_rms(v.w)
    return torch.exp(a["gain"]) * _mixed(step, a["adam"] * x[4]) + toward_zero


def _mixed(step: Tensor, other: Tensor) -> Tensor:
    """The sum, ``other`` in units of the step's RMS, at the step's RMS."""
    size = features.root_mean_square(step)
    both = step + size * other
    return both * size * features.rsqrt(features.mean_square(both))


def layer_features(v: View, x: Tensor, clock: Tensor, total_steps: Tensor) -> Tensor:
    """``[N, FEATURES]``: statistics, slope along the layer's own last step, shape, place, time."""
    seen = features.statistics(x, v.g, v.m, v.slow, v.w, v.step[:, 0, 0])
    seen = ((seen - CENTRE) / SPREAD).clamp(-3, 3)
    lengths = torch.linalg.vector_norm(v.g, dim=(-2, -1)) * torch.linalg.vector_norm(v.moved, dim=(-2, -1))
    down = -(v.g * v.moved).sum((-2, -1)) / torch.where(lengths > 0, lengths, 1)
    shape = torch.log2(torch.tensor([float(n) for n in v.stack.shape[1:]])) / 2 - 2.5
    place = 2 * (v.stack.fixed - 0.3)
    done = (clock - 1) / total_steps
    early = 2 * (1 - done) ** 8 - 0.3
    time = [torch.log10(clock) - 1.8, 4 * (torch.log10(total_steps) - 2.6), 3 * (done - 0.5), early]
    time = torch.stack([*time, torch.ones_like(done)])
    slope = torch.tanh(down / 0.1)[:, None]
    return torch.cat([seen, slope, shape.expand(len(seen), -1), place, time.expand(len(seen), -1)], -1)


def sample(rule: Corrected, family: str, call: int, estimator: ES) -> dict:
    """One call of the estimator on a fresh task."""
    generator = generator_of(2, "grad", (call, list(TRAIN).index(family)))
    task = TRAIN[family](generator)
    unroll = Unroll(task, rule, symmetry_of(task), (200, 400), end_weight=8.0, transform="log", floor=1e-4)
    theta = {n: p.detach() for n, p in rule.named_parameters()}
    loss, gradient, _, metrics = estimator(unroll, theta, {}, generator)
    return {
        "task": task.name,
        "loss": loss.item(),
        "diverged": metrics["diverged"],
        "gradient": gradient["coefficients"].tolist(),
    }


def report(names: list[str], rows: list[dict]) -> str:
    """One line per coefficient, the largest in units of its error first, and the squared norm."""
    gradients = torch.tensor([r["gradient"] for r in rows], dtype=torch.float64)
    size = gradients.square().mean(1, keepdim=True).sqrt()
    z, unit, count = gradients / size, size.median(), len(rows)
    mean = unit * z.mean(0)
    error = unit * z.std(0) / count**0.5
    squared = unit**2 * (z.sum(0).square().sum() - z.square().sum()) / (count * (count - 1))
    spread = unit**2 * (2 * len(names)) ** 0.5 / count
    order = (mean / error).abs().argsort(descending=True)
    lines = [f"{names[i]:16s} {mean[i]:+.3f} +- {error[i]:.3f}" for i in order]
    return "\n".join([*lines, f"{count} calls; squared norm {squared:.4f} +- {spread:.4f}"])


def main() -> None:
    """Go on with the calls and print the estimates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coefficients", nargs="*", default=DEFAULT.split())
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--sigma", type=float, default=0.08)
    parser.add_argument("--out", type=Path, default=Path("runs/first_order"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rule = Corrected(args.coefficients)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.sigma:g}-{'-'.join(args.coefficients)}.jsonl"[-200:]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    families = list(TRAIN)
    for call in range(len(rows), args.calls):
        rows.append(sample(rule, families[call % len(families)], call // len(families), ES(16, args.sigma)))
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print(report(args.coefficients, rows))


if __name__ == "__main__":
    main()
