"""The tensors of an optimizer: their names, their options, and their symmetry (given, inferred or independent)."""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from learned_opt.recorder import Call
from learned_opt.symmetry import Spec, Symmetry, SymmetryError, independent
from learned_opt.symmetry.axes import Leaf, map_leaves
from learned_opt.symmetry.labels import is_statistic
from learned_opt.text import listed

logger = logging.getLogger(__name__)

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WAY_OUT = (
    "To use the symmetry, pass symmetry=learned_opt.infer_symmetry(model, example_input) to NFNOpt; "
    'symmetry="independent" says that it is not wanted.'
)


Mode = Literal["infer", "independent"]  # in the place of a symmetry: to be inferred, or every axis by itself


class NamedParam(NamedTuple):
    """One optimised tensor: its name, the tensor, its group, and its place among all tensors of all groups."""

    name: str
    param: Tensor
    group: dict[str, Any]
    position: int
    shrink: float = 1.0  # of a gradient so large that its square would overflow

    @property
    def trained(self) -> bool:
        """Whether this step may move it."""
        return self.param.requires_grad and self.param.grad is not None

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
        taken = set(self.symmetry.specs)
        missing = [p._replace(name=f"{p.name}#{p.position}") if p.name in taken else p for p in missing]
        rest = independent_map(missing)
        logger.info(
            "NFNOpt: %s: not in the symmetry that is known, every axis moves by itself", listed(rest.names.values())
        )
        apart = _prefixed(rest.symmetry, labels="own:")
        return ParamMap(_joined(self.symmetry, apart), {**self.names, **rest.names})

    def rebind(self, names: Mapping[Tensor, str], params: list[NamedParam]) -> "ParamMap":
        """The map where groups have changed.

        Args:
            names: the name of every tensor that had one. It keeps that, wherever it is now.
            params: the tensors as they are. One that is new has the name of the one whose place it took, or none.
        """
        kept = {p.position: names[p.param] for p in params if p.param in names}
        free = {k: n for k, n in self.names.items() if n not in kept.values()}
        return ParamMap(self.symmetry, {p.position: free[p.position] for p in params if p.position in free} | kept)


def named_params(groups: Iterable[dict[str, Any]]) -> list[NamedParam]:
    """Every floating (or complex) tensor of the parameter groups once, with its name: as given, else its position."""
    found: dict[str, NamedParam] = {}
    seen: set[int] = set()
    position = 0
    for group in groups:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            name = str(position) if names is None else names[i]
            if name in found:  # two networks in one optimizer
                name = f"{name}#{position}"
            if id(p) not in seen and (p.is_floating_point() or p.is_complex()):
                found[name] = NamedParam(name, p, group, position)
            position += 1
            seen.add(id(p))
    return list(found.values())


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
        names = [p.name if p.name in symmetry.specs else plain_name(p.name) for p in params]
    else:
        names = _in_order(params, symmetry)
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise SymmetryError(f"several parameters are called {listed(twice)}: rename them.")
    positions = [p.position for p in params]
    return ParamMap(symmetry, dict(zip(positions, names, strict=True))).validate(params)


def plain_name(name: str) -> str:
    """A name without what wrappers put in (torch.compile, FSDP anywhere; DataParallel in front)."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


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
    if isinstance(given, Symmetry):
        return match(params, given)
    return known.rebind(names, params).extend(params).validate(params) if isinstance(known, ParamMap) else known


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

    Parameters are matched by identity, so that neither their names nor wrappers matter. Several modules
    get prefixes ``0/``, ``1/``, ...

    Raises:
        SymmetryError: two of the modules share a parameter: each symmetry is then one of one use of it.
        Exception: what the inference raises.
    """
    from learned_opt.symmetry.infer import infer_called  # loads torch.export

    symmetry, names = Symmetry({}), dict[int, str]()
    modules = list(dict.fromkeys(c.module for c in calls))
    for i, module in enumerate(modules):
        with torch.inference_mode(False), torch.enable_grad():
            found = infer_called([c for c in calls if c.module is module])
        prefix = f"{i}/" if len(modules) > 1 else ""
        known: dict[int, str] = {}
        for name, p in module.named_parameters(remove_duplicate=False):
            known.setdefault(id(p), name)
        here = {p.position: prefix + known[id(p.param)] for p in params if known.get(id(p.param)) in found.specs}
        if here.keys() & names.keys():
            raise SymmetryError(f"{type(module).__name__} shares a parameter with another module of the optimizer")
        symmetry, names = _joined(symmetry, _prefixed(found, prefix, prefix)), {**names, **here}
    param_map = ParamMap(symmetry, names)
    return param_map.validate([p for p in params if p.position in names])


