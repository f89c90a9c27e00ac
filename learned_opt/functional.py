"""The one numerics path: the pure step that NFNOpt, ``torch.func``, ``higher`` and meta-training take."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from learned_opt.across import HERE, Across
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.symmetry import Symmetry, independent

Init = Callable[[Weights], State]
Update = Callable[..., tuple[Weights, State]]


def apply_rule(
    rule: UpdateRule,
    params: Weights,
    grads: Weights,
    state: State,
    symmetry: Symmetry,
    *,
    total_steps: float | Tensor | None = None,
    weight_decay: float | None | Mapping[str, float | None] = None,
    names: tuple[str, ...] | None = None,
    ages: Collection[int] | None = None,
    in_place: bool = False,
    weights: Weights | None = None,
    across: Across = HERE,
) -> tuple[Weights, State]:
    """``rule(params, grads, state, symmetry)`` in float32, or float64 if the state is. Pure, unless ``in_place``.

    Arguments and result are those of :meth:`UpdateRule.forward`. ``weights``, a dict like ``rule.named_parameters()``,
    replaces the rule's own parameters.
    """
    dtype = computing_dtype(params.values() if names is None else [params[n] for n in names])
    device = next(iter(params.values())).device
    own = {**dict(rule.named_parameters()), **dict(rule.named_buffers())} if weights is None else weights
    fits = all(t.device == device and t.dtype == dtype for t in own.values())
    arguments = (
        {n: p.to(dtype) for n, p in params.items()},
        {n: g.to(dtype) for n, g in grads.items()},
        state,
        symmetry,
    )
    options = {
        "total_steps": total_steps,
        "weight_decay": weight_decay,
        "names": names,
        "ages": ages,
        "in_place": in_place,
    } | ({} if across is HERE else {"across": across})
    if weights is None and fits:
        return rule(*arguments, **options)
    cast = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in own.items()}
    return torch.func.functional_call(rule, cast, arguments, options)


def computing_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """In which steps of these tensors are computed: float64 if one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def stepped(param: Tensor, update: Tensor, lr: float | Tensor) -> Tensor:
    """``param + lr * update`` in the update's dtype, then rounded to the parameter's. Pure."""
    if isinstance(lr, Tensor):
        update, lr = update * lr.to(update.device).reshape(()), 1.0
    return torch.add(param.to(update.dtype), update, alpha=lr).to(param.dtype)


def functional(
    rule: UpdateRule,
    symmetry: Symmetry | None = None,
    *,
    lr: float | Tensor = 1.0,
    weight_decay: float | None | Mapping[str, float | None] = None,
    total_steps: float | Tensor | None = None,
    maximize: bool = False,
) -> tuple[Init, Update]:
    """An optimizer as two pure functions over dicts of weights, for ``torch.func`` loops.

    ::

        init, update = functional(make_rule("auto_lr"), infer_symmetry(model, x), total_steps=100)
        state = init(params)
        params, state = update(params, grads, state)  # differentiable, runs under vmap

    Args:
        rule: an update rule, such as ``optimizer.rule`` of an NFNOpt.
        symmetry: of the weights; None: every axis by itself.
        lr: multiplies the update.
        weight_decay: decoupled. A step subtracts ``lr * rate * weight_decay * w``, where the rule sets ``rate`` (about
            0.01, decaying). One number, or one per name. None: the rule's own decay.
        total_steps: the horizon, if it is known.
        maximize: ascend instead.

    Returns:
        ``init(params) -> state`` and ``update(params, grads, state, *, weights=None, lr=lr) -> (params, state)``.
        ``grads`` may lack weights: these do not move. ``weights`` is a dict like ``rule.named_parameters()``; without
        it the rule's own parameters are used, which receive gradients too where they require them. Non-finite gradients
        propagate: what a loop does about them depends on the data, which a pure function cannot.

    Raises:
        SymmetryError: by ``init`` and ``update``, if the symmetry does not describe the weights.
    """
    known: dict[Any, Symmetry] = {}  # by names and shapes: rules cache what they derive from a symmetry

    def fitting(params: Weights) -> Symmetry:
        signature = tuple((n, p.shape) for n, p in params.items())
        if signature not in known:
            known[signature] = symmetry or independent(params)
            known[signature].validate(params)
        return known[signature]

    def init(params: Weights) -> State:
        dtype = computing_dtype(params.values())
        return rule.init({n: p.to(dtype) for n, p in params.items()}, fitting(params))

    def update(
        params: Weights, grads: Weights, state: State, *, weights: Weights | None = None, lr: float | Tensor = lr
    ) -> tuple[Weights, State]:
        updates, state = apply_rule(
            rule,
            params,
            {n: -g for n, g in grads.items()} if maximize else grads,
            state,
            fitting(params),
            total_steps=total_steps,
            weight_decay=weight_decay,
            weights=weights,
        )
        return {**params, **{n: stepped(params[n], updates[n], lr) for n in grads}}, state

    return init, update
