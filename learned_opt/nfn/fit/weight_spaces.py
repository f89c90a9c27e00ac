"""Where fitting takes its networks from: many state_dicts as one table of tensors, checked against a weight space."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from learned_opt.names import known_names, plain_name
from learned_opt.nfn.chain import Chain, ChainLayer, Features
from learned_opt.nfn.equivariant_basis import Dim, Dims
from learned_opt.nfn.general import check_features
from learned_opt.nfn.transformer_space import BlockNames, TransformerFeatures, TransformerSpec
from learned_opt.symmetry import Symmetry, SymmetryError

Space = Chain | TransformerSpec | Symmetry
States = Sequence[Mapping[str, Tensor]] | Sequence[nn.Module] | Mapping[str, Tensor]
Data = Any  # Tensor, dict of tensors, or TransformerFeatures: rows are networks


def stacked(states: States) -> dict[str, Tensor]:
    """The weights of many networks of one architecture: ``{name: [networks, *shape]}``, floating point.

    Names are without what wrappers (``torch.compile``, DataParallel, ...) put in.

    Args:
        states: state_dicts, or modules (their parameters and buffers), or tensors that are stacked already.

    Raises:
        SymmetryError: an entry has another architecture than the first: says which, which parameter, what shape.
        ValueError: no networks, or stacks of unequal length.
    """
    if isinstance(states, Mapping):
        table = _plain(dict(states))
        lengths = {n: len(x) for n, x in table.items()}
        if not table or len(set(lengths.values())) != 1:
            raise ValueError(f"stacked weights need one row per network in every tensor; their lengths are {lengths}")
    else:
        table = _stack([_plain(_tensors(s)) for s in states])
    return {n: x.detach() for n, x in table.items() if x.is_floating_point()}


def _tensors(state: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    if isinstance(state, nn.Module):
        return {**dict(state.named_parameters()), **dict(state.named_buffers())}
    return dict(state)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {plain_name(n): x for n, x in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors


def _stack(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if not states:
        raise ValueError("there are no networks to fit on")
    first = {n: tuple(x.shape) for n, x in states[0].items()}
    for i, state in enumerate(states):
        other = {n: tuple(x.shape) for n, x in state.items()}
        if other != first:
            name = min(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
            raise SymmetryError(
                f"network {i} has another architecture than network 0: {name} is {other.get(name, 'missing')}, "
                f"not {first.get(name, 'missing')}. Fit one architecture at a time."
            )
    return {n: torch.stack([state[n].detach() for state in states]) for n in first}


def fitting(space: Space | None, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the space describes, by its names, which may be those of a wrapped network.

    Others are left out if they are alike in all networks (frozen tables), or if they are one that it describes under
    a second name (tied parameters in a state_dict).

    Raises:
        SymmetryError: a tensor is missing or has another shape, or the space knows nothing of one that varies.
        ValueError: values that are not finite.
    """
    if space is None:
        return _finite({n: x for n, x in table.items() if _varies(x) or bool(x.isfinite().all())})  # no masks
    names = known_names(table, _names_of(space))
    table = {names[n]: x for n, x in table.items()}
    one = {n: x[:1].unsqueeze(1) for n, x in table.items()}
    known = set(space.unpack(space.pack(one))) if isinstance(space, TransformerSpec) else set(_names_of(space))
    more = [n for n, x in table.items() if n not in known and _varies(x)]
    more = [n for n in more if not any(torch.equal(table[n], table[k]) for k in known & table.keys())]
    if more:
        raise SymmetryError(
            f"the weight space knows nothing of {', '.join(sorted(more)[:5])}. Make it from one of these state_dicts,"
            " or leave these tensors out."
        )
    if isinstance(space, Symmetry):
        check_features(space, {n: x for n, x in one.items() if n in known})
    elif isinstance(space, Chain):
        space.validate(one)
    return _finite({n: x for n, x in table.items() if n in known})


def _names_of(space: Space) -> list[str]:
    """The tensors that a space describes; of a transformer also biases that it may lack."""
    if not isinstance(space, TransformerSpec):
        return list(space.specs if isinstance(space, Symmetry) else space.names)
    modules = [n for b in space.names for n in (*b.qkv, b.out, b.fc1, b.fc2)]
    return [*space.rest, *(f"{n}.{kind}" for n in modules for kind in ("weight", "bias"))]


