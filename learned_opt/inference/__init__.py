"""The symmetry of any model, inferred from its exported graph."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from learned_opt.inference.graph import InferenceError, Network, Propagation, export
from learned_opt.inference.operators.registry import register_rule
from learned_opt.inference.solve import symmetry_of
from learned_opt.symmetry import Symmetry

__all__ = ["InferenceError", "infer_symmetry", "register_rule"]


def infer_symmetry(
    model: nn.Module,
    *inputs: Any,
    verify: bool | Literal["auto"] = "auto",
    outputs: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Symmetry:
    program = export(model, inputs, kwargs, outputs)
    network = Network(model, program)
    t = Propagation(network)
    return symmetry_of(network, {n: tuple(p.shape) for n, p in model.named_parameters()}, t)
