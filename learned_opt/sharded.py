"""Parameters in shards (``fully_shard``): every whole tensor has an owner, the rank that computes its step.

A step of a matrix needs all of it, while a rank has some of its rows. So each rank owns some tensors, a matrix and its
bias together, and runs the ordinary rule on these as on a network of their own. A step is

    gradients and weights -> owners,    updates by apply_rule there,    new weights -> shards,

each arrow one exchange of all tensors at once (``all_to_all``; large networks in bundles): with P weights in the model,
each of n ranks sends and receives 3 P (n - 1) / n^2 numbers; FSDP's own passes move 3 P (n - 1) / n. Weights travel to
the owner, too, rather than staying there as a copy: what others write into them in between (a moving average, a loaded
checkpoint) counts. What the rule asks of the whole network, it asks all owners (:class:`learned_opt.across.Across`).

The state lies with the owners, in whole tensors. ``state_dict()`` hands it out in shards, as DTensors like the
parameters, which torch's distributed checkpointing saves and loads on any number of ranks; what was loaded lies so
until the next step takes it to the owners. In the mesh of a hybrid (HSDP), every row of shards does all of this for
itself.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from learned_opt.across import Across
from learned_opt.batch_layout import batches_of
from learned_opt.batches import BatchLayout
from learned_opt.buffers import Buffers, StateByTensor
from learned_opt.functional import computing_dtype
from learned_opt.params import NamedParam
from learned_opt.rules.base import UpdateRule
from learned_opt.spread import Exchange, Spread, as_shards, is_sharded, placed, rows, rows_of, spread_of
from learned_opt.symmetry import Symmetry, independent
from learned_opt.text import listed

OWNER = "owner"  # in the state of a tensor on the ranks that do not own it: which one does
ABSENT, SHARDED, WHOLE, ODD = range(4)  # forms of a tensor's state

NetworkNumbers = dict[torch.device, dict[str, Tensor]]


def create_shards(
    rule: UpdateRule, params: Mapping[str, Tensor], state: StateByTensor, dtype: torch.dtype | None = None
) -> None:
    """As :func:`learned_opt.buffers.create_slots`, in shards."""
    new = {n: p for n, p in params.items() if not state.get(p)}
    spread = spread_of(new.values())
    if spread is None:
        return
    for n, slots in _slots(rule, new, computing_dtype(params.values()), dtype).items():
        p: Any = new[n]
        cut = {k: (len(rows(x.shape, spread)), *x.shape[1:]) if x.ndim else () for k, x in slots.items()}
        zeros = {k: torch.zeros(cut[k], dtype=x.dtype, device=p.device) for k, x in slots.items()}
        state[p] = {k: as_shards(x, slots[k].shape, spread) for k, x in zeros.items()}


def _slots(
    rule: UpdateRule, params: Mapping[str, Tensor], wide: torch.dtype, dtype: torch.dtype | None
) -> dict[str, dict[str, Tensor]]:
    """The slots of whole tensors, without data."""
    like = {n: torch.empty(p.shape, dtype=wide, device="meta") for n, p in params.items()}
    return Buffers(rule, like, independent(like), dtype).slots if like else {}


# ------------------------------------------------------------------------------------------- owners
class Shards(Across):
    """Who owns which of an optimizer's tensors, and how they get there and back. All ranks do all of this together.

    Args:
        spread: how they are sharded.
        entries: the tensors, under the symmetry's names.
        symmetry: of these, and maybe others.
        state: of the optimizer; what it holds of these tensors is taken to their owners.
        rule: whose state.
        dtype: as of :class:`Buffers`.

    Raises:
        RuntimeError: the state is not the same kind of thing on all ranks.
    """

    def __init__(
        self,
        spread: Spread,
        entries: list[NamedParam],
        symmetry: Symmetry,
        state: StateByTensor,
        rule: UpdateRule,
        dtype: torch.dtype | None,
    ) -> None:
        self.spread, self.symmetry, self.group = spread, symmetry, spread.group
        self._exchange = Exchange(spread, entries[0].param.device)
        self.rank, self.count = self._exchange.rank, self._exchange.count
        self.params: dict[str, Any] = {e.name: e.param for e in entries}
        self.wide = computing_dtype(self.params.values())
        self.with_state = [n for n, p in self.params.items() if state.get(p)]
        self.slots = _slots(rule, {n: self.params[n] for n in self.with_state}, self.wide, dtype)
        layout = batches_of(symmetry, tuple(self.with_state), torch.device("cpu"))
        self.steps = dict.fromkeys(layout.members, 0)
        self.owner = _owners(layout, self.params, self.slots, self.count)
        ranks = sorted(set(self.owner.values()))
        self.all_own = len(ranks) == self.count
        self.owners = self.group if self.all_own else _subgroup(self.group, ranks)
        self._ages: set[int] = set()
        self._take(state)

    def fit(self, entries: list[NamedParam], symmetry: Symmetry, state: StateByTensor) -> bool:
        """Whether these are still the tensors, the symmetry, and the tensors with state."""
        same = symmetry is self.symmetry and len(entries) == len(self.params)
        return (
            same
            and all(self.params.get(e.name) is e.param for e in entries)
            and [e.name for e in entries if state.get(e.param)] == self.with_state
        )

    def step(
        self, entries: list[NamedParam], moving: list[NamedParam], state: StateByTensor, run: Callable[..., None]
    ) -> None:
        """A step of ``moving``: ``run(entries, moving, symmetry, state, across)`` on what this rank owns, whole.

        Args:
            entries: all the tensors.
            moving: those that are to move, the same on all ranks.
            state: of the optimizer.
            run: the step of one process.
        """
        local = {("weight", n): p.to_local().to(self.wide) for n, p in self.params.items()}
        local |= {("grad", e.name): rows_of(e.param, gradient=True).to(self.wide) for e in moving}
        shapes, owner = {at: self.params[at[1]].shape for at in local}, {at: self.owner[at[1]] for at in local}
        found = self._exchange.gathered(local, shapes, owner)
        del local
        whole = {n: x for (what, n), x in found.items() if what == "weight"}
        for n in whole:
            whole[n].grad = found.get(("grad", n))
        del found
        self._ages = {self.steps[e.name] + 1 for e in moving if e.name in self.steps}
        own = {e.name: e._replace(param=whole[e.name]) for e in entries if e.name in whole}
        slots = {own[n].param: state[self.params[n]] for n in own if n in self.slots}
        if own:
            run(list(own.values()), [own[e.name] for e in moving if e.name in own], self.symmetry, slots, self)
        for n in own.keys() & self.slots.keys():
            state[self.params[n]] = slots[own[n].param]
        form = {e.name: (e.param.shape, self.wide) for e in moving}
        moved = {n: x.detach() for n, x in whole.items() if n in form}
        for n, x in self._exchange.scattered(moved, form, self.owner).items():
            self.params[n].to_local().copy_(x)
        self.steps = {n: t + (n in form) for n, t in self.steps.items()}

    # -- what the rule asks of the whole network
    def names(self, own: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n for n in self.params if n in self.symmetry.specs)

    def ages(self, own: set[int]) -> set[int]:
        return own | self._ages

    def total(self, x: Tensor) -> Tensor:
        return self._exchange.total(x, self.owners)

    def most(self, x: Tensor) -> Tensor:
        return self._exchange.total(x, self.owners, dist.ReduceOp.MAX)

    # -- state between steps
    def _take(self, state: StateByTensor) -> None:
        """What lies in shards, or whole on every rank, to the owners."""
        form = {n: _form(state[self.params[n]], self.slots[n]) for n in self.with_state}
        codes = torch.tensor([[x, -x] for x in form.values()], dtype=torch.float64).reshape(-1)
        highest, lowest = self.spread.on_all(codes).view(-1, 2).unbind(1)
        odd = [n for n, a, b in zip(form, highest.tolist(), lowest.tolist(), strict=True) if a != -b or a == ODD]
        if odd:
            raise RuntimeError(
                f"NFNOpt has the state of {listed(odd)} on some ranks alone. Save with state_dict() on all ranks, as "
                "torch.distributed.checkpoint does, and load that on all ranks."
            )
        for n in self.steps:
            self.steps[n] = int(state[self.params[n]]["step"]) if form[n] != ABSENT else 0
        cut: dict[tuple[str, str], Any] = {
            (n, k): placed(state[self.params[n]][k], self.spread)
            for n in self.with_state
            for k, like in self.slots[n].items()
            if form[n] == SHARDED and like.ndim
        }
        shapes, owner = {at: x.shape for at, x in cut.items()}, {at: self.owner[at[0]] for at in cut}
        whole = self._exchange.gathered({at: x.to_local() for at, x in cut.items()}, shapes, owner)
        del cut
        for n in self.with_state:
            slots = state[self.params[n]]
            if self.owner[n] == self.rank:
                state[self.params[n]] = slots | {k: whole[n, k] for k in self.slots[n] if (n, k) in whole}
            else:
                state[self.params[n]] = self._others(n, slots) | {OWNER: self.owner[n]}

    def at_rest(self, state: StateByTensor) -> dict[Any, dict[str, Any]]:
        """The optimizer's state with that of the owners in shards on all ranks."""
        at = [(n, k) for n in self.with_state for k in self.slots[n]]
        whole: dict[tuple[str, str], Tensor] = {}
        for n, k in at:
            if self.owner[n] == self.rank:
                like = self.slots[n][k]
                kept = state[self.params[n]].get(k)
                whole[n, k] = torch.zeros_like(like, device=self.params[n].device) if kept is None else kept
        numbers = [a for a in at if not self.slots[a[0]][a[1]].ndim]
        own = [float(whole[a]) if a in whole else 0.0 for a in numbers]
        told = self._exchange.total(torch.tensor(own, dtype=torch.float64))
        form = {(n, k): (self.slots[n][k].shape, self.slots[n][k].dtype) for n, k in at if self.slots[n][k].ndim}
        found = self._exchange.scattered(whole, form, {a: self.owner[a[0]] for a in form})
        for (n, k), x in zip(numbers, told.tolist(), strict=True):
            found[n, k] = torch.tensor(x, dtype=self.slots[n][k].dtype, device=self.params[n].device)
        rest = {self.params[n]: self._others(n, state[self.params[n]]) for n in self.with_state}
        for (n, k), x in found.items():
            rest[self.params[n]][k] = as_shards(x, self.slots[n][k].shape, self.spread)
        return {**state, **rest}

    def _others(self, name: str, slots: Mapping[str, Any]) -> dict[str, Any]:
        """What a wrapper of the optimizer keeps in the state of a tensor."""
        return {k: x for k, x in slots.items() if k not in self.slots[name] and k != OWNER}

    def told(self, numbers: NetworkNumbers) -> NetworkNumbers:
        """The numbers of the whole network, on all ranks: one that owns nothing has none."""
        if self.all_own:
            return numbers
        box = [{k: x.cpu() for own in numbers.values() for k, x in own.items()}]
        dist.broadcast_object_list(box, group=self.group, group_src=0)  # the first to be given a tensor
        device = next(iter(self.params.values())).device
        return {device: {k: x.to(device) for k, x in box[0].items()}} if box[0] else {}


