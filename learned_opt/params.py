"""The tensors of an optimizer: their names, their options, and their symmetry (given, inferred or independent)."""

import logging
import math
import numbers
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from learned_opt.names import known_names, plain_name
from learned_opt.recorder import Call
from learned_opt.symmetry import Spec, Symmetry, SymmetryError, independent
from learned_opt.symmetry.axes import Leaf, leaves_of, map_leaves
from learned_opt.symmetry.labels import UNKNOWN, is_statistic
from learned_opt.symmetry.table import one_line
from learned_opt.text import listed
from learned_opt.twins import on_twins

logger = logging.getLogger(__name__)

BESIDE = "own:"  # in front of the labels of tensors that a symmetry lacked
OWN = "#"  # between a name and a position, where the name alone is another tensor's
_MADE = "Make the optimizer after the model has been given its weights (to_empty replaces its parameters)."
SOME, MANY = 60, 400  # tensors of a model whose symmetry takes about two seconds, about ten seconds to infer
WAY_OUT = (
    "To use the symmetry, pass symmetry=learned_opt.infer_symmetry(model, example_input) to NFNOpt; "
    'pass symmetry="independent" to do without it and silence this warning.'
)


Mode = Literal["infer", "independent"]  # in the place of a symmetry: to be inferred, or every axis by itself


class NamedParam(NamedTuple):
    """One optimised tensor: its name, the tensor, its group, and its place among all tensors of all groups."""

    name: str
    param: Tensor
    group: dict[str, Any]
    position: int
    shrink: float = 1.0  # of a gradient so large that its square would overflow
    largest: float | None = None  # of a gradient in shards, a bound of its magnitudes on all ranks; -1: there is none

    @property
    def trained(self) -> bool:
        """Whether this step may move it."""
        has_gradient = self.param.grad is not None if self.largest is None else self.largest >= 0
        return self.param.requires_grad and has_gradient

    @property
    def has_data(self) -> bool:
        """Whether it is anywhere; what is offloaded to the meta device is passed over."""
        return self.param.device.type != "meta"

    @property
    def grad(self) -> Tensor:
        """The gradient of a trained tensor."""
        assert self.param.grad is not None
        return self.param.grad


class ParamMap(NamedTuple):
    """A symmetry and the names under which it knows the tensors, by their position."""

    symmetry: Symmetry
    names: Mapping[int, str]

    def rename(self, params: list[NamedParam]) -> list[NamedParam]:
        """The parameters under the symmetry's names."""
        return [p._replace(name=self.names[p.position]) for p in params]

    def validate(self, params: list[NamedParam]) -> "ParamMap":
        """Itself, unless a tensor is not described with its shape (:class:`SymmetryError`)."""
        self.symmetry.validate({p.name: p.param for p in self.rename(params)})
        return self

    def extend(self, params: list[NamedParam]) -> "ParamMap":
        """The map with what it lacks of ``params`` added, with independent axes."""
        missing = [p for p in params if p.position not in self.names]
        if not missing:
            return self
        missing = [p._replace(name=self._free_name(p)) if p.name in self.symmetry.specs else p for p in missing]
        rest = independent_map(missing)
        logger.info(
            "NFNOpt: %s: not in the symmetry that is known, every axis moves by itself", listed(rest.names.values())
        )
        apart = _prefixed(rest.symmetry, labels=BESIDE)
        return ParamMap(_joined(self.symmetry, apart), {**self.names, **rest.names})

    def _free_name(self, p: NamedParam) -> str:
        """One of no tensor that there is; what a tensor that is gone was called so may be forgotten."""
        used = set(self.names.values())
        names = (f"{p.name}{OWN}{p.position}" + "'" * k for k in range(len(used) + 1))
        return next(n for n in names if n not in used)

    def rebind(self, names: Mapping[Tensor, str], params: list[NamedParam]) -> "ParamMap":
        """The map where groups have changed.

        Args:
            names: the name of every tensor that had one. It keeps that, wherever it is now.
            params: the tensors as they are. One that is new has the name of the one whose place it took, or none.
        """
        kept = {p.position: names[p.param] for p in params if p.param in names}
        free = {k: n for k, n in self.names.items() if n not in kept.values()}
        return ParamMap(self.symmetry, {p.position: free[p.position] for p in params if p.position in free} | kept)

    def without_reshaped(self, params: list[NamedParam]) -> "ParamMap":
        """The map without the tensors that have another shape than it describes, which one log line names."""
        names = {p.position: self.names[p.position] for p in params if p.position in self.names}
        other = [p for p in params if p.position in names and self._shape(names[p.position]) != tuple(p.param.shape)]
        if other:
            logger.log(
                logging.INFO if all(self._is_own(names[p.position]) for p in other) else logging.WARNING,
                "NFNOpt: the shape of %s has changed: every axis of these tensors moves by itself from now on, with "
                "fresh state. To use their symmetry again, make a new optimizer.",
                listed(f"{names[p.position]} (now {tuple(p.param.shape)})" for p in other),
            )
        gone = {p.position for p in other}
        return ParamMap(self.symmetry, {k: n for k, n in names.items() if k not in gone})

    def _is_own(self, name: str) -> bool:
        """Whether a tensor moved by itself already."""
        leaves = [leaf for axis in self.symmetry.specs[name].axes for leaf in leaves_of(axis)]
        return all((leaf.label or BESIDE).startswith(BESIDE) for leaf in leaves)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return self.symmetry.specs[name].shape if name in self.symmetry.specs else None


