"""What an optimizer tells each of its tensors to do, and why: ``NFNOpt.report()``."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from learned_opt.batches import FlatBatch, TensorBatch
from learned_opt.buffers import Buffers
from learned_opt.rules.auto_lr import Number
from learned_opt.rules.base import State, UpdateRule
from learned_opt.rules.learned import CONTROLS, FEATURES, Learned
from learned_opt.rules.slots import numel_of

STRONGEST = 2  # reasons in a row of the table


class TensorReport(NamedTuple):
    """Of one tensor, with its bias if it steps with one.

    Attributes:
        name: the symmetry's.
        shape: of the tensor.
        kind: "matrix" (polar steps), "thin matrix", "embedding" or "vector".
        step: RMS of an entry of the last step that was kept (of the last five), at ``lr=1``, in the frame.
        size: the step's size relative to that of its kind, less where weights are small; with the gain, if it has one.
        controls: of a learned rule, those that this tensor heeds, by name: factors, 1 where they change nothing.
        reasons: by control, what each feature adds to its logarithm before that is bounded, the strongest first; "rest"
            is the NFN's share, and what has changed since the control was set, up to ten steps ago.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    step: float
    size: float
    controls: dict[str, float]
    reasons: dict[str, dict[str, float]]


class Report(NamedTuple):
    """Of all tensors that have moved; :func:`str` makes a table of it.

    Attributes:
        numbers: of the network: steps done, the rate, the momentum's decay rate, and what was measured.
        tensors: by batch.
    """

    numbers: dict[str, float]
    tensors: list[TensorReport]

    def __str__(self) -> str:
        controls = list(dict.fromkeys(k for t in self.tensors for k in t.controls))
        head = ["tensor", "shape", "kind", "step", "size", *controls, *["reasons"][: len(controls)]]
        rows = [head]
        for t in self.tensors:
            row = [t.name, "x".join(map(str, t.shape)) or "()", t.kind, f"{t.step:.2e}", f"{t.size:.2f}"]
            row += [f"{t.controls[k]:.2f}" if k in t.controls else "" for k in controls]
            rows.append(row + ([_strongest(t.reasons)] if controls else []))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([", ".join(f"{k} {v:.4g}" for k, v in self.numbers.items()), *lines])


def report_of(rule: UpdateRule, buffers: Iterable[Buffers], total_steps: Number | None) -> Report:
    """Of a rule's state in buffers, one for each device.

    Raises:
        RuntimeError: there is none, or the rule does not have the state of whitened polar steps.
    """
    numbers: dict[str, float] = {}
    tensors: list[TensorReport] = []
    for own in buffers:
        state = own.state
        if "size" not in state.get("tensor", {}):
            raise RuntimeError(f"{type(rule).__name__} keeps nothing that could be reported.")
        numbers = numbers or _numbers(state)
        tensors += _tensors(rule, own, total_steps)
    if not tensors:
        raise RuntimeError(
            "Nothing to report: no step was taken since this optimizer was made or loaded, or its parameters are "
            "sharded."
        )
    return Report(numbers, tensors)


def _numbers(state: State) -> dict[str, float]:
    network = state["network"]
    names = {
        "clock": "steps",
        "lr_scale": "rate over the schedule's",
        "beta1": "beta1",
        "slope": "slope",
        "correlation": "correlation of gradients",
    }
    return {name: float(network[k]) for k, name in names.items()}


def _tensors(rule: UpdateRule, buffers: Buffers, total_steps: Number | None) -> Iterable[TensorReport]:
    layout, tensor = buffers.layout, buffers.state["tensor"]
    controls = {k: tensor[f"log_{k}"].exp() for k in CONTROLS if f"log_{k}" in tensor}
    reasons: dict[str, Tensor] = {}
    if isinstance(rule, Learned):
        with torch.no_grad():
            reasons = rule.reasons(layout, buffers.state, total_steps)
    rms = tensor["update_norm"] / numel_of(layout, tensor["update_norm"].dtype).sqrt()
    i = 0
    for b in layout.all:
        heeded = [k for k in controls if k == "gain" or (isinstance(b, TensorBatch) and b.is_matrix)]
        heeded = [k for k in heeded if k != "bias" or (isinstance(b, TensorBatch) and b.biases)]
        for k, name in enumerate(b.names):
            if tensor["step"][i] > 0:
                yield TensorReport(
                    name,
                    b.shapes[k] if isinstance(b, FlatBatch) else b.shape,
                    _kind(b),
                    float(rms[i]),
                    float(tensor["size"][i]),
                    {c: float(controls[c][i]) for c in heeded},
                    {c: _sorted(reasons[c][i]) for c in heeded if c in reasons},
                )
            i += 1


def _kind(b: TensorBatch | FlatBatch) -> str:
    if isinstance(b, FlatBatch):
        return "vector"
    return "embedding" if b.factored else "thin matrix" if b.thin else "matrix"


def _sorted(added: Tensor) -> dict[str, float]:
    found = zip([*FEATURES, "rest"], added.tolist(), strict=True)
    return dict(sorted(found, key=lambda f: -abs(f[1])))


def _strongest(reasons: dict[str, dict[str, float]]) -> str:
    """Of the control that is changed most, the strongest features: factors before they are bounded."""
    if not reasons:
        return ""
    control, why = max(reasons.items(), key=lambda item: abs(sum(item[1].values())))
    found = [f"{f} x{math.exp(x):.2f}" for f, x in list(why.items())[:STRONGEST] if abs(x) > 5e-3]
    return f"{control}: {', '.join(found)}" if found else ""
