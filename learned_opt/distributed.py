"""Ranks that train replicas of one network: before their first step they agree on one symmetry.

Replicas stay equal as long as all ranks take the same step: one symmetry, and the same gradients, of which the rule
measures its rate. DistributedDataParallel sees to the gradients. The symmetry is what every rank infers from its own
first batch, which may have gone another way through the network, or fail to export. So at the first step of an
optimizer, and never again, all ranks of the process group exchange a digest of what they have, and where digests differ
use what all of them have in common.

The group is that of DistributedDataParallel, found by the parameters that it holds (also ``replicate`` of
``torch.distributed._composable``), or the one that :class:`NFNOpt` was given. Without either nothing is exchanged, so
that ranks may train networks of their own, step as often as they like, or not at all.
"""

import gc
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from learned_opt.params import NamedParam, ParamMap
from learned_opt.rules.base import UpdateRule
from learned_opt.spread import Exchange, Spread, is_sharded, refuse_rule, rows_of, spread_of
from learned_opt.symmetry import Symmetry
from learned_opt.symmetry.axes import Axis, Leaf, Sum, leaves_of, size_of
from learned_opt.text import listed

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------ what cannot be stepped
def refuse_pieces(params: Iterable[Tensor], rule: UpdateRule) -> None:
    """Raises RuntimeError where an optimizer is about to get pieces of tensors that it cannot put together.

    Or a rank's share of the tensors.
    """
    loaded = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    zero = getattr(loaded, "ZeroRedundancyOptimizer", None)
    if zero is not None and any(isinstance(s, zero) for s in _callers(10)):
        raise RuntimeError(
            "NFNOpt does not work inside ZeroRedundancyOptimizer: each rank would get some of the tensors, infer a "
            "symmetry of these alone and measure a rate of its own. Use NFNOpt with DistributedDataParallel."
        )
    params = list(params)
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise RuntimeError(
            "NFNOpt does not take parameters of FullyShardedDataParallel: they are flattened and cut into pieces, but "
            "steps need whole matrices. Use fully_shard, or DistributedDataParallel."
        )
    if spread_of(params) is not None:
        refuse_rule(rule)


def _callers(depth: int) -> Iterator[Any]:
    """The ``self`` of the functions that are being called, innermost first."""
    frame = sys._getframe(2)
    for _ in range(depth):
        yield frame.f_locals.get("self")
        if frame.f_back is None:
            return
        frame = frame.f_back


# ------------------------------------------------------------------------------------------- replicas
class Replicas(NamedTuple):
    """A process group on whose ranks parameters are replicated.

    Attributes:
        group: all of its ranks step together.
        averaged: ids of the parameters whose gradients DistributedDataParallel averages.
    """

    group: "dist.ProcessGroup"
    averaged: frozenset[int]