def named_params(groups: Iterable[dict[str, Any]]) -> list[NamedParam]:
    """Every floating (or complex) tensor of the parameter groups once, with its name: as given, else its position."""
    found: dict[str, NamedParam] = {}
    seen: set[int] = set()
    position = 0
    for group in groups:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            name = names[i] if names is not None and i < len(names) else str(position)
            if name in found:  # two networks in one optimizer
                name = f"{name}{OWN}{position}"
            if id(p) not in seen and (p.is_floating_point() or p.is_complex()):
                found[name] = NamedParam(name, p, group, position)
            position += 1
            seen.add(id(p))
    return list(found.values())


def refuse_unsupported(params: list[NamedParam]) -> None:
    """Raises RuntimeError for a tensor that no step can be taken of; says what to do."""
    for p in params:
        if not p.trained:
            continue
        if not p.has_data:
            raise RuntimeError(f"{p.name} is on the meta device: it has no data that NFNOpt could change. {_MADE}")
        if p.param.is_complex():
            raise RuntimeError(f"NFNOpt does not take complex parameters: {p.name}. Train its torch.view_as_real.")
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"NFNOpt does not take sparse gradients: {p.name}. Use nn.Embedding(sparse=False).")
    waiting = [p.name for p in params if p.param.requires_grad and not p.has_data]
    if waiting and not any(p.trained for p in params):
        raise RuntimeError(f"no parameter has a gradient, and {listed(waiting)} have no data (device meta). {_MADE}")


def independent_map(params: list[NamedParam]) -> ParamMap:
    """Independent axes, under the parameters' own names."""
    symmetry = independent({p.name: p.param for p in params})
    return ParamMap(symmetry, {p.position: p.name for p in params})


# ------------------------------------------------------------------------------------ a given symmetry
def match(params: list[NamedParam], symmetry: Symmetry) -> ParamMap:
    """The parameters under the names of a given symmetry: by name, or in order of position where they have none.

    Raises:
        SymmetryError: some tensor is not described with its shape, or two have one name.
    """
    if any("param_names" in p.group for p in params):
        names = list(known_names((p.name for p in params), symmetry.specs).values())
    else:
        names = _in_order(params, symmetry)
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise SymmetryError(f"several parameters are called {listed(twice)}: rename them.")
    positions = [p.position for p in params]
    return ParamMap(symmetry, dict(zip(positions, names, strict=True))).validate(params)