def _form(slots: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> int:
    """Whether a tensor's state is in shards, whole, absent, or anything else."""
    own = {k: slots[k] for k in wanted if k in slots}
    if not own and OWNER not in slots:
        return ABSENT
    if own.keys() != wanted.keys() or any(own[k].shape != x.shape for k, x in wanted.items()):
        return ODD
    sharded = {is_sharded(own[k]) for k, x in wanted.items() if x.ndim}
    return ODD if len(sharded) > 1 else SHARDED if True in sharded else WHOLE


def _owners(
    layout: BatchLayout, params: Mapping[str, Tensor], slots: Mapping[str, Mapping[str, Tensor]], count: int
) -> dict[str, int]:
    """The owner of every tensor, by the bytes of its state: the largest first, to whom has least.

    Those without state (frozen, or without a gradient so far) go to ranks that step others: the rule runs there.
    """
    bias_of = {n: bias for b in layout.batches for n, bias in zip(b.names, b.biases, strict=False)}
    units = [(n, bias_of[n]) if n in bias_of else (n,) for n in layout.members]
    bytes_of = {n: sum(x.numel() * x.element_size() for x in own.values()) for n, own in slots.items()}
    load, owner = dict.fromkeys(range(count), 0), dict[str, int]()

    def assign(units: Collection[tuple[str, ...]], sizes: Mapping[str, int]) -> None:
        for unit in sorted(units, key=lambda u: -sum(sizes[n] for n in u)):
            rank = min(load, key=load.__getitem__)
            load[rank] += sum(sizes[n] for n in unit)
            owner.update(dict.fromkeys(unit, rank))

    assign(units, bytes_of)
    load = {rank: load[rank] for rank in sorted(set(owner.values()))}
    assign([(n,) for n in params if n not in owner], {n: p.numel() for n, p in params.items()})
    return owner


def _subgroup(group: "dist.ProcessGroup", ranks: list[int]) -> "dist.ProcessGroup | None":
    """Of some ranks of a group; None on the others."""
    if dist.get_rank(group) not in ranks:
        return None
    everyone = dist.get_process_group_ranks(group)
    found: Any = dist.new_group([everyone[r] for r in ranks], use_local_synchronization=True)
    return found