def infer_or_say(calls: list[Call], params: list[NamedParam]) -> tuple[ParamMap | None, str]:
    """What :func:`infer_map` finds, with one log line; or None, and why it finds nothing."""
    if not calls:
        return None, (
            "no forward pass of a module that has all its parameters was seen before the first step (they were passed "
            "as a list of tensors of several modules, submodules were called one by one, or the call was compiled)"
        )
    try:
        param_map = infer_map(calls, params)
    except Exception as error:  # of a user's model anything; training goes on
        return None, f"inferring it failed ({type(error).__name__}: {error})"
    modules = ", ".join(type(m).__name__ for m in dict.fromkeys(c.module for c in calls))
    logger.info("NFNOpt: inferred the symmetry of %s: %d tensors", modules, len(param_map.symmetry.specs))
    for note in param_map.symmetry.notes:
        logger.info("NFNOpt: %s", note)
    return param_map, ""


def warn_of_independence(reason: str) -> None:
    """The one warning where no symmetry is known."""
    logger.warning("NFNOpt: every axis moves by itself, because the symmetry is not known: %s. %s", reason, WAY_OUT)


def _prefixed(symmetry: Symmetry, specs: str = "", labels: str = "") -> Symmetry:
    """The same symmetry with other names."""

    def named(label: str | None) -> str | None:
        return None if label is None else labels + label

    def moved(leaf: Leaf) -> Leaf:
        return Leaf(leaf.size, named(leaf.label), tuple((labels + s, e) for s, e in leaf.scale))

    return Symmetry(
        {specs + n: Spec(tuple(map_leaves(moved, a) for a in s.axes), s.roles) for n, s in symmetry.specs.items()},
        {labels + n: replace(g, over=tuple(labels + b for b in g.over)) for n, g in symmetry.labels.items()},
        {labels + n: replace(s, label=named(s.label)) for n, s in symmetry.scales.items()},
        tuple(specs + note for note in symmetry.notes),
    )


def _joined(a: Symmetry, b: Symmetry) -> Symmetry:
    """The product of two groups that act on different tensors."""
    return Symmetry({**a.specs, **b.specs}, {**a.labels, **b.labels}, {**a.scales, **b.scales}, a.notes + b.notes)


# --------------------------------------------------------------------------------- options of the groups
def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError, or TypeError for text, unless ``lr``, ``weight_decay`` and ``total_steps`` can be meant."""
    lr = options.get("lr", 0.0)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name in ("lr", "weight_decay", "total_steps"):
        if isinstance(options.get(name), str):
            raise TypeError(f"{name}={options[name]!r} must be a number")
    for name in ("lr", "weight_decay"):
        value = options.get(name, 0.0)
        if value is None and name == "weight_decay":  # the rule's own
            continue
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")
    steps = options.get("total_steps")
    if steps is not None and not 0.0 < float(steps) < math.inf:
        raise ValueError(f"total_steps={steps} must be positive and finite; leave it out if it is not known")


def check_choices(symmetry: Symmetry | str, nan_policy: str, state_dtype: torch.dtype | None) -> None:
    """Raises ValueError where a choice is not one."""
    if state_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"state_dtype={state_dtype!r} does not do; it is torch.bfloat16, float32, float64 or None")
    if nan_policy not in ("skip", "raise", "propagate"):
        raise ValueError(f"nan_policy={nan_policy!r} is unknown; it is 'skip', 'raise' or 'propagate'")
    if not isinstance(symmetry, Symmetry) and symmetry not in ("infer", "independent"):
        raise ValueError(f"symmetry={symmetry!r} is unknown; it is a Symmetry, 'infer' or 'independent'")


def warn_of_habit(lr: float | Tensor) -> None:
    """Warn of a learning rate as of other optimizers, where a rule sets its own, which ``lr`` multiplies."""
    if 0 < float(lr) < 0.03:
        warnings.warn(
            f"NFNOpt: lr={float(lr):g} multiplies the rate that the rule sets itself, so steps are {1 / float(lr):.3g} "
            "times shorter than it measures. Leave lr out (it is 1).",
            stacklevel=3,
        )


def warn_of_end(step: int, total_steps: float) -> None:
    """Warn of a step beyond the horizon."""
    warnings.warn(
        f"NFNOpt: step {step}, but total_steps={total_steps:g}: the schedule has ended, and weights stay "
        "where they are. Pass the number of optimizer steps, epochs times batches.",
        stacklevel=4,
    )


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
