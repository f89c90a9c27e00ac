"""NFNOpt in ``higher``: differentiable inner loops over modules."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from learned_opt.buffers import Buffers
from learned_opt.functional import apply_rule, stepped
from learned_opt.optimizer import NFNOpt
from learned_opt.rules.base import Weights


def register_higher() -> None:
    """Let ``higher`` differentiate through :class:`NFNOpt`. Call it once; again does nothing.

    ::

        register_higher()
        optimizer = NFNOpt(model.named_parameters(), symmetry=infer_symmetry(model, x))
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel,
        diffopt):
            diffopt.step(loss(fmodel))
            loss(fmodel).backward()          # reaches model.parameters() and diffopt.weights

    ``diffopt.weights`` is theta as a dict: the optimizer's own ``rule.named_parameters()``, or what
    ``override={"weights": [weights]}`` put in its place. ``lr``, ``weight_decay`` and ``total_steps``
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
            "Without it, learned_opt.functional gives the same as pure functions."
        ) from error
    if NFNOpt not in higher.optim._opt_mapping:
        higher.register_optim(NFNOpt, _differentiable(higher.optim.DifferentiableOptimizer))


def _differentiable(base: Any) -> type:  # the class of a package that is optional and has no types
    class DifferentiableNFNOpt(base):
        """``higher``'s counterpart of :class:`NFNOpt`: same rule, out of place."""

        def __init__(self, other: NFNOpt, *args: Any, **kwargs: Any) -> None:
            entries, self.symmetry = other._bind()
            self.rule = other.rule
            buffers = next(iter(other._stepper.buffers.values()), None)
            self._known: tuple[str, ...] = buffers.names if buffers else ()
            self._rule_state = tree_map(torch.clone, buffers.state) if buffers else {}
            names = {id(e.param): e.name for e in entries}
            self._names = [[names.get(id(p)) for p in group["params"]] for group in other.param_groups]
            super().__init__(other, *args, **kwargs)

        @property
        def weights(self) -> Weights:
            """What meta-gradients are taken with respect to."""
            return self.param_groups[0].get("weights") or dict(self.rule.named_parameters())

        def _update(self, grouped_grads: list[list[Tensor | None]], **_: Any) -> None:
            with torch.set_grad_enabled(self._track_higher_grads):
                self._advance(grouped_grads)

        def _advance(self, grouped_grads: list[list[Tensor | None]]) -> None:
            params, grads, groups = {}, {}, {}
            places: dict[str, tuple[int, int]] = {}
            for i, (group, names) in enumerate(zip(self.param_groups, self._names, strict=True)):
                for j, (name, p, g) in enumerate(zip(names, group["params"], grouped_grads[i], strict=True)):
                    if name is None or not p.numel():
                        continue
                    params[name], groups[name], places[name] = p, group, (i, j)
                    if g is not None:
                        grads[name] = -g if group["maximize"] else g
            if not grads:
                return
            self._extend(params, grads)
            updates, self._rule_state = apply_rule(
                self.rule,
                params,
                grads,
                self._rule_state,
                self.symmetry,
                total_steps=self.param_groups[0]["total_steps"],
                weight_decay={n: groups[n]["weight_decay"] for n in grads},
                names=self._known,
                weights=self.param_groups[0].get("weights"),
            )
            for name, update in updates.items():
                i, j = places[name]
                self.param_groups[i]["params"][j] = stepped(params[name], update, groups[name]["lr"])

        def _extend(self, params: Weights, grads: Weights) -> None:
            """State for tensors that have a gradient for the first time."""
            lacking = [n for n in grads if n not in self._known]
            if lacking:
                names = [n for n in params if n in self._known or n in lacking]
                fresh = Buffers(self.rule, {n: params[n].detach() for n in names}, self.symmetry)
                if self._known:
                    old = Buffers(self.rule, {n: params[n].detach() for n in self._known}, self.symmetry)
                    old.take(self._rule_state, moved=())
                    fresh.fill(old.slots, old.state.get("network"))
                self._known, self._rule_state = fresh.names, fresh.state

    return DifferentiableNFNOpt
