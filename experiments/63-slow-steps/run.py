"""Steps and first steps that took longer than their network asks for, beside Muon's or AdamW's.

    OMP_NUM_THREADS=1 python experiments/63-slow-steps/run.py
"""

import copy
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from learned_opt import NFNOpt, infer_symmetry


def seconds(function):
    """CPU seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def muon(model):
    """Muon on matrices, AdamW on vectors."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    both = torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(vectors)
    return lambda: [o.step() for o in both]


def steps(model, loss, count, last=100):
    """Median milliseconds of the last steps, of NFNOpt and of Muon in turns."""
    other = copy.deepcopy(model)
    found = {"nfnopt": [], "muon": []}
    pairs = {"nfnopt": (model, NFNOpt(model.parameters(), total_steps=count).step), "muon": (other, muon(other))}
    for step in range(count):
        for name, (net, update) in pairs.items():
            net.zero_grad()
            loss(net, torch.Generator().manual_seed(step)).backward()
            found[name].append(1e3 * seconds(update))
    return {name: round(statistics.median(x[-last:]), 2) for name, x in found.items()}


def dead_units():
    """A ReLU MLP on digits: units die, and their momentum decays."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    sizes = (64, 128, 128, 10)
    layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]

    def loss(model, generator):
        at = torch.randint(len(x), (64,), generator=generator)
        return functional.cross_entropy(model(x[at]), y[at])

    return steps(nn.Sequential(*layers[:-1]), loss, 1500)


class Radial(nn.Module):
    """Radial functions of 16 coordinates: examples are far from centres, and all farther from some than from others."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(128, 16))
        self.net = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))

    def forward(self, x):
        return self.net(torch.exp(-4 * (x[:, None] - self.centres).square().sum(-1)))


def far_examples():
    """Gradients of very unlike sizes at every step."""
    x = torch.randn(2048, 16)
    y = torch.sin(x @ torch.randn(16, 8))

    def loss(model, generator):
        at = torch.randint(len(x), (64,), generator=generator)
        return functional.mse_loss(model(x[at]), y[at])

    return steps(Radial(), loss, 300)


def net(depth=60, width=32):
    """A deep MLP."""
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def waiting_optimizers():
    """Milliseconds of a forward pass, alone and while ten optimizers of other networks wait for theirs."""
    model, x = net(), torch.randn(4, 32)
    model(x)
    alone = statistics.median(seconds(lambda: model(x)) for _ in range(20))
    others = [NFNOpt(net().named_parameters()) for _ in range(10)]
    beside = statistics.median(seconds(lambda: model(x)) for _ in range(20))
    return {"alone": round(1e3 * alone, 2), f"{len(others)} wait": round(1e3 * beside, 2)}


class Reader(nn.Module):
    """A recurrent layer on long sequences."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def long_sequences():
    """Seconds of inferring the symmetry of a GRU on 400 steps."""
    model, x = Reader(), torch.randn(4, 400, 8)
    return {"inference": round(seconds(lambda: infer_symmetry(model, x)), 2)}


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self, depth=30, growth=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + k * growth, growth, 3, padding=1) for k in range(depth))
        self.head = nn.Linear(3 + depth * growth, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(x.mean((-2, -1)))


def concatenations():
    """A network whose matrices consist of many pieces, one for each layer that they read."""

    def loss(model, generator):
        return model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean()

    return steps(Dense(), loss, 30, 10)


def main():
    """Print a line a case."""
    torch.set_num_threads(1)
    for case in (far_examples, dead_units, waiting_optimizers, long_sequences, concatenations):
        torch.manual_seed(0)
        print(case.__name__, case(), flush=True)


if __name__ == "__main__":
    main()
