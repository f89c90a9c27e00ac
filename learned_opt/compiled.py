"""A rule's step as one graph, compiled by torch's inductor: ``NFNOpt(compile=True)``.

A step is hundreds of small operations, and on networks of a few small tensors much of its time goes into calling them.
What it does depends on names, shapes and options, never on values: what is due at some steps only is computed at all
and masked, but for the roots of second moments, which are one operator. So a trace of one step holds for all.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from learned_opt.functional import computing_dtype
from learned_opt.layout import ByIdentity
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.symmetry import Symmetry

MOST = 8  # graphs that an optimizer compiles

log = logging.getLogger(__name__)
Result = tuple[Weights, State]
Names = tuple[tuple[str, ...], ...]


class Compiled:
    """A function like ``apply_rule``, compiled for every kind of arguments that it gets twice in a row.

    A step that is unlike the others (one tensor sits it out) thus compiles nothing and runs as it is. So does every
    step once a compilation has failed, which a warning tells.

    Args:
        apply: of the form of :func:`learned_opt.functional.apply_rule`, and pure.
    """

    def __init__(self, apply: Callable[..., Result]) -> None:
        self._apply = apply
        self._graphs: dict[Any, Callable[..., list[Tensor]]] = {}
        self._last: Any = None
        self._works = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self._apply,)  # a copy compiles for itself

    def __call__(
        self,
        rule: UpdateRule,
        params: Weights,
        grads: Weights,
        state: State,
        symmetry: Symmetry,
        *,
        total_steps: float | Tensor | None,
        weight_decay: Mapping[str, float | None],
        names: tuple[str, ...],
        ages: Collection[int],
        in_place: bool,
    ) -> Result:
        """As ``apply``. Compiles anew where names, shapes, ``rule``, ``symmetry`` or ``weight_decay`` are new.

        A graph serves every age: in it, what is due is a mask. It writes to none of its inputs.
        """
        apart = {"names": names, "ages": ages, "in_place": in_place}
        theta = {n: t.detach() for n, t in [*rule.named_parameters(), *rule.named_buffers()]}
        dtype = computing_dtype([params[n] for n in names])
        horizon = {} if total_steps is None else {"total_steps": torch.as_tensor(total_steps, dtype=dtype)}
        inputs, groups = _flat([params, grads, theta, horizon, *state.values()])

        def step(*inputs: Tensor) -> list[Tensor]:
            params, grads, theta, horizon, *slots = _grouped(inputs, groups)
            told = {"total_steps": horizon.get("total_steps"), "weight_decay": weight_decay, "weights": theta}
            arguments = params, grads, dict(zip(state, slots, strict=True)), symmetry
            updates, new = self._apply(rule, *arguments, **told, names=names)
            return _flat([{n: updates[n] for n in grads}, *({k: new[n][k] for k in s} for n, s in state.items())])[0]

        kinds = tuple((x.shape, x.dtype, x.device, x.stride()) for x in inputs)
        key = (groups, names, tuple(state), kinds, tuple(weight_decay.items()), rule, ByIdentity(symmetry))
        again, self._last = key == self._last, key
        if key not in self._graphs and again and self._works and len(self._graphs) < MOST:
            self._compile(key, step, inputs)
        if key not in self._graphs:
            told = {"total_steps": total_steps, "weight_decay": weight_decay}
            return self._apply(rule, params, grads, state, symmetry, **told, **apart)
        outputs = self._graphs[key](*inputs)
        updates, *new = _grouped(outputs, (tuple(grads), *(tuple(s) for s in state.values())))
        return updates, dict(zip(state, new, strict=True))

    def _compile(self, key: Any, step: Callable[..., list[Tensor]], inputs: list[Tensor]) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx  # here, as it takes long to import

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, of what it deprecates in itself
                graph = torch.compile(make_fx(step)(*inputs), dynamic=False)
                graph(*inputs)  # the compiler does its work in the first call
            self._graphs[key] = graph
        except Exception as error:  # of any kind: a compiler that is missing, an operation that it lacks
            self._works = False
            log.debug("compilation failed", exc_info=True)
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"NFNOpt(compile=True): steps could not be compiled ({type(error).__name__}: {reason}); they run as "
                "they are, which is slower and else the same. torch.compile needs a C++ compiler, and Triton on a GPU.",
                stacklevel=6,
            )


def _flat(groups: Iterable[Mapping[str, Tensor]]) -> tuple[list[Tensor], Names]:
    """All tensors one after the other, and the names of every group."""
    groups = list(groups)
    return [x for group in groups for x in group.values()], tuple(map(tuple, groups))


def _grouped(tensors: Iterable[Tensor], names: Names) -> list[dict[str, Tensor]]:
    """Inverse of :func:`_flat`."""
    rest = iter(tensors)
    return [dict(zip(group, rest, strict=False)) for group in names]
