"""Parameters, time and memory of the models of the weight-space experiments, beside those of the official code.

Per model: trainable parameters; processor time of a forward and a backward pass (one thread, single precision, median
of interleaved repeats); bytes that autograd keeps for the backward pass beyond inputs and parameters.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from learned_opt import infer_symmetry
from learned_opt.checkpoint import write_atomically
from learned_opt.nfn import Chain, EquivariantNFN, InvariantNFN, TransformerFeatures, TransformerNFN, inr_classifier
from learned_opt.nfn.transformer_space import TransformerSpec, zoo_spec
from meta_train.bench.output import show
from meta_train.bench.output import table as markdown_table
from meta_train.errors import UsageError
from meta_train.weights.runs import Grid, Job, Measures, Run, cells, draw, run_grid
from tasks.zoo import cnn, inr, transformer

BATCH, WARM_UP, LEAST_SECONDS = 32, 2, 2.0
MNIST = torch.zeros(2, 1, 28, 28)


# ------------------------------------------------------------------------------------ measuring
def kept_bytes(run: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps while ``run`` computes its result, without those of ``known``."""
    ours = {x.untyped_storage().data_ptr() for x in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    assert result.requires_grad  # the graph holds what is counted
    return sum(s.nbytes() for s in kept.values())


def timed(step: Callable[[], None]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def loss(outputs: Any) -> Tensor:
    """Sum of mean squares of a tensor, or of all tensors of features."""
    tensors = [outputs] if isinstance(outputs, Tensor) else [*outputs.values()]
    return torch.stack([x.square().mean() for x in tensors]).sum()


def measure(model: nn.Module, inputs: Any, tensors: Sequence[Tensor], seconds: float) -> Measures:
    """Parameters, time and kept memory of a model on inputs, whose tensors are ``tensors``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = kept_bytes(lambda: loss(model(inputs)), [*tensors, *model.parameters(), *model.buffers()])

    def step() -> None:
        loss(model(inputs)).backward()
        model.zero_grad(set_to_none=True)

    for _ in range(WARM_UP):
        step()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed(step))
    return {
        "parameters": float(sum(p.numel() for p in parameters)),
        "ms": 1e3 * statistics.median(times),
        "kept_mb": kept / 1e6,
    }


# ------------------------------------------------------------------------------------ models
@dataclass(frozen=True)
class Model:
    """How to make one, and the official model's figures: parameters, milliseconds, kept megabytes (None: unknown)."""

    make: Callable[[], tuple[nn.Module, Chain | TransformerSpec]]
    official: tuple[int | None, float | None, float | None] = (None, None, None)


@cache
def chain_of(network: str) -> Chain:
    """The chain of a zoo's networks, inferred."""
    if network == "sine":
        return Chain.from_symmetry(infer_symmetry(inr.build(), torch.zeros(3, 2)))
    return Chain.from_symmetry(infer_symmetry(cnn.build(network), MNIST))


@cache
def spec_of(patches: bool) -> TransformerSpec:
    """The spec of a transformer zoo's networks: MNIST, or AG News without an embedding of their own."""
    return zoo_spec(transformer.Network(10 if patches else 4, patches).state_dict())


def _accuracy(kind: Any, network: str = "relu", **options: Any) -> Callable[[], tuple[nn.Module, Chain]]:
    return lambda: (InvariantNFN(chain_of(network), 1, kind, **options), chain_of(network))


def _class(kind: Any) -> Callable[[], tuple[nn.Module, Chain]]:
    return lambda: (inr_classifier(chain_of("sine"), kind), chain_of("sine"))


def _edit(kind: Any) -> Callable[[], tuple[nn.Module, Chain]]:
    return lambda: (EquivariantNFN(chain_of("sine"), kind), chain_of("sine"))


def _transformer(patches: bool, **options: Any) -> Callable[[], tuple[nn.Module, TransformerSpec]]:
    return lambda: (TransformerNFN(spec_of(patches), **options), spec_of(patches))


# task -> model -> how to make it; the sizes are the official ones unless the name says otherwise
MODELS: dict[str, dict[str, Model]] = {
    "cnn": {
        "StatNN": Model(_accuracy("stat"), (1_059_001, 13.9, 0.25)),
        "NP": Model(_accuracy("np"), (2_031_390, 151, 30.5)),
        "HNP": Model(_accuracy("hnp"), (2_811_743, 157, 31.0)),
        "Monomial-ReLU": Model(_accuracy("monomial"), (254_619, 69, 26.1)),
        "Monomial-tanh": Model(_accuracy("monomial", "tanh"), (254_619, 69, 29.1)),
        "MAGEP": Model(_accuracy("magep"), (998_121, 137, 64.9)),
        "graph": Model(_accuracy("graph"), (101_441, 500, 236)),
        "MLP": Model(_accuracy("mlp")),
    },
    "inr-classification": {
        "NP": Model(_class("np"), (15_118_634, None, None)),
        "HNP": Model(_class("hnp"), (22_083_114, None, None)),
        "Monomial": Model(_class("monomial"), (22_146_603, None, None)),
        "MAGEP": Model(_class("magep"), (4_074_538, None, None)),
        "MLP": Model(_class("mlp"), (2_197_010, None, None)),
    },
    "inr-editing": {
        "NP": Model(_edit("np"), (4_181_272, None, None)),
        "HNP": Model(_edit("hnp"), (6_440_853, None, None)),
        "Monomial": Model(_edit("monomial"), (4_181_769, None, None)),
        "MAGEP": Model(_edit("magep"), (4_201_288, None, None)),
        "MLP": Model(_edit("mlp"), (4_374_191, None, None)),
        "Monomial-alone": Model(_edit("exact")),
    },
    "transformer": {
        "Transformer-NFN-MNIST": Model(_transformer(True), (1_812_181, None, None)),
        "Transformer-NFN-AG-News": Model(_transformer(False), (1_804_741, None, None)),
        "Transformer-NFN-4-channels": Model(_transformer(True, channels=(4,))),
    },
}


def random_inputs(space: Chain | TransformerSpec, batch: int = BATCH) -> tuple[Any, list[Tensor]]:
    """Features of random networks, and their tensors."""
    if isinstance(space, Chain):
        features = {n: torch.randn(batch, 1, *shape) for n, shape in space.shapes.items()}
        return features, [*features.values()]
    state = transformer.Network(10 if space.embedding else 4, bool(space.embedding)).state_dict()
    packed: TransformerFeatures = space.pack({n: 0.3 * torch.randn(batch, 1, *x.shape) for n, x in state.items()})
    return packed, [*packed.blocks.values(), *packed.rest.values()]


def run_job(job: Job) -> Measures:
    """Measure one model."""
    torch.manual_seed(job.seed)
    model, space = MODELS[job.dataset][job.method].make()
    inputs, tensors = random_inputs(space)
    return measure(model, inputs, tensors, LEAST_SECONDS)


# ------------------------------------------------------------------------------------ results
NOTE = """One thread, batch 32, single precision; processor time of a forward and a backward pass (median of each round,
mean ± standard error of the rounds); "kept" is what autograd holds for the backward pass, beyond inputs and parameters.
In brackets: the official code, its parameters as counted and, for the CNN zoo, its time and kept memory as measured on
another, shared machine, so that only the ratios of times compare. The official graph model is another one (NG-GNN)."""


def table(runs: Sequence[Run]) -> str:
    """Markdown, one row per model."""
    found = {m: cells(runs, m) for m in ("parameters", "ms", "kept_mb")}
    rows = []
    for method, task in found["ms"]:
        official = MODELS[task][method].official
        ours = [
            f"{found['parameters'][method, task].mean:,.0f}",
            found["ms"][method, task].text(1),
            f"{found['kept_mb'][method, task].mean:.2f}",
        ]
        theirs = [f" ({x:,})" if x is not None else "" for x in official]
        rows.append([f"{task}: {method}", *(a + b for a, b in zip(ours, theirs, strict=True))])
    return markdown_table(["", "parameters", "time, ms", "kept, MB"], rows)


def write(out: Path, runs: Sequence[Run]) -> str:
    """table.md, table.json and the picture."""
    text = f"# Efficiency of models on weight spaces\n\n{NOTE}\n\n{table(runs)}\n"
    rows: list[Mapping[str, Any]] = [
        {"model": m, "task": t, "measure": name, **asdict(cell), "official": MODELS[t][m].official[i]}
        for i, name in enumerate(("parameters", "ms", "kept_mb"))
        for (m, t), cell in cells(runs, name).items()
    ]
    write_atomically(out / "table.md", text.encode())
    write_atomically(out / "table.json", json.dumps({"batch": BATCH, "cells": rows}, indent=1).encode())
    chosen = [run for run in runs if run.job.dataset == "cnn"]
    if chosen:
        found = cells(chosen, "ms")
        official = {(m, t): x for m, t in found if (x := MODELS[t][m].official[1]) is not None}
        draw(out / "efficiency.png", found, official, label="forward and backward, ms")
    return text


def efficiency(grid: Annotated[Grid, tyro.conf.arg(name="")]) -> None:
    """Measure parameters, time and memory of the models of all weight-space experiments.

    Args:
        grid: where to write, how many rounds (seeds), which models (methods) of which tasks (datasets).

    Raises:
        UsageError: the device is not the processor, whose time it is.
    """
    if grid.device != "cpu":
        raise UsageError(f"--device {grid.device}: what is measured is time of the processor. Leave it out.")
    names = list(dict.fromkeys(m for models in MODELS.values() for m in models))
    methods, tasks = grid.choose(names, list(MODELS))
    jobs = [Job(m, t, s) for s in range(grid.seeds) for t in tasks for m in MODELS[t] if m in methods]
    runs = run_grid(jobs, run_job, grid.out / "runs.jsonl", workers=1)  # others would share the processor
    show(write(grid.out, runs))
