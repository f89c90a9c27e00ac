"""State in shared buffers, of which ``optimizer.state[p]`` are views.

A step works on batches (:mod:`learned_opt.batches`); torch, and whoever saves or moves an optimizer's state, wants
slots by parameter. Both see the same memory here. The slots of a parameter depend on its shape alone: torch's
distributed checkpointing has state made, to be filled with what was saved, before a symmetry can have been inferred.
"""

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from learned_opt.batch_layout import batches_of
from learned_opt.batches import FlatBatch, TensorBatch, has_matrix, moment_axes, root_dtype
from learned_opt.functional import computing_dtype
from learned_opt.rules.base import State, UpdateRule
from learned_opt.symmetry import Symmetry, independent

TENSOR = "tensor"  # the key of a state's vectors with a number for every tensor

StateByTensor = MutableMapping[Any, dict[str, Tensor]]  # as ``optimizer.state``


class Buffers:
    """The state of a rule for some tensors of one device.

    Args:
        rule: whose state.
        params: the tensors that have state, by the symmetry's names.
        symmetry: of these, and maybe others.
        dtype: of what has as many entries as the weights, and of roots; None: as the rule has them. Second moments stay
            as they are: what is added to them is small beside them.

    Attributes:
        state: as the rule takes it.
        slots: views of it, by tensor and slot.
    """

    def __init__(
        self, rule: UpdateRule, params: Mapping[str, Tensor], symmetry: Symmetry, dtype: torch.dtype | None = None
    ) -> None:
        self.rule, self.names, self.symmetry, self.dtype = rule, tuple(params), symmetry, dtype
        self._clock, self._steps = 0, dict.fromkeys(self.names, 0)  # of the network and of every tensor, without a read
        some = next(iter(params.values()))
        wide = self.wide = computing_dtype(params.values())
        like = {n: p.detach() if p.dtype == wide else torch.empty_like(p, dtype=wide) for n, p in params.items()}
        self.state: State = rule.init(like, symmetry)
        self.slots: dict[str, dict[str, Tensor]] = {n: {} for n in self.names}
        if TENSOR not in self.state:  # a rule that goes tensor by tensor
            self.slots |= self.state
            return
        self.layout = batches_of(symmetry, self.names, some.device)
        if dtype is not None:
            for b in self.layout.all:
                own = self.state[b.key]
                own |= {k: x.to(dtype) for k, x in own.items() if k in ("m", "last_update") or k[:-1] == "root"}
        for b in self.layout.all:
            self._share(b, self.state[b.key])
        places = {n: i for i, n in enumerate(self.layout.members)}
        places |= {bias: places[n] for b in self.layout.batches for n, bias in zip(b.names, b.biases, strict=False)}
        for n in self.names:
            self.slots[n] |= {k: x[places[n]] for k, x in self.state[TENSOR].items()}

    def _share(self, b: TensorBatch | FlatBatch, own: dict[str, Tensor]) -> None:
        """Hand out views; where a slot holds more than the rule reads (moments read as a diagonal), make it first."""
        for k in ("m", "v", "last_update"):
            if k in own:
                for n, x in b.scatter(own[k]).items():
                    self.slots[n][k] = x
        if isinstance(b, FlatBatch):
            for n, shape in zip(b.names, b.shapes, strict=True):
                if len(shape) == 1:
                    self.slots[n]["snr"] = own["m"].new_zeros(())
                for i in moment_axes(shape):
                    self._moments(n, i, own["m"].new_zeros(()), shape[i])
            return
        if b.biases:
            for n, x in zip(b.biases, own["v_bias"].unbind(), strict=True):
                self.slots[n]["v"] = x
            for n, x in zip(b.biases, own["snr"].unbind(), strict=True):
                self.slots[n]["snr"] = x
        for i in moment_axes(b.shape):
            self._axis(b, i, own)

    def _axis(self, b: TensorBatch, i: int, own: dict[str, Tensor]) -> None:
        d, n = b.shape[i], len(b.names)
        if f"moment{i}" not in own and has_matrix(d):
            some = own["m"]
            wide = torch.promote_types(some.dtype, torch.float32)
            whole = some.new_zeros(n, d, d // 2 + 1, dtype=wide)
            if f"diag{i}" in own:
                own[f"diag{i}"] = whole[..., 0]
            made = {f"moment{i}": whole, f"root{i}": some.new_zeros(n, d, d, dtype=self.dtype or root_dtype(d, wide))}
        elif f"moment{i}" in own:
            made = {f"moment{i}": own[f"moment{i}"], f"root{i}": own[f"root{i}"][:, :d, :d]}
        else:
            made = {f"diag{i}": own.get(f"diag{i}", own["m"].new_zeros(n, d))}
        for k, x in made.items():
            for name, view in zip(b.names, x.unbind(), strict=True):
                self.slots[name][k] = view

    def _moments(self, name: str, i: int, like: Tensor, d: int) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        if has_matrix(d):
            self.slots[name][f"moment{i}"] = like.new_zeros(d, d // 2 + 1, dtype=wide)
            self.slots[name][f"root{i}"] = like.new_zeros(d, d, dtype=self.dtype or root_dtype(d, wide))
        else:
            self.slots[name][f"diag{i}"] = like.new_zeros(d, dtype=wide)

    def fill(self, slots: Mapping[str, Mapping[str, Tensor]], network: Mapping[str, Tensor] | None) -> None:
        """Copy what other tensors hold by these names, and the network's numbers.

        A tensor of which some slot is missing, or has another shape, begins anew (another tensor took its place, or
        someone else keeps slots of the same name): an age and averages that do not belong together mislead. A bias has
        the age of its matrix, and begins anew with it.
        """
        whole = {n: all(_fits(slots.get(n, {}).get(k), x) for k, x in own.items()) for n, own in self.slots.items()}
        shared = self.state[TENSOR].keys() if TENSOR in self.state else ()
        matrix_of = {
            bias: n for b in (self.layout.batches if shared else ()) for n, bias in zip(b.names, b.biases, strict=False)
        }
        for n, own in self.slots.items():
            matrix = matrix_of.get(n, n)
            if (
                whole[n]
                and whole[matrix]
                and not ("step" in shared and float(slots[n]["step"]) > float(slots[matrix]["step"]))
            ):
                for k, x in own.items():
                    if matrix == n or k not in shared:
                        x.copy_(slots[n][k])
        if TENSOR in self.state:
            for k, x in (network or {}).items():
                if k in self.state["network"] and self.state["network"][k].shape == x.shape:
                    self.state["network"][k] = x.to(self.state["network"][k])
            self.rule.derive(self.layout, self.state)
            self._clock = int(self.state["network"]["clock"])
            self._steps = dict(zip(self.layout.members, map(int, self.state[TENSOR]["step"].tolist()), strict=True))

    def next_ages(self, moving: Collection[str]) -> set[int]:
        """Values of the clocks at a step of these tensors; those of others do not say what is due."""
        return {self._clock + 1, *(t + 1 for n, t in self._steps.items() if n in moving)}

    def holds(self, symmetry: Symmetry, slots: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> bool:
        """Whether these tensors' slots are this one's views, for computing in this dtype."""
        return (
            symmetry is self.symmetry
            and dtype == self.wide
            and slots.keys() == self.slots.keys()
            and all(slots[n].get(k) is x for n, own in self.slots.items() for k, x in own.items())
        )

    def take(self, new: State, moved: Collection[str]) -> None:
        """The next state, after a step of these tensors: what was not computed in place is copied."""
        if TENSOR not in new:
            for n, slots in new.items():
                for k, x in slots.items():
                    self.slots[n][k].copy_(x)
            return
        for key, slots in new.items():
            old = self.state[key]
            for k, x in slots.items():
                if x is not old[k]:
                    if key == "network" or "scale" in k:
                        old[k] = x
                    else:
                        old[k].copy_(x)
        self._clock += 1
        self._steps = {n: t + (n in moved) for n, t in self._steps.items()}


def create_slots(
    rule: UpdateRule, params: Mapping[str, Tensor], state: StateByTensor, dtype: torch.dtype | None = None
) -> None:
    """Slots in ``state`` for those of these tensors that have none; a step puts them into shared buffers."""
    new = {n: p.detach() for n, p in params.items() if not state.get(p)}
    if new:
        for n, slots in Buffers(rule, new, independent(new), dtype).slots.items():
            state[params[n]] = slots


def shared(
    rule: UpdateRule,
    params: Mapping[str, Tensor],
    symmetry: Symmetry,
    state: StateByTensor,
    old: Buffers | None,
    network: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None = None,
) -> Buffers:
    """The old buffers, made anew where these tensors, or their slots in ``state``, are others than theirs.

    Args:
        rule: as of :class:`Buffers`.
        params: the same.
        symmetry: the same.
        state: each tensor has its slots there, views of the buffers in the end.
        old: None: there are none yet.
        network: the network's numbers that were loaded where there are none yet.
        dtype: as of :class:`Buffers`.
    """
    slots = {n: state[p] for n, p in params.items()}
    if old is not None and old.holds(symmetry, slots, computing_dtype(params.values())):
        return old
    buffers = Buffers(rule, params, symmetry, dtype)
    buffers.fill(slots, network if old is None else old.state.get("network"))
    for n, p in params.items():
        state[p] = {**slots[n], **buffers.slots[n]}
    return buffers


def left_behind(buffers: dict[torch.device, Buffers], devices: Collection[torch.device]) -> Buffers | None:
    """Take out the buffers of a device that the tensors have left for one of ``devices``; None if there are none."""
    gone = [device for device in buffers if device not in devices]
    return buffers.pop(gone[0]) if gone else None


def _fits(old: Any, new: Tensor) -> bool:
    return isinstance(old, Tensor) and old.shape == new.shape
