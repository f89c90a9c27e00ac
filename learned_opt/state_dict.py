"""What the state dict of :class:`NFNOpt` says, checked before anything of it is used."""

import copy
import json
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_opt.buffers import Buffers
from learned_opt.checkpoint import digest
from learned_opt.names import plain_name
from learned_opt.params import Mode, NamedParam, ParamMap, match, named_params, renamed
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.whitening import packed
from learned_opt.symmetry import Symmetry, independent
from learned_opt.text import listed

# keys of the first parameter group of a state dict
RULE, SHA, WEIGHTS, SYMMETRY, NETWORK = "rule", "weights_sha256", "weights", "symmetry", "network"
Network = list[dict[str, Tensor]]  # numbers of the whole network, of every device


class Loaded(NamedTuple):
    """What a state dict says, checked.

    Attributes:
        rule: to go on with.
        known: the symmetry.
        state: slots of every tensor that has some.
        network: numbers of the whole network, by device.
        total_steps: the horizon to go on with.
    """

    rule: UpdateRule
    known: ParamMap | Mode
    state: list[tuple[Tensor, dict[str, Tensor]]]
    network: dict[torch.device, dict[str, Tensor]]
    total_steps: Any


def loaded(
    saved: dict[str, Any],
    groups: list[dict[str, Any]],
    rule: UpdateRule,
    known: ParamMap | Mode,
    given: Symmetry | Mode,
) -> Loaded:
    """What a state dict says to an optimizer of these parameter groups, rule and symmetry (see below).

    Its own groups lose what :func:`identity` wrote there.

    Raises:
        ValueError: another rule, symmetry, other names, shapes or slots, or altered learned weights.
    """
    found = pop_identity(saved["param_groups"])
    entries = named_params(groups)
    devices = dict.fromkeys(e.param.device for e in entries if e.has_data)
    return Loaded(
        saved_rule(found, rule),
        saved_symmetry(found, known, given, entries),
        saved_state(saved, groups, rule, ours=bool(found)),
        dict(zip(devices, saved_network(found), strict=False)),
        own_horizon(groups, saved["param_groups"]),
    )


def describe(rule: UpdateRule) -> str:
    """The rule's class and its plain settings, such as ``Adam(betas=(0.9, 0.999), eps=1e-08)``."""
    plain = (bool, int, float, str, tuple, torch.dtype)
    settings = {k: v for k, v in vars(rule).items() if isinstance(v, plain) and k[0] != "_" and k != "training"}
    return f"{type(rule).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"


def summary(rule: UpdateRule, known: ParamMap | Mode, groups: list[dict[str, Any]]) -> str:
    """An optimizer in a line, and a line for the options of every parameter group."""
    tensors = [e.param for e in named_params(groups)]
    if isinstance(known, ParamMap):
        moving = sum(not label.fixed for label in known.symmetry.labels.values())
        text = f"symmetry of {len(known.symmetry.specs)} tensors in {moving} groups"
    else:
        text = {"infer": "symmetry to be inferred at the first step", "independent": "independent axes"}[known]
    lines = [f"NFNOpt({describe(rule)}, {text}, {len(tensors)} tensors, {sum(p.numel() for p in tensors)} weights)"]
    for i, group in enumerate(groups):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names", NETWORK)}
        lines.append(f"  group {i}: " + ", ".join(f"{k}={v}" for k, v in options.items()))
    return "\n".join(lines)


# --------------------------------------------------------------------------------- rule and symmetry
def identity(rule: UpdateRule, symmetry: ParamMap | Mode, network: Network) -> dict[str, Any]:
    """What a run is resumed with: the rule's name, its learned weights, the symmetry and the network's numbers as text.

    The symmetry is "infer" (not inferred yet), "independent", or JSON: itself, and the names by position. The numbers
    are JSON too: how many they are depends on the symmetry, and torch's distributed checkpointing must know the shapes
    of tensors before.
    """
    weights = {n: t.detach().clone() for n, t in rule.state_dict().items()}
    text: str = symmetry if isinstance(symmetry, str) else ""
    if isinstance(symmetry, ParamMap):
        text = json.dumps(symmetry.symmetry.to_dict() | {"names": {str(k): n for k, n in symmetry.names.items()}})
    numbers = json.dumps([{k: x.tolist() for k, x in numbers.items()} for numbers in network])
    return {RULE: describe(rule), SHA: digest(weights), WEIGHTS: weights, SYMMETRY: text, NETWORK: numbers}


