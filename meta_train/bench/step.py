"""What a step of an optimizer costs: time, operations, memory; beside torch.optim.AdamW, torch.optim.Muon and SOAP.

Every optimizer trains its own copy of a network, in turns in one process: a busy machine is as slow for each.
"""

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from learned_opt import infer_symmetry
from learned_opt.checkpoint import write_atomically
from meta_train.bench.optimizers import MakeOptimizer, Muon, muon, optimizer_named
from meta_train.bench.timing import PERIOD, Lap, in_turns
from meta_train.errors import UnknownName, UsageError, at_least_one
from tasks.transformer import Transformer

OPPONENTS = ("adamw", "muon", "soap")
WARM_UP = 5  # steps that are not counted: they set up state
PROFILED = 11  # steps of the memory profile
LR = 1e-3
TOTAL_STEPS = 1000

Optimizer = torch.optim.Optimizer
MakeStepper = Callable[[nn.Module], Optimizer]
Loss = Callable[[Tensor, torch.Generator], Tensor]  # of an output; the targets are drawn
Made = tuple[nn.Module, Tensor, Loss]


@dataclass(frozen=True)
class Case:
    """A network and its batch.

    Attributes:
        title: for the table.
        make: the module, the inputs that it is called with, and the loss of what it returns. Targets are noise: a
            network that has learned its batch has subnormal gradients, with which a processor takes ten times as long.
        single: one tensor alone: Muon is of this tensor, and no whole training step is measured.
        large: only on demand; gradients are drawn once, few steps are measured.
        leave_out: optimizers that would take minutes a step.
    """

    title: str
    make: Callable[[], Made]
    single: bool = False
    large: bool = False
    leave_out: tuple[str, ...] = ()