def add_by_name(known: ParamMap, params: list[NamedParam], symmetry: Symmetry) -> ParamMap:
    """The map with the tensors that it lacks, as :func:`match` finds them, with its errors."""
    new = [p for p in params if p.position not in known.names]
    if not new:
        return known
    names = match(new, symmetry).names
    twice = set(names.values()) & set(known.names.values())
    if twice:
        raise SymmetryError(f"several parameters are called {listed(twice)}: rename them.")
    return ParamMap(known.symmetry, {**known.names, **names})


def check_order(calls: list[Call], params: list[NamedParam], known: ParamMap | str) -> None:
    """Compare the order of tensors that have no names with that of a state dict, now that their module was seen.

    Raises:
        SymmetryError: the same tensors in another order, so that each has another's state.
    """
    if len(calls) != 1 or not isinstance(known, ParamMap) or any("param_names" in p.group for p in params):
        return
    here = {id(p): plain_name(n) for n, p in reversed(list(calls[0].module.named_parameters(remove_duplicate=False)))}
    pairs = [
        (plain_name(known.names[p.position]), here[id(p.param)])
        for p in params
        if p.position in known.names and id(p.param) in here
    ]
    wrong = [f"{a} where {b} is here" for a, b in pairs if a != b]
    if wrong and {a for a, _ in pairs} == {b for _, b in pairs}:
        raise SymmetryError(
            f"the state dict that was loaded has the parameters in another order: {listed(wrong)}. Give them in the "
            "same order, or give model.named_parameters() when saving and when loading."
        )


def rebound(
    params: list[NamedParam], given: Symmetry | Mode, known: ParamMap | Mode, names: Mapping[Tensor, str]
) -> ParamMap | Mode:
    """What is known of an optimizer's symmetry, for the tensors that it has now.

    Args:
        params: these.
        given: what the optimizer was told; a symmetry is matched anew.
        known: of the tensors that it had. One that is new has independent axes.
        names: of all tensors that it ever had.

    Raises:
        SymmetryError: the symmetry does not describe them.
    """
    if isinstance(known, ParamMap):
        known = known.rebind(names, params)
        known = add_by_name(known, params, given) if isinstance(given, Symmetry) else known
        return known.without_reshaped(params).extend(params).validate(params)
    return match(params, given) if isinstance(given, Symmetry) else known


def _in_order(params: list[NamedParam], symmetry: Symmetry) -> list[str]:
    parameters = {n: s.shape for n, s in symmetry.specs.items() if not is_statistic(n)}
    found = [tuple(p.param.shape) for p in params]
    if found != list(parameters.values()):
        raise SymmetryError(
            f"the parameters have no names, and their shapes {listed(found)} are not, in order, "
            f"those that the symmetry describes: {listed(parameters.values())}. Pass "
            "model.named_parameters() instead of model.parameters()."
        )
    return list(parameters)


# ---------------------------------------------------------------------------------- an inferred symmetry
def infer_map(calls: list[Call], params: list[NamedParam]) -> ParamMap:
    """The symmetry of the modules that were called; tensors that they do not have stand beside it.

    Parameters are matched by identity, so that neither their names nor wrappers matter. Several modules get prefixes
    ``0/``, ``1/`` and so on. A part of a network that has no hidden units of its own is left out.

    Raises:
        SymmetryError: two of the modules share a parameter (each symmetry is then one of one use of it), or nothing is
            left.
        Exception: what the inference raises.
    """
    calls, params = on_twins(calls, params)
    symmetry, names = Symmetry({}), dict[int, str]()
    modules = list(dict.fromkeys(c.module for c in calls))
    held = Counter(p for m in modules for p in {id(p) for p in m.parameters()})
    for i, module in enumerate(modules):
        if any(held[id(p)] > 1 for p in module.parameters()):
            raise SymmetryError(f"{type(module).__name__} shares a parameter with another module of the optimizer")
        mine = [c for c in calls if c.module is module]
        found = _symmetry_of(mine)
        if mine[0].part and all(g.fixed for g in found.labels.values()):
            continue
        prefix = f"{i}/" if len(modules) > 1 else ""
        known: dict[int, str] = {}
        for name, p in module.named_parameters(remove_duplicate=False):
            known.setdefault(id(p), name)
        here = {p.position: prefix + known[id(p.param)] for p in params if known.get(id(p.param)) in found.specs}
        symmetry, names = _joined(symmetry, _prefixed(found, prefix, prefix)), {**names, **here}
    if modules and not names:
        raise SymmetryError("modules were called one by one, and none of them has hidden units of its own")
    param_map = ParamMap(symmetry, names)
    return param_map.validate([p for p in params if p.position in names])


