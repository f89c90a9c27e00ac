"""NFNOpt: a ``torch.optim.Optimizer`` around a pure update rule.

One numerics path: a step gathers weights, gradients and state by name, calls the rule, and writes
the result back.
"""

import copy
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from learned_opt.rules import make_rule
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.rules.checkpoint import digest
from learned_opt.symmetry import Symmetry, SymmetryError, independent

logger = logging.getLogger(__name__)

NanPolicy = Literal["skip", "raise", "propagate"]
# keys of the first parameter group of a state dict
RULE, SHA, THETA, SYMMETRY = "rule", "theta_sha256", "theta", "symmetry"
LARGEST = 1e15  # largest gradient entry that a rule sees; float32 squares overflow at 2e19
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Entry(NamedTuple):
    """One optimised tensor: its name, the tensor, and its parameter group."""

    name: str
    param: Tensor
    group: dict[str, Any]
    shrink: float = 1.0  # of a gradient so large that its square would overflow

    @property
    def trained(self) -> bool:
        """Whether this step may move it."""
        return self.param.requires_grad and self.param.grad is not None

    @property
    def grad(self) -> Tensor:
        """The gradient of a trained tensor, detached."""
        assert self.param.grad is not None
        return self.param.grad.detach()


# -------------------------------------------------------------------------------- the numerics path
def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def apply_rule(
    rule: UpdateRule,
    params: Weights,
    grads: Weights,
    state: State,
    symmetry: Symmetry,
    *,
    total_steps: float | Tensor | None = None,
    weight_decay: float | Mapping[str, float] = 0.0,
    theta: Weights | None = None,
) -> tuple[Weights, State]:
    """``rule(params, grads, state, symmetry)`` in float32, or float64 if any tensor is. Pure.

    Arguments and result are those of :meth:`UpdateRule.forward`; the state keeps the dtypes it had.
    ``theta``, a dict like ``rule.named_parameters()``, replaces the rule's own parameters.
    """
    wide = any(t.dtype == torch.float64 for t in params.values())
    dtype = torch.float64 if wide else torch.float32
    device = next(iter(params.values())).device
    own = {**dict(rule.named_parameters()), **dict(rule.named_buffers())}
    own = own if theta is None else theta
    fits = all(t.device == device and t.dtype == dtype for t in own.values())
    arguments = (
        {n: p.to(dtype) for n, p in params.items()},
        {n: g.to(dtype) for n, g in grads.items()},
        {n: {k: x.to(dtype) for k, x in slots.items()} for n, slots in state.items()},
        symmetry,
    )
    options = {"total_steps": total_steps, "weight_decay": weight_decay}
    if theta is not None or not fits:
        cast = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in own.items()}
        updates, new_state = torch.func.functional_call(rule, cast, arguments, options)
    else:
        updates, new_state = rule(*arguments, **options)
    kept = {n: {k: x.to(state[n][k].dtype) for k, x in new_state[n].items()} for n in state}
    return updates, kept


def stepped(param: Tensor, update: Tensor, lr: float | Tensor) -> Tensor:
    """``param + lr * update`` in the update's dtype, then rounded to the parameter's. Pure."""
    if isinstance(lr, Tensor):
        update, lr = update * lr.to(update.device).reshape(()), 1.0
    return torch.add(param.to(update.dtype), update, alpha=lr).to(param.dtype)


def describe(rule: UpdateRule) -> str:
    """The rule's class and its plain settings, such as ``Adam(betas=(0.9, 0.999), eps=1e-08)``."""
    plain = (bool, int, float, str, tuple, torch.dtype)
    settings = {k: v for k, v in vars(rule).items() if isinstance(v, plain) and k[0] != "_" and k != "training"}
    return f"{type(rule).__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"


