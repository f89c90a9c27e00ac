"""Networks that are trained in several threads at once, each with its optimizer."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import nn

from learned_opt import NFNOpt, infer_symmetry

THREADS = 6


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def in_threads(work):
    together = Barrier(THREADS)

    def start(i):
        together.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start, range(THREADS)))


def train(i):
    model, generator = network(), torch.Generator().manual_seed(i)
    optimizer = NFNOpt(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return optimizer.symmetry


def test_every_thread_finds_the_symmetry_of_its_network(caplog):
    expected = infer_symmetry(network(), torch.randn(16, 8)).to_dict()
    assert [s.to_dict() for s in in_threads(train)] == [expected] * THREADS
    assert [s.to_dict() for s in in_threads(lambda i: infer_symmetry(network(), torch.randn(16, 8)))] == (
        [expected] * THREADS
    )
    assert not torch.compiler.is_compiling()
    assert not [r for r in caplog.records if r.name.startswith("learned_opt") and r.levelname == "WARNING"]
