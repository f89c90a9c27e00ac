"""The tensors of an optimizer under the names of a symmetry: given, inferred, or every axis by itself."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_opt.capture import Call
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


class Entry(NamedTuple):
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


class Binding(NamedTuple):
    """A symmetry and the names under which it knows the tensors, by their position."""

    symmetry: Symmetry
    names: Mapping[int, str]

    def rename(self, entries: list[Entry]) -> list[Entry]:
        """The entries under the symmetry's names."""
        return [e._replace(name=self.names[e.position]) for e in entries]

    def validate(self, entries: list[Entry]) -> "Binding":
        """Itself, unless a tensor is not described with its shape (:class:`SymmetryError`)."""
        self.symmetry.validate({e.name: e.param for e in self.rename(entries)})
        return self


def entries_of(groups: Iterable[dict[str, Any]]) -> list[Entry]:
    """Every floating (or complex) tensor of the parameter groups once, with its name: as given, else its position."""
    entries: dict[str, Entry] = {}
    seen: set[int] = set()
    position = 0
    for group in groups:
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            name = str(position) if names is None else names[i]
            if name in entries:  # two networks in one optimizer
                name = f"{name}#{position}"
            if id(p) not in seen and (p.is_floating_point() or p.is_complex()):
                entries[name] = Entry(name, p, group, position)
            position += 1
            seen.add(id(p))
    return list(entries.values())


# -------------------------------------------------------------------------------- every axis by itself
def by_themselves(entries: list[Entry]) -> Binding:
    """Independent axes, under the entries' own names."""
    symmetry = independent({e.name: e.param for e in entries})
    return Binding(symmetry, {e.position: e.name for e in entries})


def beside(binding: Binding, entries: list[Entry]) -> Binding:
    """The binding with what it lacks of ``entries`` added, every axis by itself."""
    lacking = [e for e in entries if e.position not in binding.names]
    if not lacking:
        return binding
    taken = set(binding.symmetry.specs)
    lacking = [e._replace(name=f"{e.name}#{e.position}") if e.name in taken else e for e in lacking]
    rest = by_themselves(lacking)
    logger.info(
        "NFNOpt: %s: not in the symmetry that is known, every axis moves by itself", listed(rest.names.values())
    )
    apart = _prefixed(rest.symmetry, labels="own:")
    return Binding(_joined(binding.symmetry, apart), {**binding.names, **rest.names})


def followed(binding: Binding, own: Mapping[Tensor, str], entries: list[Entry]) -> Binding:
    """The binding where groups have changed.

    Args:
        binding: names by position, as they were.
        own: the name of every tensor that had one. It keeps that, wherever it is now.
        entries: the tensors as they are. One that is new has the name of the one whose place it took, or none.
    """
    kept = {e.position: own[e.param] for e in entries if e.param in own}
    free = {k: n for k, n in binding.names.items() if n not in kept.values()}
    return Binding(binding.symmetry, {e.position: free[e.position] for e in entries if e.position in free} | kept)


# ------------------------------------------------------------------------------------ a given symmetry
def matched(entries: list[Entry], symmetry: Symmetry) -> Binding:
    """The entries under the names of a given symmetry: by name, or in order of position where they have none.

    Raises:
        SymmetryError: some tensor is not described with its shape, or two have one name.
    """
    if any("param_names" in e.group for e in entries):
        names = [e.name if e.name in symmetry.specs else bare(e.name) for e in entries]
    else:
        names = _in_order(entries, symmetry)
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise SymmetryError(f"several parameters are called {listed(twice)}: rename them.")
    positions = [e.position for e in entries]
    return Binding(symmetry, dict(zip(positions, names, strict=True))).validate(entries)


def bare(name: str) -> str:
    """A name without what wrappers put in (torch.compile, FSDP anywhere; DataParallel in front)."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _in_order(entries: list[Entry], symmetry: Symmetry) -> list[str]:
    parameters = {n: s.shape for n, s in symmetry.specs.items() if not is_statistic(n)}
    found = [tuple(e.param.shape) for e in entries]
    if found != list(parameters.values()):
        raise SymmetryError(
            f"the parameters have no names, and their shapes {listed(found)} are not, in order, "
            f"those that the symmetry describes: {listed(parameters.values())}. Pass "
            "model.named_parameters() instead of model.parameters()."
        )
    return list(parameters)


# ---------------------------------------------------------------------------------- an inferred symmetry
def inferred(calls: list[Call], entries: list[Entry]) -> Binding:
    """The symmetry of the modules that were called; tensors that they do not have stand beside it.

    Parameters are matched by identity, so that neither their names nor wrappers matter. Several modules
    get prefixes ``0/``, ``1/``, ...

    Raises:
        SymmetryError: two of the modules share a parameter: each symmetry is then one of one use of it.
        Exception: what the inference raises.
    """
    from learned_opt.symmetry.infer import infer_symmetry  # loads torch.export

    symmetry, names = Symmetry({}), dict[int, str]()
    for i, call in enumerate(calls):
        with call.in_its_modes(), torch.inference_mode(False), torch.enable_grad():
            found = infer_symmetry(call.module, *call.args, keywords=call.kwargs)
        prefix = f"{i}/" if len(calls) > 1 else ""
        known: dict[int, str] = {}
        for name, p in call.module.named_parameters(remove_duplicate=False):
            known.setdefault(id(p), name)
        here = {e.position: prefix + known[id(e.param)] for e in entries if known.get(id(e.param)) in found.specs}
        if here.keys() & names.keys():
            raise SymmetryError(f"{type(call.module).__name__} shares a parameter with another module of the optimizer")
        symmetry, names = _joined(symmetry, _prefixed(found, prefix, prefix)), {**names, **here}
    binding = Binding(symmetry, names)
    return binding.validate([e for e in entries if e.position in names])


def decided(calls: list[Call], entries: list[Entry]) -> Binding | None:
    """What :func:`inferred` finds, with one log line; None, with one warning that says why, where it finds nothing."""
    if not calls:
        reason = (
            "no forward pass of a module that has all its parameters was seen before the first step (they were passed "
            "as a list of tensors of several modules, submodules were called one by one, or the call was compiled)"
        )
    else:
        try:
            binding = inferred(calls, entries)
        except Exception as error:  # of a user's model anything; training goes on
            reason = f"inferring it failed ({type(error).__name__}: {error})"
        else:
            modules = ", ".join(type(c.module).__name__ for c in calls)
            logger.info("NFNOpt: inferred the symmetry of %s: %d tensors", modules, len(binding.symmetry.specs))
            for note in binding.symmetry.notes:
                logger.info("NFNOpt: %s", note)
            return binding
    logger.warning("NFNOpt: every axis moves by itself, because the symmetry is not known: %s. %s", reason, WAY_OUT)
    return None


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