# ------------------------------------------------------------------------------------ the optimizer
class NFNOpt(torch.optim.Optimizer):
    """Trains a network with an update rule that knows the symmetry of its weights.

    ::

        optimizer = NFNOpt(model.named_parameters(), symmetry=from_model(model), total_steps=1000)

    Weights, gradients and state are computed in float32 (float64 for float64 parameters); narrower
    parameters are rounded at the end of a step. A step uses no random numbers and never changes a
    gradient.

    Args:
        params: tensors, ``named_parameters()``, or parameter groups of either. Only named
            parameters can be matched with a symmetry surely; unnamed ones are matched with it by
            position.
        symmetry: how the axes of the parameters move together (:func:`learned_opt.from_model`); it
            may describe more tensors than are optimised. None: every axis by itself, which is
            always right and knows least.
        lr: multiplies the update (also per group); a number or a 1-element tensor. The learned
            rules set their own rate, so it is 1; "adam", "sgd" and "muon" need one like torch's.
        weight_decay: decoupled, per step at ``lr=1`` (also per group).
        total_steps: how many steps the training takes, if that is known; it sets the schedule of
            the learned rules.
        rule: a name in ``RULES``, the path of a ``.safetensors`` theta, or an :class:`UpdateRule`.
        nan_policy: what a gradient with NaN or infinity does. "skip": its tensor sits this step
            out, weights and state unchanged (:attr:`skipped_steps` counts, a warning names it
            once). "raise": FloatingPointError before anything moves. "propagate": nothing is
            checked. (Where it is checked, a gradient with entries over 1e15 is scaled down to that,
            lest squares overflow.)
        maximize: ascend instead (also per group).

    Attributes:
        rule: the :class:`UpdateRule`, with theta.
        symmetry: as given, or None.
        nan_policy: as given; may be changed.
        skipped_steps: number of steps that each tensor sat out, by name.

    Raises:
        SymmetryError: the symmetry does not describe the parameters.
        ValueError: no parameters, or an option out of range.
        TypeError: something that is not a tensor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        symmetry: Symmetry | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        total_steps: float | None = None,
        rule: str | Path | UpdateRule = "nfn",
        nan_policy: NanPolicy = "skip",
        maximize: bool = False,
    ) -> None:
        if nan_policy not in ("skip", "raise", "propagate"):
            raise ValueError(f"nan_policy={nan_policy!r} is unknown; it is 'skip', 'raise' or 'propagate'")
        self.rule = make_rule(rule)
        self.symmetry = symmetry
        self.nan_policy = nan_policy
        self.skipped_steps: Counter[str] = Counter()
        self._binding: tuple[Any, tuple[str, ...], Symmetry] | None = None
        self._complete = False  # groups arrive one by one; the symmetry is for all of them
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "total_steps": total_steps,
            "maximize": maximize,
        }
        _check_options(options)
        super().__init__(params, options)
        self._complete = True
        entries, _ = self._bind()
        if entries and not isinstance(rule, UpdateRule):  # ours alone: keep it where the weights are
            self.rule.to(entries[0].param.device)

    # -- parameters and their names
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also in mid-training. With a symmetry, it must describe them too.

        Raises:
            SymmetryError, ValueError: as the constructor; the optimizer is then as before.
        """
        if isinstance(param_group, dict):
            _check_options(param_group)
            if self.param_groups and param_group.get("total_steps") is not None:
                _check_same_horizon(param_group, self.param_groups[0])
        super().add_param_group(param_group)
        if self._complete:
            try:
                self._bind()
            except SymmetryError:
                self.param_groups.pop()
                raise

    def _entries(self) -> list[Entry]:
        """Every floating tensor once, with its name: as given, else its position."""
        entries: dict[str, Entry] = {}
        seen: set[int] = set()
        position = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = str(position) if names is None else names[i]
                if name in entries:  # two networks in one optimizer
                    name = f"{name}#{position}"
                position += 1
                if id(p) not in seen and (p.is_floating_point() or p.is_complex()):
                    entries[name] = Entry(name, p, group)
                seen.add(id(p))
        return list(entries.values())

    def _bind(self) -> tuple[list[Entry], Symmetry]:
        """The tensors under the symmetry's names, and the symmetry; checked when changed."""
        entries = self._entries()
        signature = tuple((e.name, e.param.shape) for e in entries)
        if self._binding is None or self._binding[0] != signature:
            self._binding = (signature, *self._match(entries))
        _, names, symmetry = self._binding
        return [e._replace(name=n) for e, n in zip(entries, names, strict=True)], symmetry

    def _match(self, entries: list[Entry]) -> tuple[tuple[str, ...], Symmetry]:
        names = tuple(e.name for e in entries)
        if self.symmetry is None:
            logger.info("NFNOpt: no symmetry given, every axis of %d tensors moves by itself", len(entries))
            return names, independent({e.name: e.param for e in entries})
        if any("param_names" in e.group for e in entries):
            names = tuple(n if n in self.symmetry.specs else _bare(n) for n in names)
        else:
            names = _by_position(entries, self.symmetry)
        twice = [n for n, count in Counter(names).items() if count > 1]
        if twice:
            raise SymmetryError(f"several parameters are called {_listed(twice)}: rename them.")
        self.symmetry.validate({n: e.param for n, e in zip(names, entries, strict=True)})
        return names, self.symmetry

    # -- the step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: reevaluates the model, calls ``backward`` and returns the loss; run with
                gradients enabled.

        Returns:
            What the closure returns, else None.

        Raises:
            RuntimeError: a complex parameter or a sparse gradient.
            FloatingPointError: a non-finite gradient under ``nan_policy="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries, symmetry = self._bind()
        with ExitStack() as stack:
            # state made in the caller's inference mode could not be used outside of it
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in {e.param.device for e in entries}:
                stack.enter_context(torch.autocast(device.type, enabled=False))
            trained = [e for e in entries if e.trained]
            for entry in trained:
                _refuse_unsupported(entry)
            usable = self._usable([e for e in trained if e.param.numel()])
            self._create_state(trained)
            for device in {e.param.device: None for e in usable}:
                here = [e for e in entries if e.param.device == device and e.param.numel()]
                self._step(here, [e for e in usable if e.param.device == device], symmetry)
        return loss

    def _step(self, entries: list[Entry], trained: list[Entry], symmetry: Symmetry) -> None:
        """Update ``trained``; the other tensors of ``entries`` are context."""
        params = {e.name: e.param.detach() for e in entries if not e.param.is_complex()}
        factors = {e.name: -e.shrink if e.group["maximize"] else e.shrink for e in trained}
        grads = {e.name: e.grad for e in trained}
        for n, factor in factors.items():
            if factor != 1:
                grads[n] = factor * grads[n].to(accumulator_dtype(grads[n]))
        updates, state = apply_rule(
            self.rule,
            params,
            grads,
            {e.name: self.state[e.param] for e in trained},
            symmetry,
            total_steps=self.param_groups[0]["total_steps"],
            weight_decay={e.name: e.group["weight_decay"] for e in trained},
        )
        for entry in trained:
            moved = stepped(params[entry.name], updates[entry.name], entry.group["lr"])
            entry.param.detach().copy_(moved)
            self.state[entry.param] = state[entry.name]

    def _create_state(self, entries: list[Entry]) -> None:
        new = {e.name: e.param for e in entries if not self.state.get(e.param)}
        if new:
            for name, state in self.rule.init({n: p.detach() for n, p in new.items()}).items():
                self.state[new[name]] = state

    def _usable(self, entries: list[Entry]) -> list[Entry]:
        """The entries to update, by what their gradients hold (one synchronisation per device)."""
        if not entries or (self.nan_policy == "propagate" and not self._at_rest()):
            return entries
        largest = _largest_magnitudes([e.grad for e in entries])
        if not any(largest) and self._at_rest():
            return []  # torch's distributed checkpointing asks for state in this way: it is no step
        if self.nan_policy == "propagate":
            return entries
        bad = [e for e, x in zip(entries, largest, strict=True) if not math.isfinite(x)]
        if bad and self.nan_policy == "raise":
            raise FloatingPointError(
                f"non-finite gradient of {_listed([e.name for e in bad])}. Nothing was changed. "
                "Lower the learning rate, clip the loss, or pass nan_policy='skip'."
            )
        for entry in bad:
            if not self.skipped_steps[entry.name]:
                warnings.warn(
                    f"NFNOpt: non-finite gradient of {entry.name}: the tensor sits this step out. "
                    "optimizer.skipped_steps counts; nan_policy='raise' stops instead.",
                    stacklevel=4,
                )
            self.skipped_steps[entry.name] += 1
        good = [(e, x) for e, x in zip(entries, largest, strict=True) if math.isfinite(x)]
        return [e._replace(shrink=LARGEST / x) if x > LARGEST else e for e, x in good]

    def _at_rest(self) -> bool:
        return all(float(group["lr"]) == 0 for group in self.param_groups)

    # -- saving and loading
    def state_dict(self) -> dict[str, Any]:
        """State by position and parameter groups, as torch's.

        The first group also names the rule and holds theta (tensors) and the symmetry (JSON), so
        that a run resumes bit for bit with what it was started with.
        """
        saved = super().state_dict()
        theta = {n: t.detach().clone() for n, t in self.rule.state_dict().items()}
        saved["param_groups"][0] |= {
            RULE: describe(self.rule),
            SHA: digest(theta),
            THETA: theta,
            SYMMETRY: None if self.symmetry is None else json.dumps(self.symmetry.to_dict()),
        }
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; accumulators keep their precision.

        theta is restored as well (into a copy of the rule, with a warning if it differs), and so is
        the symmetry if none was given.

        Raises:
            ValueError: another rule, other names, shapes or slots, or an altered theta. Nothing is
                changed then.
        """
        loading: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            saved = {**saved, "param_groups": [dict(g) for g in saved["param_groups"]]}
            identity: dict[str, Any] = {}
            for group in saved["param_groups"]:
                identity |= {k: group.pop(k) for k in (RULE, SHA, THETA, SYMMETRY) if k in group}
            loading["rule"] = self._saved_rule(identity)
            loading["symmetry"] = self._saved_symmetry(identity)
            loading["state"] = self._saved_state(saved)
            return saved

        def restore(_: torch.optim.Optimizer) -> None:
            self.rule, self.symmetry = loading["rule"], loading["symmetry"]
            for p, slots in loading["state"]:
                self.state[p] = slots  # torch has cast them to the dtype of the parameter
            self._binding = None

        # after the caller's hooks that may adapt the state dict, before those that see it loaded
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            before.remove()
            after.remove()

    def _saved_rule(self, identity: dict[str, Any]) -> UpdateRule:
        own = {n: t.detach() for n, t in self.rule.state_dict().items()}
        if identity.get(RULE, describe(self.rule)) != describe(self.rule):
            raise ValueError(
                f"the state dict is of rule {identity[RULE]}, this one is {describe(self.rule)}. "
                "Construct it with that rule."
            )
        theta, sha = identity.get(THETA), identity.get(SHA)
        altered = theta is not None and digest(theta) != sha
        if sha is None or (sha == digest(own) and not altered):
            return self.rule
        if theta is None or altered:
            reason = "does not hold it" if theta is None else "holds an altered one"
            raise ValueError(
                f"the state dict was made with theta {sha[:12]} but {reason}; this optimizer has "
                f"theta {digest(own)[:12]}. "
                "Construct the optimizer with rule=<path of that theta>."
            )
        if {n: t.shape for n, t in theta.items()} != {n: t.shape for n, t in own.items()}:
            raise ValueError(
                "the theta in the state dict does not fit this version of the rule. Load it with "
                "the version that made it, or start with fresh state."
            )
        warnings.warn(
            f"NFNOpt: continuing with theta {sha[:12]} of the state dict, not {digest(own)[:12]}.",
            stacklevel=5,
        )
        rule = copy.deepcopy(self.rule)  # the caller may use theirs elsewhere
        rule.load_state_dict(theta)
        return rule

    def _saved_symmetry(self, identity: dict[str, Any]) -> Symmetry | None:
        text = identity.get(SYMMETRY)
        if text is None:
            return self.symmetry
        saved = Symmetry.from_dict(json.loads(text))
        if self.symmetry is not None and self.symmetry.to_dict() != saved.to_dict():
            raise ValueError(
                "the state dict was made with another symmetry than this optimizer has. Construct "
                "it with the same symmetry, or with symmetry=None to take that of the state dict."
            )
        return self.symmetry or saved

    def _saved_state(self, saved: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """State to restore per parameter, checked against the parameters and the rule."""
        if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in self.param_groups]:
            return []  # torch refuses this, in its own words
        wrong: list[str] = []
        owners: dict[Any, tuple[str, Tensor]] = {}
        for group, other in zip(self.param_groups, saved["param_groups"], strict=True):
            own_names = group.get("param_names")
            names = own_names or other.get("param_names") or [f"parameter {k}" for k in other["params"]]
            for key, name, p in zip(other["params"], names, group["params"], strict=True):
                owners[key] = (name, p)
            pairs = zip(own_names or [], other.get("param_names", own_names) or [], strict=True)
            wrong += [f"{a} here is {b} in the state dict" for a, b in pairs if _bare(a) != _bare(b)]
        wrong += [f"state of unknown parameter {k!r}" for k in saved["state"] if k not in owners]
        restored = []
        for key, slots in saved["state"].items():
            if key in owners and slots:
                name, p = owners[key]
                wrong += [f"{name}: {reason}" for reason in self._unfit(p, slots)]
                restored.append((p, {k: _as_slot(x, p) for k, x in slots.items()}))
        if wrong:
            raise ValueError(
                f"the state dict does not fit this optimizer:\n  {_listed(wrong, chr(10) + '  ')}\n"
                "Give the optimizer the same parameters, in the same order and with the same rule, "
                "as when it was saved; a load_state_dict pre-hook can rename. Nothing was changed."
            )
        return restored

    def _unfit(self, p: Tensor, slots: Mapping[str, Any]) -> list[str]:
        expected = self.rule.init({"p": torch.empty_like(p, device="meta")})["p"]
        found = {k: tuple(torch.as_tensor(x).shape) for k, x in slots.items()}
        wanted = {k: tuple(x.shape) for k, x in expected.items()}
        if found.keys() != wanted.keys():
            return [f"slots {', '.join(sorted(found))} instead of {', '.join(sorted(wanted))}"]
        return [f"{k} has shape {found[k]} instead of {wanted[k]}" for k in found if found[k] != wanted[k]]

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "symmetry", "nan_policy", "skipped_steps")
        return super().__getstate__() | {k: getattr(self, k) for k in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._binding, self._complete = None, True
        for group in self.param_groups:  # options that an older state dict lacks
            for option in ("lr", "weight_decay", "total_steps", "maximize"):
                group.setdefault(option, self.defaults[option])

    def __repr__(self) -> str:
        entries, _ = self._bind()
        count = sum(e.param.numel() for e in entries)
        known = "independent axes"
        if self.symmetry is not None:
            known = f"symmetry of {len(self.symmetry.specs)} tensors"
        lines = [f"NFNOpt({describe(self.rule)}, {known}, {len(entries)} tensors, {count} weights)"]
        for i, group in enumerate(self.param_groups):
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            lines.append(f"  group {i}: " + ", ".join(f"{k}={v}" for k, v in options.items()))
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------ helpers
def _check_options(options: Mapping[str, Any]) -> None:
    lr = options.get("lr", 0.0)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name in ("lr", "weight_decay"):
        value = options.get(name, 0.0)
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")
    steps = options.get("total_steps")
    if steps is not None and not float(steps) > 0:
        raise ValueError(f"total_steps={steps} must be positive; leave it out if it is not known")


def _check_same_horizon(group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    if group["total_steps"] != first["total_steps"]:
        raise ValueError(
            f"total_steps={group['total_steps']} in a group, {first['total_steps']} in the first: "
            "the horizon is one for all. Pass it to the constructor."
        )


def _bare(name: str) -> str:
    """A name without what wrappers put in (torch.compile, FSDP anywhere; DataParallel in front)."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _by_position(entries: list[Entry], symmetry: Symmetry) -> tuple[str, ...]:
    found = [tuple(e.param.shape) for e in entries]
    described = [spec.shape for spec in symmetry.specs.values()]
    if found != described:
        raise SymmetryError(
            f"the parameters have no names, and their shapes {_listed(found)} are not, in order, "
            f"those that the symmetry describes: {_listed(described)}. Pass "
            "model.named_parameters() instead of model.parameters()."
        )
    return tuple(symmetry.specs)