_latest: WeakKeyDictionary[nn.Module, tuple[Any, Symmetry | Exception]] = WeakKeyDictionary()


def _pass(calls: list[Call]) -> Any:
    """What tells forward passes of a module apart."""
    return [(c.kind(), c.reads) for c in calls]


def _is_known(calls: list[Call]) -> bool:
    """Whether another optimizer has asked about the same forward passes."""
    return all(_latest.get(c.module, (None,))[0] == _pass([d for d in calls if d.module is c.module]) for c in calls)


def _symmetry_of(calls: list[Call]) -> Symmetry:
    """That of a module by its calls; looked for once for all optimizers that saw the same forward passes.

    The gradients that the calls must explain are those of the first of these optimizers.
    """
    from learned_opt.symmetry.infer import infer_called  # loads torch.export

    module = calls[0].module
    if not _is_known(calls):
        try:
            with torch.inference_mode(False), torch.enable_grad():
                found = infer_called(calls)
        except Exception as error:
            _latest[module] = _pass(calls), SymmetryError(str(error))  # the error itself may hold the module
            raise
        _latest[module] = _pass(calls), found
        return found
    known = _latest[module][1]
    if isinstance(known, Exception):
        raise known
    return known


def infer_or_say(calls: list[Call], params: list[NamedParam]) -> tuple[ParamMap | None, str]:
    """What :func:`infer_map` finds, with one log line; or None, and why it finds nothing.

    Optimizers that saw the same forward passes say nothing more, the reason included.
    """
    start = time.perf_counter()
    if not calls:
        return None, (
            "no forward pass of a module with its parameters was seen before the first step (the call was compiled, "
            "or the tensors are used without a module)"
        )
    modules = listed(type(m).__name__ for m in dict.fromkeys(c.module for c in calls))
    again = _is_known(calls)
    tensors = sum(1 for m in dict.fromkeys(c.module for c in calls) for _ in m.parameters())
    if tensors > SOME and not again:
        level = logging.WARNING if tensors > MANY else logging.INFO
        text = "NFNOpt: looking for the symmetry of %s (%d tensors), which takes seconds, once"
        logger.log(level, text, modules, tensors)
    try:
        param_map = infer_map(calls, params)
    except Exception as error:  # of a user's model anything; training goes on
        return None, "" if again else f"inferring it failed ({type(error).__name__}: {error})"
    if not again:
        _log_coverage(modules, param_map.symmetry, time.perf_counter() - start)
    return param_map, ""


def say_given(symmetry: Symmetry) -> None:
    """The one log line where the symmetry is the user's."""
    logger.info("NFNOpt: the symmetry that was given: %s", one_line(symmetry))


def warn_of_independence(reason: str) -> None:
    """The one warning where no symmetry is known."""
    logger.warning("NFNOpt: every axis moves by itself, because the symmetry is not known: %s. %s", reason, WAY_OUT)


def _log_coverage(modules: str, symmetry: Symmetry, seconds: float) -> None:
    """Say what was found; warn of operators that are not known where most weights lack a label for them."""
    logger.info("NFNOpt: inferred the symmetry of %s in %.1f s: %s", modules, seconds, one_line(symmetry))
    for note in symmetry.notes:
        logger.info("NFNOpt: %s", note)
    unknown = [note.partition(" (")[0] for note in symmetry.notes if note.endswith(UNKNOWN)]
    covered = symmetry.summary()["covered"]
    if unknown and covered < 0.5:
        logger.warning(
            "NFNOpt: only %.0f %% of the weights of %s have a symmetry, because these operators are not known: %s. "
            "learned_opt.symmetry.infer.register_rule teaches one (docs/symmetry.md).",
            100 * covered,
            modules,
            listed(unknown),
        )