def _varies(x: Tensor) -> bool:
    return bool((x != x[:1]).any())


def _finite(table: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, x in table.items():
        wrong = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{name} has values that are not finite in {len(wrong)} of {len(x)} networks, the first is network "
                f"{wrong[0]}. Leave these networks out."
            )
    return table


def replaced(states: States, edited: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A state_dict per network, on the CPU: the one that it has, with the edited tensors under all of their names.

    A second name is one of the same memory, or of the same values in networks that differ.

    Args:
        states: as for :func:`stacked`.
        edited: ``{name: [networks, *shape]}``, by the names of a weight space.
    """
    if isinstance(states, Mapping):
        count = len(next(iter(states.values())))
        whole = [{n: x[i] for n, x in states.items()} for i in range(count)]
    else:
        whole = [dict(s.state_dict() if isinstance(s, nn.Module) else s) for s in states]
    sources = [_sources(state, whole, edited) for state in whole]
    return [
        {n: edited[k][i] if (k := source.get(n)) else _copied(x) for n, x in state.items()}
        for i, (state, source) in enumerate(zip(whole, sources, strict=True))
    ]


def _copied(x: Any) -> Any:
    return x.detach().cpu().clone() if isinstance(x, Tensor) else x


def _sources(state: Mapping[str, Any], every: Sequence[Mapping[str, Any]], edited: Mapping[str, Tensor]) -> Any:
    """By the names in a network's state_dict, what is the tensor's name among the edited ones."""
    names = known_names(state, edited)
    found = {n: names[n] for n in state if names[n] in edited}
    for n, x in state.items():
        if n in found or not isinstance(x, Tensor):
            continue
        for m, k in list(found.items()):
            varies = any(s[m].shape == x.shape and not torch.equal(s[m], state[m]) for s in every if m in s)
            alike = all(n in s and torch.equal(s[n], s[m]) for s in every if m in s)
            if _is_view(x, state[m]) or (varies and alike):
                found[n] = k
    return found


def _is_view(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def features(table: Mapping[str, Tensor], dtype: torch.dtype) -> Features:
    """``{name: [networks, *shape]}`` -> features with one channel."""
    return {n: x.to(dtype).unsqueeze(1) for n, x in table.items()}


# ------------------------------------------------------------------------------------ rows of prepared data
def map_data(function: Callable[[Tensor], Tensor], data: Data) -> Data:
    """Apply a function to every tensor of prepared data."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, TransformerFeatures):
        return replace(data, blocks=map_data(function, data.blocks), rest=map_data(function, data.rest))
    return {n: map_data(function, x) for n, x in data.items()}


def join_data(parts: Sequence[Data]) -> Data:
    """Concatenate prepared data of the same kind along their rows."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, TransformerFeatures):
        return replace(first, blocks=join_data([p.blocks for p in parts]), rest=join_data([p.rest for p in parts]))
    return {n: join_data([p[n] for p in parts]) for n in first}


# ------------------------------------------------------------------------------------ spaces as plain data
def space_to_data(space: Space | None) -> Any:
    """Plain data (JSON) that :func:`space_from_data` reads."""
    if space is None:
        return None
    if isinstance(space, Symmetry):
        return {"symmetry": space.to_dict()}
    return {"chain" if isinstance(space, Chain) else "transformer": asdict(space)}


def space_from_data(data: Any) -> Space | None:
    """Inverse of :func:`space_to_data`."""
    if data is None:
        return None
    ((kind, value),) = data.items()
    if kind == "symmetry":
        return Symmetry.from_dict(value)
    if kind == "chain":
        layers = tuple(ChainLayer(**{**x, "kernel": tuple(x["kernel"])}) for x in value["layers"])
        return Chain(layers, value["scale"])
    names = tuple(BlockNames(**{**x, "qkv": tuple(x["qkv"])}) for x in value["names"])
    outside = {key: {n: _dims(d) for n, d in value[key].items()} for key in ("embedding", "classifier")}
    return TransformerSpec(**{**value, "names": names, **outside})


def _dims(data: Sequence[Mapping[str, Any]]) -> Dims:
    return tuple(Dim(**{**x, "base": tuple(x["base"]), "scale": tuple(map(tuple, x["scale"]))}) for x in data)