def replicas_of(params: Iterable[Tensor], given: "dist.ProcessGroup | None") -> Replicas | None:
    """Where these parameters are replicated; None: nowhere that is known.

    Raises:
        RuntimeError: over several groups.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wanted = {id(p) for p in params if p.requires_grad}
    groups, averaged = [] if given is None else [given], set[int]()
    for ddp in _wrappers():
        named = ddp.module.named_parameters(remove_duplicate=False)
        held = {id(p) for n, p in named if n not in ddp.parameters_to_ignore} & wanted
        if held and _is_alive(ddp.process_group):
            averaged |= held
            groups += [] if any(ddp.process_group is g for g in groups) or given else [ddp.process_group]
    if len(groups) > 1:
        raise RuntimeError(
            "the parameters of this NFNOpt are replicated over several process groups: weights that are equal on more "
            "ranks than others would move at the rate of fewer. Give those of every group an optimizer of their own."
        )
    if not groups or dist.get_world_size(groups[0]) < 2:
        return None
    return Replicas(groups[0], frozenset(averaged))


def _wrappers() -> list[DistributedDataParallel]:
    """All there are, wherever a program keeps them: on every rank the same, whatever passed through them so far."""
    frozen = gc.get_freeze_count() > 0
    if frozen:  # get_objects leaves out what is
        gc.unfreeze()
    found = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
    if frozen:
        gc.collect()
        gc.freeze()
    return found


def _is_alive(group: "dist.ProcessGroup") -> bool:
    try:
        return dist.get_rank(group) >= 0
    except (ValueError, RuntimeError):  # of a group that was destroyed
        return False


class _Report(NamedTuple):
    """What a rank tells the others."""

    tensors: Any  # shapes and dtypes
    steps: int
    digest: str | None  # of the symmetry; None: it has none
    given: bool
    reason: str
    gradients: list[int | None]


def agreed(
    own: ParamMap | None,
    reason: str,
    params: list[NamedParam],
    group: "dist.ProcessGroup | None",
    *,
    steps: int,
    given: bool,
) -> ParamMap | None:
    """The symmetry that all ranks use: that of the first rank that has one, without the labels and scales that another
    rank's symmetry lacks.

    Collective: every rank of the process group (replicas), or of the mesh (sharded parameters), must call it. If the
    parameters are neither replicated nor sharded, nothing is exchanged and ``own`` is returned.

    Args:
        own: this rank's symmetry; None: it found none.
        reason: why it found none.
        params: its parameters, with their gradients.
        group: as of :func:`replicas_of`.
        steps: how many steps its state has seen.
        given: whether its symmetry is the user's.

    Returns:
        The same on all ranks; ``own`` itself where all have the same. None: no rank has one.

    Raises:
        RuntimeError: on every rank, if the parameters, states, given symmetries or gradients are not those of replicas.
    """
    spread = spread_of(p.param for p in params)
    if spread is not None:  # along one dimension of the mesh after the other
        groups = [*spread.mesh.get_all_groups(), *([] if group is None else [group])]
        found = [Replicas(g, frozenset()) for g in groups]
    else:
        replicas = replicas_of([p.param for p in params], group)
        found = [] if replicas is None else [replicas]
    for replicas in found:
        own = _agreed(own, reason, params, replicas, steps, given)
    return own if spread is None or own is None or given or steps else _unbroken(own, params, spread)


def _unbroken(own: ParamMap, params: list[NamedParam], spread: Spread) -> ParamMap:
    """Without positive scales, if the gradients of the first step show that some do not hold.

    Of shards nothing else tells that the parameters have other uses than the one that was seen. As it is not known
    whether the gradients were computed in low precision, a small violation passes.
    """
    symmetry = own.symmetry
    scaled = {n for n, s in symmetry.specs.items() for axis in s.axes for leaf in leaves_of(axis) if leaf.scale}
    entries = [p for p in own.rename([p for p in params if p.position in own.names]) if p.trained and p.name in scaled]
    if not entries:
        return own
    from learned_opt.symmetry.infer.orbits import broken_scales  # loads torch.export
    from learned_opt.symmetry.infer.verify import unscaled

    exchange = Exchange(spread, params[0].param.device)
    local = {(w, e.name): rows_of(e.param, w == "grad").float() for e in entries for w in ("weight", "grad")}
    owner = {at: i // 2 % exchange.count for i, at in enumerate(local)}
    whole = exchange.gathered(local, {(w, e.name): e.param.shape for e in entries for w in ("weight", "grad")}, owner)
    weights, grads = ({n: x for (w, n), x in whole.items() if w == which} for which in ("weight", "grad"))
    names = [e.name for e in entries]
    broken = broken_scales(symmetry, weights, grads, coarse=True, elsewhere=names, total=exchange.total)
    if not broken:
        return own
    text = f"the loss is not constant along the scales {listed(broken)}: the parameters are used in another way too"
    logger.warning("NFNOpt: %s, or their gradients were changed. Positive scales are not used.", text)
    return ParamMap(replace(unscaled(symmetry), notes=(*symmetry.notes, text)), own.names)


def _agreed(
    own: ParamMap | None, reason: str, params: list[NamedParam], replicas: Replicas, steps: int, given: bool
) -> ParamMap | None:
    """As :func:`agreed`, in one group."""
    digest = None if own is None else _digest(own)
    tensors = [(p.position, tuple(p.param.shape), str(p.param.dtype), p.param.requires_grad) for p in params]
    mine = _Report(tensors, steps, digest, given, reason, [_checksum(p) for p in params])
    _await_first_steps(replicas.group)
    with _on_device_of(params):
        everyone: list[Any] = [None] * dist.get_world_size(replicas.group)
        dist.all_gather_object(everyone, mine, replicas.group)
        everyone = [_Report(*r) for r in everyone]
        _check(everyone, replicas, params)
        found = {r.digest: i for i, r in reversed(list(enumerate(everyone))) if r.digest is not None}
        if list(found) == [digest] and all(r.digest == digest for r in everyone):
            return own
        kept = _common([_sent(replicas.group, i, own) for i in sorted(found.values())])
    failed = [i for i, r in enumerate(everyone) if r.digest is None]
    if kept is not None and failed:
        logger.warning(
            "NFNOpt: %s found no symmetry (%s); all use that of the others", _ranks(failed), everyone[failed[0]].reason
        )
    return kept


PATIENCE = 300.0  # seconds that a rank inside of join() waits for the first steps of the others
_awaited: Counter[str] = Counter()  # how often, by group


def _await_first_steps(group: "dist.ProcessGroup") -> None:
    """Inside of ``join()``, where a rank without batches takes no step, others must not wait for it forever.

    Raises:
        RuntimeError: a rank has not come to its first step in time.
    """
    if not any(ddp.process_group is group and ddp._join_config.enable for ddp in _wrappers()):
        return
    name = group.group_name
    _awaited[name] += 1
    store = dist.distributed_c10d._get_default_store()
    keys = [f"learned_opt/{name}/{_awaited[name]}/{rank}" for rank in range(dist.get_world_size(group))]
    store.set(keys[dist.get_rank(group)], "")
    try:
        store.wait(keys, timedelta(seconds=PATIENCE))
    except RuntimeError as error:
        late = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"{_ranks(late)} took no first step within {PATIENCE:g} s, inside of join(), where a rank without batches "
            "takes none. NFNOpt needs the first step of every rank, in which they agree on one symmetry: give each at "
            "least one batch."
        ) from error


def _check(everyone: list[_Report], replicas: Replicas, params: list[NamedParam]) -> None:
    first = everyone[0]
    for what, at, way_out in (
        ("other parameters", "tensors", "Give every rank all parameters, in the same order"),
        ("another state", "steps", "Load the state dict on every rank"),
    ):
        others = [i for i, r in enumerate(everyone) if getattr(r, at) != getattr(first, at)]
        if others:
            raise RuntimeError(f"NFNOpt has {what} on {_ranks(others)} than on rank 0 of its process group. {way_out}.")
    if any(r.given for r in everyone) and len({r.digest for r in everyone}) > 1:
        raise RuntimeError(
            f"NFNOpt was given another symmetry on some ranks of {len(everyone)}. Give all the same one."
        )
    unlike = [i for i, sums in enumerate(zip(*(r.gradients for r in everyone), strict=True)) if len(set(sums)) > 1]
    if not unlike:
        return
    loose = [params[i].name for i in unlike if id(params[i].param) not in replicas.averaged]
    text = (
        f"the gradients of {listed(loose or [params[i].name for i in unlike])} differ between ranks. NFNOpt measures "
        "its rate from all gradients of an optimizer: it would be another on every rank, and replicas drift apart. "
    )
    if loose:
        raise RuntimeError(
            f"{text}Average them over the ranks before the step, or give tensors that are a rank's own an optimizer of "
            "their own."
        )
    logger.warning("NFNOpt: %sDistributedDataParallel has not averaged them (no_sync?).", text)


def _sent(group: "dist.ProcessGroup", rank: int, own: ParamMap | None) -> ParamMap:
    """The symmetry of a rank, on all."""
    me = dist.get_rank(group) == rank
    box = [_to_data(own) if me and own is not None else None]
    dist.broadcast_object_list(box, group=group, group_src=rank)
    assert box[0] is not None
    return ParamMap(Symmetry.from_dict(box[0]), {int(k): n for k, n in box[0]["names"].items()})


def _to_data(param_map: ParamMap) -> dict[str, Any]:
    return param_map.symmetry.to_dict() | {"names": {str(k): n for k, n in param_map.names.items()}}


def _digest(param_map: ParamMap) -> str:
    """Of all that steps depend on, order included."""
    return hashlib.sha256(json.dumps(_to_data(param_map) | {"notes": []}).encode()).hexdigest()


def _checksum(entry: NamedParam) -> int | None:
    """Of the bits of a gradient, the same whatever the order of summation; None: it has none, or is in shards."""
    if entry.param.grad is None or is_sharded(entry.param):
        return None
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(entry.grad.element_size(), torch.int64)
    return int(entry.grad.to_dense().contiguous().view(bits).sum(dtype=torch.int64))


def _on_device_of(params: list[NamedParam]) -> AbstractContextManager[Any]:
    """NCCL sends objects by way of the current device."""
    device = params[0].param.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _ranks(some: list[int]) -> str:
    return f"rank{'s' * (len(some) > 1)} {listed(map(str, some))}"


# ---------------------------------------------------------------------------- what several symmetries share
def _common(maps: list[ParamMap]) -> ParamMap | None:
    """The first, with what is not in all others left in place: a subgroup of every one of them."""
    if len(maps) < 2:
        return maps[0] if maps else None
    from learned_opt.symmetry.infer.verify import without  # loads torch.export

    first, *others = maps
    kept = [_generators(m) for m in others]
    lost = sorted(n for n, what in _generators(first).items() if any(what not in k.values() for k in kept))
    if not lost and all(_roles(m) == _roles(first) for m in others):
        return first
    logger.warning(
        "NFNOpt: ranks found different symmetries, from batches that went different ways through the network; all use "
        "what these share: %s stay in place",
        listed(lost),
    )
    symmetry = without(first.symmetry, lost)
    note = f"{listed(lost)}: fixed, because not all ranks found it"
    return ParamMap(replace(symmetry, notes=(*first.symmetry.notes, note)), first.names)


def _generators(param_map: ParamMap) -> dict[str, Hashable]:
    """Every label and scale by all that it does: where it acts, on which structure of axes."""
    symmetry, places = param_map.symmetry, {n: k for k, n in param_map.names.items()}
    acts: dict[str, set[Hashable]] = {}
    for name, spec in symmetry.specs.items():
        for i, axis in enumerate(spec.axes):
            for path, leaf in _paths(axis):
                at = (places.get(name, name), i, path)
                if leaf.label is not None:
                    acts.setdefault(f"label {leaf.label}", set()).add(at)
                for scale, exponent in leaf.scale:
                    acts.setdefault(f"scale {scale}", set()).add((*at, exponent))

    def label(name: str | None) -> Hashable:
        if name is None:
            return None
        own = symmetry.labels[name]
        return own.size, frozenset(acts.get(f"label {name}", ())), tuple(map(label, own.over))

    found = {f"label {n}": ("label", label(n)) for n, g in symmetry.labels.items() if not g.fixed}
    return found | {
        f"scale {n}": ("scale", s.kind, s.size, label(s.label), frozenset(acts.get(f"scale {n}", ())))
        for n, s in symmetry.scales.items()
    }


def _paths(axis: Axis, path: tuple[Hashable, ...] = ()) -> Iterator[tuple[Hashable, Leaf]]:
    """The leaves of an axis, each with the composites that it is in."""
    if isinstance(axis, Leaf):
        yield path, axis
        return
    parts = axis.parts if isinstance(axis, Sum) else axis.factors
    sizes = tuple(map(size_of, parts))
    for i, part in enumerate(parts):
        yield from _paths(part, (*path, type(axis).__name__, sizes, i))


def _roles(param_map: ParamMap) -> Mapping[Hashable, Any]:
    return {k: param_map.symmetry.specs[n].roles for k, n in param_map.names.items()}
