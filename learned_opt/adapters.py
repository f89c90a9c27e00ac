"""The update rules in differentiable training loops: functions for ``torch.func``, ``higher``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from learned_opt.optimizer import NFNOpt, apply_rule, stepped
from learned_opt.params import ParamMap
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.symmetry import Symmetry, independent

Init = Callable[[Weights], State]
Update = Callable[..., tuple[Weights, State]]


def functional(
    rule: UpdateRule | NFNOpt,
    symmetry: Symmetry | None = None,
    *,
    lr: float | Tensor = 1.0,
    weight_decay: float | Mapping[str, float] = 0.0,
    total_steps: float | Tensor | None = None,
    maximize: bool = False,
) -> tuple[Init, Update]:
    """An optimizer as two pure functions over dicts of weights, for ``torch.func`` loops.

    ::

        init, update = functional(make_rule("nfn"), infer_symmetry(model, x), total_steps=100)
        state = init(params)
        params, state = update(params, grads, state)  # differentiable, runs under vmap
        params, state = update(params, grads, state, theta=theta)  # with another theta

    Args:
        rule: an update rule; or an :class:`NFNOpt`, whose rule and symmetry (once inferred) are taken, and
            whose options (of its only group) replace the defaults below.
        symmetry: of the weights; None: every axis by itself.
        lr: multiplies the update.
        weight_decay: decoupled, per step at ``lr=1``; one number, or one per name.
        total_steps: the horizon, if it is known.
        maximize: ascend instead.

    Returns:
        ``init(params) -> state`` and ``update(params, grads, state, *, theta=None, lr=lr) ->
        (params, state)``. ``grads`` may lack weights: these do not move. ``theta`` is a dict like
        ``rule.named_parameters()``; without it the rule's own parameters are used, which receive
        gradients too where they require them. Non-finite gradients propagate: what a loop does
        about them depends on the data, which a pure function cannot.

    Raises:
        ValueError: an NFNOpt with several groups: they have no common options.
        SymmetryError: at the first update, if the symmetry does not describe the weights.
    """
    if isinstance(rule, NFNOpt):
        if len(rule.param_groups) > 1:
            raise ValueError(
                f"the optimizer has {len(rule.param_groups)} parameter groups, each with its own "
                "options. Pass rule and options: functional(optimizer.rule, symmetry, lr=...)."
            )
        group = rule.param_groups[0]
        lr, weight_decay, total_steps = group["lr"], group["weight_decay"], group["total_steps"]
        maximize = group["maximize"]
        symmetry = symmetry or (rule._known.symmetry if isinstance(rule._known, ParamMap) else None)
        rule = rule.rule
    # by names and shapes; kept, because rules cache what they derive from a symmetry
    known: dict[Any, Symmetry] = {}

    def fitting(params: Weights) -> Symmetry:
        signature = tuple((n, p.shape) for n, p in params.items())
        if signature not in known:
            known[signature] = symmetry or independent(params)
            known[signature].validate(params)
        return known[signature]

    def update(
        params: Weights,
        grads: Weights,
        state: State,
        *,
        theta: Weights | None = None,
        lr: float | Tensor = lr,
    ) -> tuple[Weights, State]:
        updates, state = apply_rule(
            rule,
            params,
            {n: -g for n, g in grads.items()} if maximize else grads,
            state,
            fitting(params),
            total_steps=total_steps,
            weight_decay=weight_decay,
            theta=theta,
        )
        moved = {n: stepped(params[n], updates[n], lr) for n in grads}
        return {**params, **moved}, state

    return rule.init, update


def register_higher() -> None:
    """Let ``higher`` differentiate through :class:`NFNOpt`. Call it once; again does nothing.

    ::

        register_higher()
        optimizer = NFNOpt(model.named_parameters(), symmetry=infer_symmetry(model, x))
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel,
        diffopt):
            diffopt.step(loss(fmodel))
            loss(fmodel).backward()          # reaches model.parameters() and diffopt.theta

    ``diffopt.theta`` is theta as a dict: the optimizer's own ``rule.named_parameters()``, or what
    ``override={"theta": [theta]}`` put in its place. ``lr``, ``weight_decay`` and ``total_steps``
    can be overridden too. State is carried over from a used optimizer. Non-finite gradients
    propagate, and there is no ``maximize`` of ``higher``'s own: the group's is respected.

    Raises:
        ImportError: ``higher`` is not installed.
    """
    try:
        import higher
    except ImportError as error:
        raise ImportError(
            "register_higher() needs the package 'higher': pip install higher. "
            "Without it, learned_opt.adapters.functional gives the same as pure functions."
        ) from error
    if NFNOpt not in higher.optim._opt_mapping:
        higher.register_optim(NFNOpt, _differentiable(higher.optim.DifferentiableOptimizer))


def _differentiable(base: Any) -> type:  # the class of a package that is optional and has no types
    class DifferentiableNFNOpt(base):
        """``higher``'s counterpart of :class:`NFNOpt`: same rule, out of place."""

        def __init__(self, other: NFNOpt, *args: Any, **kwargs: Any) -> None:
            entries, self.symmetry = other._bind()
            self.rule = other.rule
            names = {id(e.param): e.name for e in entries}
            self._names = [[names.get(id(p)) for p in group["params"]] for group in other.param_groups]
            super().__init__(other, *args, **kwargs)

        @property
        def theta(self) -> Weights:
            """What meta-gradients are taken with respect to."""
            return self.param_groups[0].get("theta") or dict(self.rule.named_parameters())

        def _update(self, grouped_grads: list[list[Tensor | None]], **_: Any) -> None:
            with torch.set_grad_enabled(self._track_higher_grads):
                self._advance(grouped_grads)

        def _advance(self, grouped_grads: list[list[Tensor | None]]) -> None:
            params, grads, state, groups = {}, {}, {}, {}
            places: dict[str, tuple[int, int]] = {}
            for i, (group, names) in enumerate(zip(self.param_groups, self._names, strict=True)):
                for j, (name, p, g) in enumerate(zip(names, group["params"], grouped_grads[i], strict=True)):
                    if name is None or not p.numel():
                        continue
                    params[name], groups[name], places[name] = p, group, (i, j)
                    if g is not None:
                        grads[name] = -g if group["maximize"] else g
                    if g is not None or self.state[i][j]:
                        state[name] = self.state[i][j] or self.rule.init({name: p.detach()})[name]
            if not grads:
                return
            updates, state = apply_rule(
                self.rule,
                params,
                grads,
                state,
                self.symmetry,
                total_steps=self.param_groups[0]["total_steps"],
                weight_decay={n: groups[n]["weight_decay"] for n in grads},
                theta=self.param_groups[0].get("theta"),
            )
            for name, update in updates.items():
                i, j = places[name]
                self.param_groups[i]["params"][j] = stepped(params[name], update, groups[name]["lr"])
            for name, slots in state.items():
                i, j = places[name]
                self.state[i][j] = slots

    return DifferentiableNFNOpt
