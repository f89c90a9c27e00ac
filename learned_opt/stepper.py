"""Steps of tensors by a rule, and where their state lies: in buffers of each device, or with the owners of shards."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learned_opt.across import HERE, Across
from learned_opt.buffers import Buffers, StateByTensor, left_behind, shared
from learned_opt.functional import apply_rule, stepped
from learned_opt.gradients import to_descend
from learned_opt.params import NamedParam
from learned_opt.rules.base import UpdateRule
from learned_opt.sharded import NetworkNumbers, Shards
from learned_opt.spread import Spread
from learned_opt.symmetry import Symmetry


class Stepper:
    """Takes the steps of an optimizer.

    Args:
        dtype: ``state_dtype`` of :class:`learned_opt.NFNOpt`.
        loaded: numbers of the whole network that were loaded, for buffers that are to be made.
    """

    def __init__(self, dtype: torch.dtype | None, loaded: NetworkNumbers | None = None) -> None:
        self.dtype, self.loaded = dtype, loaded or {}
        self.buffers: dict[torch.device, Buffers] = {}
        self._shards: Shards | None = None

    def step(
        self,
        rule: UpdateRule,
        entries: list[NamedParam],
        moving: list[NamedParam],
        symmetry: Symmetry,
        state: StateByTensor,
        groups: Sequence[Mapping[str, Any]],
        spread: Spread | None,
    ) -> None:
        """Update ``moving``.

        Args:
            rule: by which.
            entries: all tensors, under the symmetry's names. Those not in ``moving`` are read (the frame needs them),
                but keep their weights, state and step count.
            moving: the entries that have a usable gradient; these are updated.
            symmetry: of these, and maybe others.
            state: of the optimizer, where these tensors have their slots.
            groups: of the optimizer.
            spread: how the tensors are sharded; None: they are not.
        """

        run = partial(self._run, rule, groups)
        for device in {e.param.device: None for e in moving}:
            here = [e for e in entries if e.param.device == device and e.param.numel()]
            chosen = [e for e in moving if e.param.device == device]
            if spread:
                self._owned(rule, spread, here, symmetry, state).step(here, chosen, state, run)
            else:
                run(here, chosen, symmetry, state)

    def _run(
        self,
        rule: UpdateRule,
        groups: Sequence[Mapping[str, Any]],
        entries: list[NamedParam],
        moving: list[NamedParam],
        symmetry: Symmetry,
        state: StateByTensor,
        across: Across = HERE,
    ) -> None:
        """A step of whole tensors of one device."""
        grads = {e.name: to_descend(e) for e in moving}
        device, own = entries[0].param.device, {e.name: e.param for e in entries if state.get(e.param)}
        old = self.buffers.get(device) or left_behind(self.buffers, {p.device for g in groups for p in g["params"]})
        buffers = shared(rule, own, symmetry, state, old, self.loaded.get(device), self.dtype)
        self.buffers[device] = buffers
        updates, new = apply_rule(
            rule,
            {e.name: e.param for e in entries if not e.param.is_complex()},
            grads,
            buffers.state,
            symmetry,
            total_steps=groups[0]["total_steps"],
            weight_decay={e.name: e.group["weight_decay"] for e in moving},
            names=buffers.names,
            ages=across.ages(buffers.next_ages(grads)),
            in_place=True,
            across=across,
        )
        buffers.take(new, moved=grads)
        _add([e.param for e in moving], [updates[e.name] for e in moving], [e.group["lr"] for e in moving])

    def _owned(
        self, rule: UpdateRule, spread: Spread, entries: list[NamedParam], symmetry: Symmetry, state: StateByTensor
    ) -> Shards:
        """Who owns which of the sharded tensors; its state is there then."""
        if self._shards is None or not self._shards.fit(entries, symmetry, state):
            state.update(self.at_rest(state))
            self.buffers = {}
            self._shards = Shards(spread, entries, symmetry, state, rule, self.dtype)
        return self._shards

    @property
    def sharded(self) -> bool:
        """Whether the state lies with the owners of shards."""
        return self._shards is not None

    def numbers(self) -> NetworkNumbers:
        """Of the whole network, by device."""
        return {**self.loaded, **{d: b.state["network"] for d, b in self.buffers.items() if "network" in b.state}}

    def at_rest(self, state: StateByTensor) -> dict[Any, dict[str, Any]]:
        """The optimizer's state as every rank has its tensors: of sharded ones in shards."""
        if self._shards is None:
            return dict(state)
        self.loaded = self._shards.told(self.numbers())
        return self._shards.at_rest(state)


def _add(params: list[Tensor], updates: list[Tensor], rates: list[float | Tensor]) -> None:
    """``params += rates * updates``, in place."""
    same = bool(params) and all(p.dtype == u.dtype for p, u in zip(params, updates, strict=True))
    if same and not isinstance(rates[0], Tensor) and rates.count(rates[0]) == len(rates):
        torch._foreach_add_(params, updates, alpha=rates[0])
        return
    for param, update, lr in zip(params, updates, rates, strict=True):
        param.copy_(stepped(param, update, lr))