def _refuse_unsupported(entry: Entry) -> None:
    if entry.param.is_complex():
        raise RuntimeError(f"NFNOpt does not take complex parameters: {entry.name}. Train its torch.view_as_real.")
    if entry.grad.layout != torch.strided:
        raise RuntimeError(f"NFNOpt does not take sparse gradients: {entry.name}. Use nn.Embedding(sparse=False).")


def _largest_magnitudes(tensors: list[Tensor]) -> list[float]:
    """Largest magnitude of each (NaN if it has one). Not the 2-norm, which overflows."""
    largest = [0.0] * len(tensors)
    for device in {t.device for t in tensors}:
        here = [i for i, t in enumerate(tensors) if t.device == device]
        norms = torch._foreach_norm([tensors[i] for i in here], math.inf)
        wide = any(n.dtype == torch.float64 for n in norms)
        stacked = torch.stack([n.to(torch.float64 if wide else torch.float32) for n in norms])
        for i, x in zip(here, stacked.tolist(), strict=True):
            largest[i] = x
    return largest


def _as_slot(value: Any, param: Tensor) -> Tensor:
    value = torch.as_tensor(value)
    dtype = accumulator_dtype(param) if value.is_floating_point() or not value.ndim else value.dtype
    return value.to(param.device, dtype)


def _listed(items: list[Any], separator: str = ", ", most: int = 8) -> str:
    shown = separator.join(str(x) for x in items[:most])
    return shown + (f"{separator}... and {len(items) - most} more" if len(items) > most else "")