def add_identity(saved: dict[str, Any], rule: UpdateRule, symmetry: ParamMap | Mode, network: Network) -> None:
    """Add :func:`identity` to torch's state dict, and make its numbers plain: weights_only takes none of NumPy's."""
    for group in saved["param_groups"]:
        group |= {k: v.item() for k, v in group.items() if isinstance(v, np.generic)}
    saved["param_groups"][0] |= identity(rule, symmetry, network)


def pop_identity(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Take what :func:`identity` wrote out of the parameter groups."""
    found: dict[str, Any] = {}
    for group in groups:
        found |= {k: group.pop(k) for k in (RULE, SHA, WEIGHTS, SYMMETRY, NETWORK) if k in group}
    return found


def saved_symmetry(
    saved: Mapping[str, Any], own: ParamMap | Mode, given: Symmetry | Mode, params: list[NamedParam]
) -> ParamMap | Mode:
    """The symmetry to go on with.

    Args:
        saved: from :func:`pop_identity`.
        own: what the optimizer has now.
        given: what it was told. "infer" takes that of the state dict; a choice must be the same there.
        params: its tensors; a state dict of an older version has no names for them.

    Raises:
        ValueError: it is another one.
    """
    text = saved.get(SYMMETRY, "infer")
    if text == "infer" or (text is None and given != "infer"):
        return own
    if text in ("independent", None):  # None: so older versions wrote independent axes
        loaded: Symmetry | Mode = "independent"
    else:
        data = json.loads(text)
        loaded = Symmetry.from_dict(data)
    if given == "infer":
        if isinstance(loaded, str):
            return loaded
        names = data.get("names")
        return match(params, loaded) if names is None else ParamMap(loaded, {int(k): n for k, n in names.items()})
    if loaded != given and _plain(loaded) != _plain(given):
        raise ValueError(
            "the state dict was made with another symmetry than this optimizer has. Construct "
            'it with the same symmetry, or with symmetry="infer" to take that of the state dict.'
        )
    return own


def _plain(symmetry: Symmetry | Mode) -> Any:
    return symmetry if isinstance(symmetry, str) else renamed(symmetry, plain_name, plain_name).to_dict()


def saved_rule(saved: Mapping[str, Any], rule: UpdateRule) -> UpdateRule:
    """The rule, with the learned weights of the state dict (then a copy, and a warning).

    Raises:
        ValueError: another rule, or learned weights that are missing, altered or do not fit.
    """
    own = {n: t.detach() for n, t in rule.state_dict().items()}
    if saved.get(RULE, describe(rule)) != describe(rule):
        raise ValueError(
            f"the state dict is of rule {saved[RULE]}, this one is {describe(rule)}. Construct it with that rule."
        )
    weights, sha = saved.get(WEIGHTS), saved.get(SHA)
    altered = weights is not None and digest(weights) != sha
    if sha is None or (sha == digest(own) and not altered):
        return rule
    if weights is None or altered:
        reason = "does not hold them" if weights is None else "holds altered ones"
        raise ValueError(
            f"the state dict was made with learned weights {sha[:12]} but {reason}; this optimizer has "
            f"{digest(own)[:12]}. Construct the optimizer with rule=<path of those weights>."
        )
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in own.items()}:
        raise ValueError(
            "the learned weights in the state dict do not fit this version of the rule. Load it with "
            "the version that made it, or start with fresh state."
        )
    warnings.warn(
        f"NFNOpt: continuing with the learned weights {sha[:12]} of the state dict, not {digest(own)[:12]}.",
        stacklevel=6,
    )
    rule = copy.deepcopy(rule)  # the caller may use theirs elsewhere
    rule.load_state_dict(weights)
    return rule


# ------------------------------------------------------------------------------------ state by position
def saved_state(
    saved: Mapping[str, Any], groups: list[dict[str, Any]], rule: UpdateRule, ours: bool
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """State to restore per parameter, checked against the parameters and the rule.

    Other slots, of an optimizer that wraps this one, are none of it. ``ours`` says that it is known to be a state dict
    of NFNOpt, in which some tensors may have such slots alone.

    Raises:
        ValueError: other names, shapes or slots.
    """
    if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in groups]:
        return []  # torch refuses this, in its own words
    wrong: list[str] = []
    owners: dict[Any, tuple[str, Tensor]] = {}
    for group, other in zip(groups, saved["param_groups"], strict=True):
        own_names, other_names = group.get("param_names"), other.get("param_names")
        names = own_names or other_names or [f"parameter {k}" for k in other["params"]]
        for key, name, p in zip(other["params"], names, group["params"], strict=True):
            owners[key] = (name, p)
        pairs = zip(own_names, other_names, strict=True) if own_names and other_names else ()
        wrong += [f"{a} here is {b} in the state dict" for a, b in pairs if plain_name(a) != plain_name(b)]
    wrong += [f"state of unknown parameter {k!r}" for k in saved["state"] if k not in owners]
    restored = []
    for key, slots in saved["state"].items():
        if key in owners and slots:
            name, p = owners[key]
            wanted = _slot_shapes(p, rule)
            own = {k: _half(x, wanted[k]) for k, x in slots.items() if k in wanted}
            if ours and not own:  # only what a wrapper has put there
                continue
            wrong += [f"{name}: {reason}" for reason in _unfit(own, slots, wanted)]
            restored.append((p, {k: _as_slot(x, p) for k, x in own.items()}))
    if wrong:
        raise ValueError(
            f"the state dict does not fit this optimizer:\n  {listed(wrong, chr(10) + '  ')}\n"
            "Give the optimizer the same parameters, in the same order and with the same rule (of the same version), "
            "as when it was saved; a load_state_dict pre-hook can rename. Nothing was changed."
        )
    return restored


def _slot_shapes(p: Tensor, rule: UpdateRule) -> dict[str, tuple[int, ...]]:
    like = {"p": torch.empty(p.shape, dtype=p.dtype, device="meta")}  # whole, where p is sharded
    slots = Buffers(rule, like, independent(like)).slots["p"]
    return {k: tuple(x.shape) for k, x in slots.items()}


def _unfit(own: Mapping[str, Any], slots: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    if own.keys() != wanted.keys():
        return [f"slots {', '.join(sorted(slots))} instead of {', '.join(sorted(wanted))}"]
    found = {k: tuple(torch.as_tensor(x).shape) for k, x in own.items()}
    return [f"{k} has shape {found[k]} instead of {wanted[k]}" for k in found if found[k] != wanted[k]]


def _half(value: Any, wanted: tuple[int, ...]) -> Any:
    """Second moments of an axis as they are kept now; older state dicts have whole matrices."""
    d = wanted[0] if wanted else 0
    whole = wanted == (d, d // 2 + 1) and isinstance(value, Tensor) and value.shape == (d, d)
    return packed(value) if whole else value


def _as_slot(value: Any, param: Tensor) -> Tensor:
    return torch.as_tensor(value).to(param.device)


def own_horizon(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> Any:
    """The ``total_steps`` to go on with: the optimizer's own, if it has any, else those of the state dict.

    A warning says so where both have some and they differ.
    """
    own, other = groups[0]["total_steps"], saved[0].get("total_steps") if saved else None  # none: torch refuses
    if own is None:
        return other
    if other is not None and float(own) != float(other):
        warnings.warn(
            f"NFNOpt: going on with total_steps={float(own):g} of this optimizer; the state dict was made with "
            f"{float(other):g}.",
            stacklevel=5,
        )
    return own


def saved_network(saved: Mapping[str, Any]) -> Network:
    """The numbers that :func:`identity` wrote, float64."""
    numbers = json.loads(saved.get(NETWORK) or "[]")
    return [{k: torch.tensor(x, dtype=torch.float64) for k, x in each.items()} for each in numbers]
