"""What controls of the hand-made rule are worth, by family: whole runs with controls at random, beside runs without.

    OMP_NUM_THREADS=1 python experiments/56-headroom-of-controls/run.py --suite TRAIN --out train.jsonl

A line for every task: the controls of all runs ``[runs, CONTROLS]``, and the changes of the logs of the final losses.
Two processes may share the tasks (``--part 0``, ``--part 1``, with an ``--out`` each). What is there is not run again.
"""

import argparse
import json
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from learned_opt.batch_layout import batches_of
from learned_opt.rules import whitened_polar
from learned_opt.rules.clock import when
from learned_opt.rules.slots import norm_of
from learned_opt.rules.whitened_polar import Control, WhitenedPolar, matrix_direction
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks.seeds import generator_of
from tasks.suites import STREAMING, TRAIN, VALID

# name: scale of its random value, which is uniform in (-1, 1) times this, or (0, 1) where it is one-sided
CONTROLS = {
    "input": 0.6,
    "hidden": 0.6,
    "output": 0.6,
    "rest": 0.6,
    "fresh": 1.2,
    "decay": 0.8,
    "momentum": 0.4,
    "tilt": 0.6,
    "bias": 0.8,
    "cautious": 0.6,
}
ONE_SIDED = {"cautious"}
LEFT_OUT = 0.4
COPIES, RUNS = 12, 2


class Controlled(WhitenedPolar):
    """The hand-made rule under constant controls, which are its theta: all zero is the hand-made rule."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(len(CONTROLS)))

    def forward(self, *args, **kwargs):
        self.of = dict(zip(CONTROLS, self.c.unbind(), strict=True))
        with patch.object(whitened_polar, "matrix_direction", self.direction):
            return super().forward(*args, **kwargs)

    def momentum(self, measured, network):
        return 1 - (1 - measured) * torch.exp(-self.of["momentum"])

    def controls(self, layout, params, g, new, clock, total_steps):
        tensor = new["tensor"]
        gain = torch.exp(self.of["tilt"] * (1 - 2 * clock.t / total_steps))
        gain = torch.cat([gain * torch.exp(self.of[role_of(b)]).expand(len(b.names)) for b in layout.all])
        tensor["size"] = when(clock.frame, tensor["size"] * gain, tensor["size"])
        fresh, bias = (torch.exp(self.of[k])[None] for k in ("fresh", "bias"))
        each = zip(layout.all, layout.counts, strict=True)
        return {b.key: Control(fresh.expand(n), bias.expand(n), {}) for b, n in each}

    def direction(self, b, g, own, beta1, size, control=None, in_place=False):
        d = matrix_direction(b, g, own, beta1, size, control, False)
        norm = norm_of(d)
        d = d * (1 - self.of["cautious"] * (d * g > 0))
        return d * (norm / norm_of(d))

    def _decayed(self, layout, params, grads, updates, rate, weight_decay, state, in_place):
        tensor = state["tensor"] | {"decay": state["tensor"]["decay"] * torch.exp(self.of["decay"])}
        return super()._decayed(
            layout, params, grads, updates, rate, weight_decay, state | {"tensor": tensor}, in_place
        )


def role_of(b):
    """What a batch of tensors is to the network."""
    if not hasattr(b, "order") or b.factored or b.thin:
        return "rest"
    return "input" if b.order[-1] not in b.hidden else "output" if b.order[0] not in b.hidden else "hidden"


def drawn(generator, copies):
    """Controls of every copy, the first without any: ``[copies, CONTROLS]``."""
    u = 2 * torch.rand(copies, len(CONTROLS), generator=generator) - 1
    one_sided = torch.tensor([n in ONE_SIDED for n in CONTROLS])
    u = torch.where(one_sided, u.abs(), u) * torch.tensor(list(CONTROLS.values()))
    u = u * (torch.rand(u.shape, generator=generator) >= LEFT_OUT)
    u[0] = 0
    return u


@torch.no_grad()
def measured(task, steps, generator, copies=COPIES, runs=RUNS, given=None):
    """Controls ``[runs x copies, CONTROLS]``, and changes of the logs of train and held-out losses ``[2, ...]``."""
    rule = Controlled().requires_grad_(False)
    if given:
        copies = 1 + len(given)
        rows = [[v.get(n, 0.0) for n in CONTROLS] for v in [{}, *given]]
        c = torch.tensor(rows).repeat_interleave(runs, 0)  # copy c of run i is particle c * runs + i
    else:
        c = torch.stack([drawn(generator, copies) for _ in range(runs)], 1).flatten(0, 1)
    unroll = Unroll(task, rule, symmetry_of(task), (steps, steps), transform="log", floor=1e-5, grid=10)
    particles = unroll.init(runs * copies, generator, copies=copies, common=True)
    after, trace = unroll({"c": c}, particles, steps, generator, copies=copies, batched=True, resets=False)
    held_out = unroll.losses(after["params"], tuple(x.expand(len(c), *x.shape) for x in task.held_out()))
    ends = torch.stack([trace.loss[-max(1, steps // 10) :].mean(0), held_out]).view(2, copies, runs)
    changes = (ends - ends[:, :1]).reshape(2, -1)
    network = {k: v.mean().item() for k, v in after["state"]["network"].items() if v.ndim == 1}
    return c, changes, ends[:, 0].mean(-1), network


def main():
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--suite", choices=["TRAIN", "VALID"], default="TRAIN")
    parser.add_argument("--steps", type=int, default=300, help="at most; VALID's tasks say theirs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=8, help="of a family")
    parser.add_argument("--names", nargs="*", help="families or tasks; all")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--first", type=int, default=0, help="number of the first task of a family")
    parser.add_argument("--at", type=json.loads, help="a list of controls by name, instead of random ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if args.out.exists():
        done = {(r["name"], r["task"]) for r in map(json.loads, args.out.read_text().splitlines())}
    suite = TRAIN if args.suite == "TRAIN" else VALID | STREAMING
    todo = [(k, n) for k in range(args.first, args.first + args.tasks) for n in args.names or suite]
    for k, name in todo[args.part :: args.parts]:
        if (name, k) in done:
            continue
        start = time.process_time()
        generator = generator_of(56, name, (k,))
        task = suite[name](generator) if args.suite == "TRAIN" else suite[name]()
        steps = min(args.steps, task.steps) if args.suite == "VALID" else args.steps
        c, changes, base, network = measured(task, steps, generator, runs=args.runs, given=args.at)
        row = {"name": name, "task": k, "steps": steps, "weights": sum(p.numel() for p in task.model.parameters())}
        row |= {"roles": sorted({role_of(b) for b in layout_of(task).all}), "base": base.tolist(), "network": network}
        row |= {"controls": c.tolist(), "train": changes[0].tolist(), "held_out": changes[1].tolist()}
        row["seconds"] = round(time.process_time() - start, 1)
        with args.out.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(name, k, row["seconds"], flush=True)


def layout_of(task):
    """The batches of a task's network."""
    return batches_of(symmetry_of(task), tuple(n for n, _ in task.model.named_parameters()), torch.device("cpu"))


if __name__ == "__main__":
    main()
