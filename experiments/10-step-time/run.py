"""Step time of NFNOpt beside that of torch, on one thread.

    python experiments/10-step-time/run.py [--compile] [--precision highest|high|medium]

The precision is torch's, of products of float32 matrices. Compilation takes minutes per network.

Prints milliseconds per step (median of interleaved repeats, processor time), the ratio to AdamW (foreach), the bytes of
state per parameter, and the torch operations that a step dispatches (one that computes no new roots).
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learned_opt import NFNOpt, infer_symmetry
from tasks.transformer import Transformer


class Operations(TorchDispatchMode):
    """Counts what is dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(optimizer: torch.optim.Optimizer) -> int:
    """Of one step."""
    with Operations() as seen:
        optimizer.step()
    return seen.count


def mlp(width: int, depth: int) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` on 784 inputs."""
    sizes = [784, *[width] * depth, 10]
    layers = [m for i, o in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def optimizers(model: nn.Module, x: Tensor, compiled: bool) -> dict[str, torch.optim.Optimizer]:
    """AdamW, Muon on the matrices alone, and our rules."""
    named, symmetry = list(model.named_parameters()), infer_symmetry(model, x, verify=False)
    matrices = [p for _, p in named if p.ndim == 2]
    found = {
        "AdamW foreach": torch.optim.AdamW([p for _, p in named], foreach=True),
        "AdamW fused": torch.optim.AdamW([p for _, p in named], fused=True),
        "Muon (matrices)": torch.optim.Muon(matrices),
        "NFNOpt adam": NFNOpt(named, symmetry="independent", rule="adam", lr=1e-3),
        "NFNOpt nominal, no frame": NFNOpt(named, symmetry=symmetry, rule="nominal-frameless"),
        "NFNOpt nominal": NFNOpt(named, symmetry=symmetry, rule="nominal"),
        "NFNOpt": NFNOpt(named, symmetry=symmetry),
    }
    return found | ({"NFNOpt compiled": NFNOpt(named, symmetry=symmetry, compile=True)} if compiled else {})


def measure(model: nn.Module, x: Tensor, compiled: bool, repeats: int = 9) -> None:
    """Print one row per optimizer."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    found = optimizers(model, x, compiled)
    times: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats + 2):
        for name, optimizer in found.items():
            start = time.process_time()
            optimizer.step()
            if repeat >= 2:
                times[name].append(time.process_time() - start)
    count = sum(p.numel() for p in model.parameters())
    print(f"\n{type(model).__name__}, {count} weights, {len(list(model.parameters()))} tensors")
    base = statistics.median(times["AdamW foreach"])
    for name, optimizer in found.items():
        size = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values())
        median = statistics.median(times[name])
        called = "" if name.endswith("compiled") else f"{operations(optimizer):6d} operations"
        print(f"  {name:26s} {1e3 * median:9.2f} ms  {median / base:7.1f} x  {size / count:5.1f} B/weight  {called}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="highest", choices=("highest", "high", "medium"))
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure(mlp(32, 2), torch.randn(2, 784), args.compile)
    measure(mlp(512, 3), torch.randn(2, 784), args.compile)
    shape = {"width": 256, "heads": 8, "depth": 4, "hidden": 1024}
    model = Transformer(nn.Embedding(1000, 256), 64, 1000, causal=True, **shape)
    measure(model, torch.arange(128).reshape(2, 64), args.compile)
