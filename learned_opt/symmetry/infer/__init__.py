"""The symmetry of any model, inferred from its exported graph and verified numerically.

``infer_symmetry(model, *inputs)`` exports the model (``graph.export``), propagates labels and exponents through the
graph (``graph.Propagation``, with one rule per operator in ``operators``, composed of the primitives of ``engine``
on the axes of ``trees``), solves for the scales (``solve``) and checks the result at random weights (``verify``).
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from learned_opt.symmetry.group import Symmetry
from learned_opt.symmetry.infer.engine import UnknownOperator
from learned_opt.symmetry.infer.graph import InferenceError, Network, Propagation, export
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.solve import symmetry_of
from learned_opt.symmetry.infer.verify import TOLERANCE, Check
from learned_opt.symmetry.lock import EXPORT_LOCK
from learned_opt.text import listed

__all__ = ["InferenceError", "UnknownOperator", "infer_symmetry", "missed_labels", "register_rule"]

logger = logging.getLogger(__name__)
# beyond these, "auto" leaves out the check: it needs four float64 copies of the weights, and three forward passes in
# float64 on the CPU (a large training batch, seen by NFNOpt, would take minutes)
AUTO_WEIGHTS, AUTO_OPERATIONS = 100_000_000, 5e10
_CLASH = "An input of the model that is called so goes into keywords={{'{}': ...}}."
LARGE = 20_000_000  # weights; beyond, one group element is tried and not two


def infer_symmetry(
    model: nn.Module,
    /,
    *inputs: Any,
    verify: bool | Literal["auto"] = "auto",
    outputs: Callable[[Any], Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Symmetry:
    """How the axes of a model's tensors move together: which permutations, scales and signs leave its function alone.

    The model is exported in its present mode (training or evaluation) and stays as it is. Operators that are not
    known fix what they touch, and ``notes`` names them. What the example inputs do not exercise is fixed; parameters
    that they do not use at all are noted, and warned of if they require gradients.

    Args:
        model: any module that ``torch.export`` can trace.
        inputs: example inputs, as for ``model(*inputs, **kwargs)``. A batch of at least 2 (an axis of size 1 says
            nothing of what it is), token ids with repeats.
        verify: compute the function in float64 at random weights before and after random group elements; a label or
            scale that changes it is fixed, with a warning. "auto": up to 100 million weights, and up to 5e10
            multiplications with weights in a forward pass.
        outputs: picks from what the model returns the tensors that must not change; default: all, except a
            language model's cache (``past_key_values``).
        keywords: example keyword inputs, for a model that calls one of them as an argument of this function.
        kwargs: the other example keyword inputs.

    Returns:
        Specs for every parameter (under its first name) and for the running statistics of batch norms.

    Raises:
        InferenceError: the model cannot be exported, or does not run with these inputs.
        ValueError: ``verify`` or ``outputs`` is something else.
    """
    if not isinstance(verify, bool) and (not isinstance(verify, str) or verify != "auto"):
        raise ValueError(f"verify={verify!r:.200} is unknown; it is True, False or 'auto'. {_CLASH.format('verify')}")
    with EXPORT_LOCK:
        return _inferred(getattr(model, "_orig_mod", model), inputs, {**(keywords or {}), **kwargs}, verify, outputs)


def _inferred(model: nn.Module, inputs: Any, kwargs: Any, verify: bool | str, outputs: Any) -> Symmetry:
    network, propagation = _propagated(model, inputs, kwargs, outputs)
    symmetry = _with_unread(model, propagation.read, symmetry_of(network, _shapes(model), propagation))
    weights = sum(t.numel() for t in network.tensors.values())
    meta = any(t.device.type == "meta" for t in network.tensors.values())
    cheap = weights <= AUTO_WEIGHTS and network.operations() <= AUTO_OPERATIONS and not meta
    if verify is True or (verify == "auto" and cheap):
        symmetry = _verified(network, symmetry, type(model).__name__, 1 if weights > LARGE else 2)
    elif verify == "auto":
        logger.info(
            "the symmetry of %s is not verified numerically: too large (verify=True does it)", type(model).__name__
        )
    return symmetry


def missed_labels(
    model: nn.Module,
    /,
    *inputs: Any,
    outputs: Callable[[Any], Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> list[str]:
    """The converse check: fixed axes of which two units can be exchanged without changing the function.

    Args and errors: as :func:`infer_symmetry`.

    Returns:
        Labels of a symmetry that labels every axis; rows of tables that the inputs do not use are among them. Units on
        the two sides of an unknown operator have two labels there, and are not found.
    """
    with EXPORT_LOCK:
        network, propagation = _propagated(model, inputs, {**(keywords or {}), **kwargs}, outputs)
        symmetry = symmetry_of(network, _shapes(model), propagation, declare_fixed=True)
        return Check(network).missed(symmetry)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def _with_unread(model: nn.Module, read: Set[str], symmetry: Symmetry) -> Symmetry:
    """The symmetry with a note on parameters that this forward pass does not read: it need not be one of another.

    A warning too where one of them is trained: then some pass is likely to read it, perhaps along with labels that it
    leaves open here (a second head on one trunk). What is frozen and not read (a pooler) is mostly never read.
    """
    unread = {n: p for n, p in model.named_parameters() if n not in read}
    if not unread:
        return symmetry
    note = f"{listed(unread)}: not read by this forward pass, so that their axes stay in place"
    if any(p.requires_grad for p in unread.values()):
        logger.warning(
            "symmetry of %s: %s. If another pass reads them together with the other parameters, what is claimed of"
            " those need not hold: give NFNOpt symmetry=infer_symmetry(...) of a pass that reads all of them,"
            ' or symmetry="independent".',
            type(model).__name__,
            note,
        )
    return replace(symmetry, notes=(*symmetry.notes, note))


def _propagated(model: nn.Module, inputs: Any, kwargs: Any, outputs: Any) -> tuple[Network, Propagation]:
    if outputs is not None and not callable(outputs):
        raise ValueError(
            f"outputs={outputs!r:.200} is not a function of what the model returns. {_CLASH.format('outputs')}"
        )
    with torch.random.fork_rng(devices=[]):  # nothing depends on the caller's noise, and none of it is used up
        torch.default_generator.manual_seed(0)
        program = export(model, inputs, kwargs, outputs)
        try:
            return _better(model, program)
        except InferenceError:
            raise
        except Exception as error:
            raise InferenceError(
                f"the symmetry of {type(model).__name__} cannot be inferred: {type(error).__name__}: {error}\n"
                "Please report the model. Until then, write its symmetry by hand (docs/symmetry.md), or use"
                " learned_opt.independent(dict(model.named_parameters()))."
            ) from error


def _better(model: nn.Module, program: ExportedProgram) -> tuple[Network, Propagation]:
    """Labels of the program as it was written, or in decomposed form if more of its operators are known there."""
    network = Network(model, program)
    propagation = Propagation(network)
    if propagation.unknown:
        try:
            decomposed = Network(model, program.run_decompositions())
            second = Propagation(decomposed)
        except Exception as error:  # some programs cannot be decomposed: the first result stands
            logger.debug("no decomposition of %s: %s", type(model).__name__, error)
        else:
            if sum(second.unknown.values()) < sum(propagation.unknown.values()):
                return decomposed, second
    return network, propagation


def _verified(network: Network, symmetry: Symmetry, name: str, samples: int) -> Symmetry:
    try:
        check = Check(network)
        possible = check.possible
        verdict = check.verdict(symmetry, samples) if possible else None
    except Exception as error:  # an operator without float64, say
        reason, verdict = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", None
    else:
        reason = "its outputs are not finite, or zero"
    if verdict is None:
        logger.warning("the symmetry of %s could not be verified (%s)", name, reason)
        return replace(symmetry, notes=(*symmetry.notes, f"not verified: {reason}"))
    if verdict.demoted:
        warnings.warn(
            f"inferred symmetry of {name}: {', '.join(verdict.demoted)} changed the function in the numeric check and"
            " now stay in place. Please report the model: a rule of learned_opt.symmetry.infer is wrong.",
            stacklevel=3,
        )
    if verdict.error > TOLERANCE:
        raise InferenceError(f"{name}: the function changes by {verdict.error:.1e} even without any symmetry.")
    return verdict.symmetry
