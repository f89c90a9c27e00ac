"""The symmetry of any model, inferred from its exported graph and verified numerically.

``infer_symmetry(model, *inputs)`` exports the model (``network.export``), propagates labels and exponents through the
graph (``graph.Propagation``, with one rule per operator in ``operators``, composed of the primitives of ``engine``
on the axes of ``trees``), solves for the scales (``solve``) and checks the result at random weights (``verify``).
``infer_called(calls)`` does that for a module as it was called in training, and compares the graph with what ran
(``replay``).
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from learned_opt.calls import Call, unwrapped
from learned_opt.symmetry.group import Symmetry
from learned_opt.symmetry.infer.engine import UnknownOperator
from learned_opt.symmetry.infer.graph import Propagation
from learned_opt.symmetry.infer.network import InferenceError, Network, export, has_data
from learned_opt.symmetry.infer.operators.registry import register_rule
from learned_opt.symmetry.infer.orbits import broken_scales
from learned_opt.symmetry.infer.quiet import same_random_numbers, silent
from learned_opt.symmetry.infer.replay import Penalised, compare
from learned_opt.symmetry.infer.solve import symmetry_of
from learned_opt.symmetry.infer.verify import TOLERANCE, Check, unscaled
from learned_opt.text import listed

__all__ = ["InferenceError", "UnknownOperator", "infer_called", "infer_symmetry", "missed_labels", "register_rule"]

logger = logging.getLogger(__name__)
# beyond these, "auto" leaves out the check: it needs four float64 copies of the weights, and three forward passes in
# float64 on the CPU (a large training batch, seen by NFNOpt, would take minutes)
AUTO_WEIGHTS, AUTO_OPERATIONS = 100_000_000, 2e10
LONG_CHECK = 5e9  # operations of a pass beyond which it is told that the check takes long
ELSEWHERE_WEIGHTS = 1_000_000  # the same of a model in shards, of which no rank is to hold all weights
_CLASH = "An input of the model that is called so goes into keywords={{'{}': ...}}."
MANY = 1500  # operations of a graph beyond which it is told that it takes long
LARGE = 20_000_000  # weights; beyond, one group element is tried and not two
KINDS = 4  # of calls of one module


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
            scale that changes it is fixed, with a warning. "auto": up to 100 million weights, and up to 2e10
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
    model = unwrapped(model)
    _check_outputs(outputs)
    with same_random_numbers(model):
        program = export(model, inputs, {**(keywords or {}), **kwargs}, outputs)
        return _inferred(model, [Network(model, program)], verify)


def infer_called(calls: Sequence[Call]) -> Symmetry:
    """The symmetry of a module as it was called in training: one of all its calls.

    Args:
        calls: of one module. Each kind of them is exported, with the methods and in the modes of the call.

    Raises:
        InferenceError: as :func:`infer_symmetry`; or what is exported does not return what the calls returned, or
            they are not the only use of the parameters, or a part may have others; or the module was called in too
            many ways.
    """
    model = calls[0].module
    if any(c.tossed for c in calls):
        raise InferenceError(
            f"the forward pass of {type(model).__name__} draws from the random numbers of Python or NumPy, so that it"
            " may take other branches next time"
        )
    kinds: dict[Any, list[Call]] = {}
    for shapes in (True, False):
        kinds = {}
        for call in calls:
            kinds.setdefault(call.kind(shapes=shapes), []).append(call)
        if len(kinds) <= KINDS:
            break
    else:
        raise InferenceError(f"{type(model).__name__} was called in {len(kinds)} ways before the first step")
    networks = []
    with same_random_numbers(model):
        for first, *_ in kinds.values():
            with first.as_it_ran():
                networks.append(Network(model, export(model, first.args, first.kwargs)))
        alike = [[c for c in cs if c.kind() == cs[0].kind()] for cs in kinds.values()]
        if sum(map(len, alike)) < len(calls):  # of other shapes: they cannot be run through the graph
            for call in calls:
                call.complete = False
        symmetry = _inferred(model, networks, "auto")
        try:
            notes, compared = compare(list(zip(networks, alike, strict=True)))
        except Penalised as penalty:
            logger.warning("symmetry of %s: %s. They are not used.", type(model).__name__, penalty)
            return replace(unscaled(symmetry), notes=(*symmetry.notes, str(penalty)))
    if not compared and any(c.part for c in calls):
        raise InferenceError(
            f"{type(model).__name__} is a part of what is trained, and whether it has other uses could not be told from"
            " its gradients (it is compiled, large, in several processes, or was called often before the step)"
        )
    symmetry = replace(symmetry, notes=(*symmetry.notes, *notes))
    return symmetry if compared else _without_broken(model, symmetry, any(c.autocast or c.compiled for c in calls))


def _without_broken(model: nn.Module, symmetry: Symmetry, coarse: bool) -> Symmetry:
    """Without positive scales, if the gradients of the training show that some do not hold."""
    weights = dict(model.named_parameters())
    grads = {n: p.grad for n, p in weights.items() if p.grad is not None and not p._backward_hooks}
    grads = {n: g for n, g in grads.items() if g.layout == torch.strided}
    broken = broken_scales(symmetry, weights, grads, coarse)
    if not broken:
        return symmetry
    reason = (
        f"the loss is not constant along the scales {listed(broken)}: the parameters of {type(model).__name__} are used"
        " in another way too, or their gradients were changed"
    )
    logger.warning("symmetry of %s: %s. Positive scales are not used.", type(model).__name__, reason)
    return replace(unscaled(symmetry), notes=(*symmetry.notes, reason))


def _inferred(model: nn.Module, networks: Sequence[Network], verify: bool | Literal["auto"]) -> Symmetry:
    nodes = sum(len(n.program.graph.nodes) for n in networks)
    if nodes > MANY:
        name = type(model).__name__
        logger.warning("the symmetry of %s: a graph of %d operations, which takes a while", name, nodes)
    networks, propagation = _propagated(model, networks)
    symmetry = _with_unread(model, propagation.read, symmetry_of(_shapes(model), propagation))
    weights = sum(t.numel() for t in propagation.tensors.values())
    meta = any(t.device.type == "meta" for t in propagation.tensors.values())
    operations = sum(n.operations() for n in networks)
    most = AUTO_WEIGHTS if all(map(has_data, propagation.tensors.values())) else ELSEWHERE_WEIGHTS
    cheap = weights <= most and operations <= AUTO_OPERATIONS and not meta
    if verify is True or (verify == "auto" and cheap):
        if operations > LONG_CHECK:
            logger.info("the symmetry of %s: checking it in float64, which takes seconds, once", type(model).__name__)
        symmetry = _verified(networks, symmetry, type(model).__name__, 1 if weights > LARGE else 2)
    elif verify == "auto":
        logger.info(
            "the symmetry of %s is not verified numerically: too large, or without data (verify=True does it)",
            type(model).__name__,
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
    _check_outputs(outputs)
    with same_random_numbers(model):
        program = export(model, inputs, {**(keywords or {}), **kwargs}, outputs)
        networks, propagation = _propagated(model, [Network(model, program)])
        symmetry = symmetry_of(_shapes(model), propagation, declare_fixed=True)
        return Check(*networks).missed(symmetry)


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


def _check_outputs(outputs: Any) -> None:
    if outputs is not None and not callable(outputs):
        raise ValueError(
            f"outputs={outputs!r:.200} is not a function of what the model returns. {_CLASH.format('outputs')}"
        )


def _propagated(model: nn.Module, networks: Sequence[Network]) -> tuple[Sequence[Network], Propagation]:
    try:
        return _better(model, networks)
    except InferenceError:
        raise
    except Exception as error:
        raise InferenceError(
            f"the symmetry of {type(model).__name__} cannot be inferred: {type(error).__name__}: {error}\n"
            "Please report the model. Until then, write its symmetry by hand (docs/symmetry.md), or use"
            " learned_opt.independent(dict(model.named_parameters()))."
        ) from error


def _better(model: nn.Module, networks: Sequence[Network]) -> tuple[Sequence[Network], Propagation]:
    """Labels of the programs as they were written.

    If they have operators that write into another tensor, in decomposed form, where more are known there: what is
    functional has no such operators.
    """
    propagation = Propagation(*networks)
    if propagation.unknown and propagation.written_out:
        try:
            with silent():
                decomposed = [Network(model, n.program.run_decompositions()) for n in networks]
            second = Propagation(*decomposed)
        except Exception as error:  # some programs cannot be decomposed: the first result stands
            logger.debug("no decomposition of %s: %s", type(model).__name__, error)
        else:
            if sum(second.unknown.values()) < sum(propagation.unknown.values()):
                return decomposed, second
    return networks, propagation


def _verified(networks: Sequence[Network], symmetry: Symmetry, name: str, samples: int) -> Symmetry:
    try:
        check = Check(*networks)
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