def renamed(symmetry: Symmetry, specs: Callable[[str], str], labels: Callable[[str], str]) -> Symmetry:
    """The same symmetry with other names of tensors (and notes), and of labels and scales."""

    def named(label: str | None) -> str | None:
        return None if label is None else labels(label)

    def moved(leaf: Leaf) -> Leaf:
        return Leaf(leaf.size, named(leaf.label), tuple((labels(s), e) for s, e in leaf.scale))

    return Symmetry(
        {specs(n): Spec(tuple(map_leaves(moved, a) for a in s.axes), s.roles) for n, s in symmetry.specs.items()},
        {labels(n): replace(g, over=tuple(map(labels, g.over))) for n, g in symmetry.labels.items()},
        {labels(n): replace(s, label=named(s.label)) for n, s in symmetry.scales.items()},
        tuple(map(specs, symmetry.notes)),
    )


def _prefixed(symmetry: Symmetry, specs: str = "", labels: str = "") -> Symmetry:
    return renamed(symmetry, lambda n: specs + n, lambda n: labels + n)


def _joined(a: Symmetry, b: Symmetry) -> Symmetry:
    """The product of two groups that act on different tensors."""
    return Symmetry({**a.specs, **b.specs}, {**a.labels, **b.labels}, {**a.scales, **b.scales}, a.notes + b.notes)


# --------------------------------------------------------------------------------- options of the groups
def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError, or TypeError for what is no number, unless the options can be meant."""
    lr = options.get("lr", 0.0)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name in ("lr", "weight_decay", "total_steps"):
        value = options.get(name, 0.0)
        if not _is_number(value) and (value is not None or name == "lr"):  # None: the rule's own decay, no horizon
            raise TypeError(f"{name}={value!r} must be a number, not of type {type(value).__name__}")
    for name in ("lr", "weight_decay"):
        value = options.get(name, 0.0)
        if value is not None and not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")
    steps = options.get("total_steps")
    if steps is not None and not 1.0 <= float(steps) < math.inf:
        raise ValueError(f"total_steps={steps} must be at least 1 and finite; leave it out if it is not known")
    if not isinstance(options.get("maximize", False), bool | np.bool_ | int):
        raise TypeError(f"maximize={options['maximize']!r} must be True or False")


def check_choices(symmetry: Symmetry | str, nan_policy: str, state_dtype: torch.dtype | None) -> None:
    """Raises ValueError where a choice is not one."""
    if state_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"state_dtype={state_dtype!r} does not do; it is torch.bfloat16, float32, float64 or None")
    if nan_policy not in ("skip", "raise", "propagate"):
        raise ValueError(f"nan_policy={nan_policy!r} is unknown; it is 'skip', 'raise' or 'propagate'")
    if not isinstance(symmetry, Symmetry) and symmetry not in ("infer", "independent"):
        raise ValueError(f"symmetry={symmetry!r} is unknown; it is a Symmetry, 'infer' or 'independent'")


def _is_number(value: Any) -> bool:
    """Whether it is one real number: of Python, of NumPy, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def checked_group(group: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A group that is to join others. A module in it becomes its tensors, with names if other groups have them.

    Raises:
        ValueError, TypeError: as :func:`check_options`, and for another ``total_steps`` than that of the first group.
    """
    check_options(group)
    total_steps = group.get("total_steps")
    if groups and total_steps is not None and total_steps != groups[0]["total_steps"]:
        raise ValueError(
            f"total_steps={total_steps} in a group, {groups[0]['total_steps']} in the first: "
            "the horizon is one for all. Pass it to the constructor."
        )
    module = group.get("params")
    if not isinstance(module, nn.Module):
        return group
    named = any("param_names" in other for other in groups)  # torch wants all or none
    return {**group, "params": module.named_parameters() if named else module.parameters()}