def _mlp(sizes: Sequence[int], batch: int) -> Made:
    layers = [m for i, o in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(batch, sizes[0]), _classes


def _gpt(vocabulary: int, width: int, heads: int, depth: int, shape: tuple[int, int], tied: bool = False) -> Made:
    model = Transformer(
        nn.Embedding(vocabulary, width),
        shape[1],
        vocabulary,
        width=width,
        heads=heads,
        depth=depth,
        hidden=4 * width,
        causal=True,
        fused=False,
    )
    if tied:
        model.head = nn.Linear(width, vocabulary, bias=False)
        model.head.weight = model.embed.weight
    return model, torch.randint(vocabulary, shape), _classes


def _matrix(rows: int, columns: int) -> Made:
    return nn.Linear(columns, rows, bias=False), torch.randn(64, columns), _noise


def _embedding(rows: int, columns: int) -> Made:
    return nn.Embedding(rows, columns), torch.randint(rows, (16, 128)), _noise


def _classes(out: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of logits [..., classes] against random classes."""
    return functional.cross_entropy(
        out.flatten(0, -2), torch.randint(out.shape[-1], out.shape[:-1], generator=generator).flatten()
    )


def _noise(out: Tensor, generator: torch.Generator) -> Tensor:
    """Mean square distance from normal noise."""
    return (out - torch.randn(out.shape, generator=generator)).square().mean()


CASES: dict[str, Case] = {
    "mlp-small": Case("MLP 64-128-128-10, batch 64", lambda: _mlp((64, 128, 128, 10), 64)),
    "mlp": Case("MLP 784-544-544-544-10, batch 128", lambda: _mlp((784, 544, 544, 544, 10), 128)),
    "gpt": Case("GPT, 4 blocks of 256, 16 x 128 tokens", lambda: _gpt(256, 256, 8, 4, (16, 128))),
    "matrix-1024": Case("Linear 1024 x 1024", lambda: _matrix(1024, 1024), single=True),
    "matrix-4096": Case("Linear 4096 x 1024", lambda: _matrix(4096, 1024), single=True),
    "embedding": Case("Embedding 50000 x 256", lambda: _embedding(50_000, 256), single=True),
    "gpt-2": Case(
        "GPT-2, 12 blocks of 768, tied, random gradients",
        lambda: _gpt(50_257, 768, 12, 12, (2, 1024), tied=True),
        large=True,
    ),
    "matrix-8192": Case(
        "Linear 8192 x 8192, random gradients",
        lambda: _matrix(8192, 8192),
        single=True,
        large=True,
        leave_out=("soap",),
    ),
}


@dataclass(frozen=True)
class StepCost:
    """What a step of one optimizer costs on one network.

    Attributes:
        step: CPU seconds of the optimizer alone, mean over the steps.
        spread: its standard error over the turns.
        gradient: CPU seconds of the forward and backward pass; 0 where gradients are drawn once.
        operations: torch operations called, mean over the steps.
        held: bytes beside weights and gradients between steps, over the number of weights.
        peak: the most of such bytes during a step, the first ones included, over the number of weights.
    """

    step: float
    spread: float
    gradient: float
    operations: float
    held: float
    peak: float


# ---------------------------------------------------------------------------------------- measuring


class Operations(TorchDispatchMode):
    """Counts the operations that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += function.namespace != "profiler"  # torch marks every step for its profiler
        return function(*args, **(kwargs or {}))


def operations_per_step(optimizer: Optimizer, steps: int) -> float:
    """Mean over steps, along the gradients that are there."""
    with Operations() as seen:
        for _ in range(steps):
            optimizer.step()
    return seen.count / steps


def memory(make: Callable[[], Optimizer], steps: int = PROFILED) -> tuple[int, int]:
    """Bytes that an optimizer holds after some steps along the gradients that are there, and the most that it held.

    Exact: every allocation of torch's CPU allocator is seen, from the making of the optimizer on, weights and
    gradients not among them. What libraries allocate by themselves is not seen.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells standard error of GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        optimizer = make()
        for _ in range(steps):
            optimizer.step()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None, "the profiler has ended"
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    del optimizer  # it lived until here, so that what it holds was not freed
    return held, peak


class Training:
    """Steps of one optimizer on its own copy of a network; each call makes one."""

    def __init__(self, case: Case, model: nn.Module, x: Tensor, loss: Loss, make: MakeStepper) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.model, self.x, self.loss, self.drawn = copy.deepcopy(model), x, loss, case.large
        draw_gradients(self.model)
        self.optimizer = make(self.model)

    def __call__(self) -> Lap:
        start = time.process_time()
        if not self.drawn:
            self.optimizer.zero_grad()
            self.loss(self.model(self.x), self.generator).backward()
        middle = time.process_time()
        self.optimizer.step()
        return {"gradient": middle - start, "step": time.process_time() - middle}


def draw_gradients(model: nn.Module) -> None:
    """The same normal gradients each time."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def makers(case: Case, model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, MakeStepper]:
    """How to make each optimizer for a case; symmetry is inferred here, before anything is measured."""
    found: dict[str, MakeStepper] = {}
    for name in names:
        if name in case.leave_out:
            continue
        entry, theta = optimizer_named(name)
        known = {"symmetry": infer_symmetry(model, x[:2], verify=False)} if theta else {}
        lr = None if theta else LR
        if name == "adamw":
            found[name] = lambda m: torch.optim.AdamW(m.parameters(), LR, foreach=True)
        elif name == "muon":
            found[name] = _muon_alone if case.single else lambda m: muon(m, LR, TOTAL_STEPS)[0]
        else:
            found[name] = partial(_from_table, entry.factory, lr, known)
    return found


def _from_table(factory: MakeOptimizer, lr: float | None, known: Mapping[str, Any], model: nn.Module) -> Optimizer:
    return factory(model, lr, TOTAL_STEPS, **known)[0]


def _muon_alone(model: nn.Module) -> Optimizer:
    return Muon(model.parameters(), LR, nesterov=True, adjust_lr_fn="match_rms_adamw")


def measure(
    case: Case, names: Sequence[str], steps: int, say: Callable[[str], None]
) -> tuple[int, dict[str, StepCost]]:
    """The number of weights of a case's network, and what a step of each optimizer costs."""
    torch.manual_seed(0)
    model, x, loss = case.make()
    weights = sum(p.numel() for p in model.parameters())
    make = makers(case, model, x, names)
    running = {}
    for name, maker in make.items():
        say(f"making {name}")
        running[name] = Training(case, model, x, loss, maker)
    say("steps in turns")
    turn = 1 if case.large else 5
    laps = in_turns(running, WARM_UP if not case.large else 1, steps, turn)
    found = {}
    for name in make:
        say(f"operations of {name}")
        calls = operations_per_step(running.pop(name).optimizer, min(steps, PERIOD))
        say(f"memory of {name}")
        own = copy.deepcopy(model)
        draw_gradients(own)
        held, peak = memory(partial(make[name], own))
        found[name] = _cost(laps[name][1], turn, calls, held / weights, peak / weights)
    return weights, found


def _cost(laps: Sequence[Lap], turn: int, calls: float, held: float, peak: float) -> StepCost:
    own = [lap["step"] for lap in laps]
    turns = [statistics.fmean(own[k : k + turn]) for k in range(0, len(own), turn)]
    spread = statistics.stdev(turns) / len(turns) ** 0.5 if len(turns) > 1 else 0.0
    gradient = statistics.fmean(lap["gradient"] for lap in laps)
    return StepCost(statistics.fmean(own), spread, gradient, calls, held, peak)


# ------------------------------------------------------------------------------------------ the command


def bench_step(
    only: Sequence[str] = (),
    optimizers: Sequence[str] = (*OPPONENTS, "nfnopt"),
    steps: int = PERIOD,
    large: bool = False,
    out: Path | None = None,
) -> dict[str, dict[str, StepCost]]:
    """Measure, and print a table a case as soon as it is finished.

    Args:
        only: names in ``CASES``; all if not given, without the large ones unless ``large``.
        optimizers: names as in an evaluation.
        steps: how many are timed; of large cases a fifth. A multiple of 50, so that rules that do part of their work
            now and then have done all of it as often. Operations are counted over at most 50 more.
        large: also the large cases.
        out: a JSON file of all that was measured.

    Returns:
        By case and optimizer.

    Raises:
        UnknownName: a case or an optimizer that is not there.
        UsageError: ``steps`` is no positive multiple of 50.
    """
    from rich.console import Console

    at_least_one(steps=steps)
    if steps % PERIOD:
        raise UsageError(f"steps must be a multiple of {PERIOD}, not {steps}.")
    unknown = [name for name in only if name not in CASES]
    if unknown:
        raise UnknownName(f"unknown case {', '.join(unknown)}. Valid: {', '.join(CASES)}.")
    for name in optimizers:
        optimizer_named(name)
    chosen = [n for n, case in CASES.items() if (n in only if only else large or not case.large)]
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, StepCost]] = {}
    sizes: dict[str, int] = {}
    try:
        for name in chosen:
            case = CASES[name]
            with console.status(case.title) as status:

                def say(text: str, status: Any = status, case: Case = case) -> None:
                    status.update(f"{case.title}: {text}")

                sizes[name], found[name] = measure(case, optimizers, steps // 5 if case.large else steps, say)
            console.print(table(case, sizes[name], found[name]))
            if out is not None:
                write_atomically(out, _json(sizes, found).encode())
    finally:
        torch.set_num_threads(threads)
    console.print(LEGEND)
    return found


LEGEND = (
    "step: CPU milliseconds of the optimizer alone, one thread, mean ± standard error; then relative to "
    "torch.optim.AdamW (foreach), torch.optim.Muon (AdamW on what is not a hidden matrix; products in float32 where "
    "the processor has none in bfloat16) and SOAP. whole: forward pass, backward pass and step, relative to AdamW's. "
    "calls: torch operations a step. held, peak: bytes a weight, beside weights and gradients, between steps and at "
    "most."
)


def table(case: Case, weights: int, costs: Mapping[str, StepCost]) -> Any:
    """A rich table of one case, at most 100 columns wide."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    found = Table(title=f"{case.title} ({weights:,} weights)", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    found.add_column("optimizer", overflow="fold")
    columns = ("step, ms", *(f"/ {n}" for n in OPPONENTS), "whole / adamw", "calls", "held", "peak")
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    for name, cost in costs.items():
        ratios = [f"{cost.step / costs[n].step:.2f}" if n in costs else "-" for n in OPPONENTS]
        found.add_row(
            name,
            f"{1e3 * cost.step:.3g} ± {1e3 * cost.spread:.1g}",
            *ratios,
            whole_step(case, cost, costs.get("adamw")),
            f"{cost.operations:.0f}",
            f"{cost.held:.1f}",
            f"{cost.peak:.1f}",
        )
    return found


def whole_step(case: Case, cost: StepCost, adamw: StepCost | None) -> str:
    """Gradient and step over AdamW's; of networks whose gradients are computed."""
    if adamw is None or case.single or case.large:
        return "-"
    return f"{(cost.gradient + cost.step) / (adamw.gradient + adamw.step):.2f}"


def _json(sizes: Mapping[str, int], found: Mapping[str, Mapping[str, StepCost]]) -> str:
    cases = {
        name: {"weights": sizes[name], "optimizers": {n: asdict(cost) for n, cost in costs.items()}}
        for name, costs in found.items()
    }
    return json.dumps({"torch": torch.__version__, "threads": 1, "cases": cases}, indent=1) + "\n"
