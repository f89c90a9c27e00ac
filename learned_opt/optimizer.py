"""NFNOpt: a ``torch.optim.Optimizer`` around an update rule.

A step hands weights, gradients and state to :func:`learned_opt.functional.apply_rule`, which all ways to take a step
share, and adds the updates to the weights.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from learned_opt.buffers import Buffers
from learned_opt.distributed import agreed, refuse_pieces
from learned_opt.functional import apply_rule, stepped
from learned_opt.params import (
    NamedParam,
    ParamMap,
    check_options,
    check_same_horizon,
    independent_map,
    infer_or_say,
    match,
    named_params,
    warn_of_habit,
    warn_of_independence,
)
from learned_opt.recorder import Call, ForwardRecorder, modules_behind
from learned_opt.rules import make_rule
from learned_opt.rules.base import UpdateRule
from learned_opt.state_dict import (
    NETWORK,
    Mode,
    accumulator_dtype,
    describe,
    identity,
    pop_identity,
    saved_network,
    saved_rule,
    saved_state,
    saved_symmetry,
)
from learned_opt.symmetry import Symmetry, SymmetryError, independent
from learned_opt.text import listed

NanPolicy = Literal["skip", "raise", "propagate"]
LARGEST = 1e15  # largest gradient entry that a rule sees; float32 squares overflow at 2e19


# ------------------------------------------------------------------------------------ the optimizer
class NFNOpt(torch.optim.Optimizer):
    """Trains a network with an update rule that knows the symmetry of its weights.

    ::

        optimizer = NFNOpt(model.parameters(), total_steps=1000)

    Weights, gradients and state are computed in float32 (float64 for float64 parameters); narrower
    parameters are rounded at the end of a step. A step uses no random numbers and never changes a
    gradient.

    Args:
        params: a module, its ``parameters()`` or ``named_parameters()``, tensors, or parameter groups of
            any of these.
        symmetry: how the axes of the parameters move together. "infer": found out before the first
            step. The forward pass of the module with all these parameters is seen, and
            :func:`learned_opt.infer_symmetry` is asked about it; parameters that the module lacks, or
            that are added later, have every axis by itself. Where no such module is called, or the
            inference fails, all have, and a warning says why; training goes on. "independent": every
            axis by itself, which is always right and knows least. A :class:`Symmetry`: that one; it
            may describe more tensors than are optimised. Named parameters are matched with it by name,
            others by position.
        lr: multiplies the rate that the rule sets itself (also per group); a number or a 1-element tensor. 1 is right;
            one as of other optimizers, such as 1e-3, gives a warning.
        weight_decay: None: the rule's own small decay of matrices. Else decoupled as AdamW's, times the rate: ``lr``
            times what the rule sets, which is about 0.01 and decays; 0 is none. Also per group.
        total_steps: how many steps the training takes, if that is known; it sets the schedule.
        rule: a name in ``RULES``, the path of a ``.safetensors`` file of learned weights, or an :class:`UpdateRule`.
            "whitened_polar" are hand-made steps, "auto_lr" the same at a rate that the first steps measure, and
            "learned" the same under controls of a neural functional network, without effect until it is meta-trained.
        nan_policy: what a gradient with NaN or infinity does. "skip": its tensor sits this step
            out, weights and averages unchanged (:attr:`skipped_steps` counts, a warning names it
            once). "raise": FloatingPointError before anything moves. "propagate": nothing is
            checked. (Where it is checked, a gradient with entries over 1e15 is scaled down to that,
            lest squares overflow.)
        maximize: ascend instead (also per group).
        process_group: of ``torch.distributed``, on whose ranks these parameters, and their gradients at every step, are
            equal. All of its ranks then agree on one symmetry at the first step, which all must take. None: the group
            of the ``DistributedDataParallel`` that holds the parameters, if one does.

    Attributes:
        rule: the :class:`UpdateRule`, with its learned weights if it has any.
        nan_policy: as given; may be changed.
        skipped_steps: number of steps that each tensor sat out, by name.

    Raises:
        SymmetryError: the symmetry does not describe the parameters.
        ValueError: no parameters, or an option out of range.
        TypeError: something that is not a tensor.
        RuntimeError: sharded parameters (``DTensor``), those of ``FullyShardedDataParallel``, or inside of
            ``ZeroRedundancyOptimizer``.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        symmetry: Symmetry | Mode = "infer",
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        total_steps: float | None = None,
        rule: str | Path | UpdateRule = "auto_lr",
        nan_policy: NanPolicy = "skip",
        maximize: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if nan_policy not in ("skip", "raise", "propagate"):
            raise ValueError(f"nan_policy={nan_policy!r} is unknown; it is 'skip', 'raise' or 'propagate'")
        if not isinstance(symmetry, Symmetry) and symmetry not in ("infer", "independent"):
            raise ValueError(f"symmetry={symmetry!r} is unknown; it is a Symmetry, 'infer' or 'independent'")
        self.rule = make_rule(rule)
        self.nan_policy = nan_policy
        self.skipped_steps: Counter[str] = Counter()
        self._given: Symmetry | Mode = symmetry
        self._known: ParamMap | Mode = "independent" if isinstance(symmetry, Symmetry) else symmetry
        self._bound: tuple[Any, ParamMap] | None = None  # for the tensors that the first item identifies
        self._names = WeakIdKeyDictionary()  # of all tensors that were ever bound
        self._recorder: ForwardRecorder | None = None
        self._outlasted: float | None = None  # the horizon that a run was said to be beyond
        self._buffers: dict[torch.device, Buffers] = {}
        self._network: dict[torch.device, dict[str, Tensor]] = {}  # loaded, of buffers that are not made yet
        self._steps = 0  # those that the state's clock has counted, where reading it costs no synchronisation
        self._process_group, self._agreed = process_group, False  # on the symmetry, with other ranks
        self._complete = False  # groups arrive one by one; the symmetry is for all of them
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "total_steps": total_steps,
            "maximize": maximize,
        }
        check_options(options)
        if self.rule.sets_rate:
            warn_of_habit(lr)
        modules = modules_behind(params)  # before their generators are used up
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, options)
        self.param_groups[0][NETWORK] = ""  # a key that torch's distributed checkpointing asks for by the groups' keys
        self._complete = True
        if self._known == "infer":
            self._recorder = ForwardRecorder(self, modules)
        else:
            self._bind()
        entries = named_params(self.param_groups)
        if entries and not isinstance(rule, UpdateRule):  # ours alone: keep it where the weights are
            self.rule.to(entries[0].param.device)

    @property
    def symmetry(self) -> Symmetry | None:
        """How the axes of the parameters move together; None until it is inferred, at the first step."""
        return None if self._known == "infer" else self._bind()[1]

    # -- parameters and their names
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also in mid-training. A symmetry that was given must describe them too.

        Raises:
            SymmetryError, ValueError, RuntimeError: as the constructor; the optimizer is then as before.
        """
        modules: list[nn.Module] = []
        if isinstance(param_group, dict):
            check_options(param_group)
            if self.param_groups and param_group.get("total_steps") is not None:
                check_same_horizon(param_group, self.param_groups[0])
            modules = modules_behind(param_group)
            if isinstance(param_group.get("params"), nn.Module):
                named = any("param_names" in group for group in self.param_groups)  # torch wants all or none
                module = param_group["params"]
                param_group = {**param_group, "params": module.named_parameters() if named else module.parameters()}
        super().add_param_group(param_group)
        try:
            refuse_pieces(self.param_groups[-1]["params"])
            if self._complete and self._recorder is None:
                self._bind()
        except (SymmetryError, RuntimeError):
            self.param_groups.pop()
            raise
        if self._complete and self._recorder is not None:
            self._recorder.expect(modules)

    def _bind(self) -> tuple[list[NamedParam], Symmetry]:
        """The tensors under the symmetry's names, and the symmetry: checked when they changed, inferred at first."""
        entries = named_params(self.param_groups)
        signature = tuple((e.name, e.position, id(e.param), e.param.shape) for e in entries)
        if self._bound is None or self._bound[0] != signature:
            self._bound = (signature, self._match(entries))
            self._names.update({e.param: e.name for e in self._bound[1].rename(entries)})
        param_map = self._bound[1]
        return param_map.rename(entries), param_map.symmetry

    def _match(self, entries: list[NamedParam]) -> ParamMap:
        if self._known == "infer":
            self._agree(entries)
        if isinstance(self._given, Symmetry):
            self._known = match(entries, self._given)
        elif isinstance(self._known, ParamMap):
            self._known = self._known.rebind(self._names, entries).extend(entries).validate(entries)
        return self._known if isinstance(self._known, ParamMap) else independent_map(entries)

    def _agree(self, entries: list[NamedParam]) -> None:
        """Before the first step: the symmetry, inferred or known, and one on all ranks that train replicas."""
        known = self._placed()
        own: ParamMap | None = known if isinstance(known, ParamMap) else independent_map(entries)
        reason = ""
        if known == "infer":
            own, reason = infer_or_say(self._stop_recording(), entries)
        given = isinstance(self._given, Symmetry)
        found = agreed(own, reason, entries, self._process_group, steps=self._steps, given=given)
        if known == "infer" or found is not own:
            self._known, self._bound, self._names = found or "independent", None, WeakIdKeyDictionary()
        if found is None:
            warn_of_independence(reason)
        self._agreed = True

    def _placed(self) -> ParamMap | Mode:
        """What is known, with the names where the groups have their tensors now."""
        if isinstance(self._known, ParamMap):
            self._bind()
        return self._known

    def _stop_recording(self) -> list[Call]:
        calls = [] if self._recorder is None else self._recorder.release()
        self._recorder = None
        return calls

    # -- the step
    @torch._disable_dynamo  # as torch.compiler.disable, which would import the compiler with this module
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. ``torch.compile`` leaves it as it is.

        Args:
            closure: reevaluates the model, calls ``backward`` and returns the loss; run with
                gradients enabled.

        Returns:
            What the closure returns, else None.

        Raises:
            RuntimeError: a complex parameter, or a sparse gradient; or ranks that do not train replicas.
            FloatingPointError: a non-finite gradient under ``nan_policy="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = named_params(self.param_groups)
        with _plain_modes({e.param.device for e in entries}):
            for entry in entries:
                _refuse_unsupported(entry)
            if not self._agreed and not self._is_probe(entries):
                self._agree(entries)
            if self._known == "infer":
                self._create_state([e for e in entries if e.trained])
                return loss
            entries, symmetry = self._bind()
            trained = [e for e in entries if e.trained]
            usable = self._usable([e for e in trained if e.param.numel()])
            self._create_state(trained)
            if usable:
                self._count()
            for device in {e.param.device: None for e in usable}:
                here = [e for e in entries if e.param.device == device and e.param.numel()]
                self._step(here, [e for e in usable if e.param.device == device], symmetry)
        return loss

    def _count(self) -> None:
        self._steps += 1
        total = float(self.param_groups[0]["total_steps"] or math.inf)
        if self.rule.ends and self._steps - 1 >= total and self._outlasted != total:
            self._outlasted = total
            warnings.warn(
                f"NFNOpt: step {self._steps}, but total_steps={total:g}: the schedule has ended, and weights stay "
                "where they are. Pass the number of optimizer steps, epochs times batches.",
                stacklevel=4,
            )

    def _step(self, entries: list[NamedParam], trained: list[NamedParam], symmetry: Symmetry) -> None:
        """Update ``trained``; the other tensors of ``entries`` are context, and those with a state age along."""
        params = {e.name: e.param for e in entries if not e.param.is_complex()}
        factors = {e.name: -e.shrink if e.group["maximize"] else e.shrink for e in trained}
        grads = {e.name: e.grad for e in trained}
        for n, factor in factors.items():
            if factor != 1:
                grads[n] = factor * grads[n].to(accumulator_dtype(grads[n]))
        buffers = self._buffered(entries, symmetry)
        updates, state = apply_rule(
            self.rule,
            params,
            grads,
            buffers.state,
            symmetry,
            total_steps=self.param_groups[0]["total_steps"],
            weight_decay={e.name: e.group["weight_decay"] for e in trained},
            names=buffers.names,
            ages=buffers.next_ages(grads),
            in_place=True,
        )
        buffers.take(state, moved=grads)
        _add([e.param for e in trained], [updates[e.name] for e in trained], [e.group["lr"] for e in trained])

    def _buffered(self, entries: list[NamedParam], symmetry: Symmetry) -> Buffers:
        """The buffers of the tensors that have state, made anew where these, or what they hold, are others."""
        known = [e for e in entries if e.param in self.state and self.state[e.param]]
        device = known[0].param.device
        buffers = self._buffers.get(device)
        if buffers is not None and buffers.holds(symmetry, {e.name: self.state[e.param] for e in known}):
            return buffers
        old = {e.name: self.state[e.param] for e in known}
        fresh = Buffers(self.rule, {e.name: e.param for e in known}, symmetry)
        fresh.fill(old, self._network.pop(device, None) if buffers is None else buffers.state.get("network"))
        for e in known:
            self.state[e.param] = {**old[e.name], **fresh.slots[e.name]}
        self._buffers[device] = fresh
        return fresh

    def _networks(self) -> dict[torch.device, dict[str, Tensor]]:
        """Numbers of the whole network, of every device that has some."""
        own = {d: b.state["network"] for d, b in self._buffers.items() if "network" in b.state}
        return {**self._network, **own}

    def _create_state(self, entries: list[NamedParam]) -> None:
        """Slots of tensors that have none; a step puts them into shared buffers."""
        new = {e.name: e.param.detach() for e in entries if not self.state.get(e.param)}
        if new:
            slots = Buffers(self.rule, new, independent(new)).slots
            for e in entries:
                if e.name in slots:
                    self.state[e.param] = slots[e.name]

    def _usable(self, entries: list[NamedParam]) -> list[NamedParam]:
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
                f"non-finite gradient of {listed([e.name for e in bad])}. Nothing was changed. "
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

    def _is_probe(self, entries: list[NamedParam]) -> bool:
        """Whether a step is none: nothing to do, or torch's distributed checkpointing that asks for state."""
        grads = [e.grad for e in entries if e.trained and e.param.numel()]
        return not grads or (self._at_rest() and not any(_largest_magnitudes(grads)))

    def _at_rest(self) -> bool:
        return all(float(group["lr"]) == 0 for group in self.param_groups)

    # -- saving and loading
    def state_dict(self) -> dict[str, Any]:
        """State by position and parameter groups, as torch's.

        The first group also names the rule and holds theta (tensors) and the symmetry (JSON, with the
        name of every position), so that a run resumes bit for bit with what it was started with.
        """
        saved = super().state_dict()
        for group in saved["param_groups"]:  # plain numbers: torch.load(weights_only=True) takes no NumPy scalars
            group |= {k: v.item() for k, v in group.items() if isinstance(v, np.generic)}
        saved["param_groups"][0] |= identity(self.rule, self._placed(), list(self._networks().values()))
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; accumulators keep their precision.

        theta is restored as well (into a copy of the rule, with a warning if it differs), and so is
        the symmetry if none was given: then nothing is inferred any more.

        Raises:
            ValueError: another rule, other names, shapes or slots, or an altered theta. Nothing is
                changed then.
        """
        loading: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            saved = {**saved, "param_groups": [dict(g) for g in saved["param_groups"]]}
            found = pop_identity(saved["param_groups"])
            loading["rule"] = saved_rule(found, self.rule)
            loading["known"] = saved_symmetry(found, self._known, self._given, named_params(self.param_groups))
            loading["state"] = saved_state(saved, self.param_groups, self.rule)
            loading["network"] = saved_network(found)
            return saved

        def restore(_: torch.optim.Optimizer) -> None:
            self.rule, self._known = loading["rule"], loading["known"]
            for p, slots in loading["state"]:
                self.state[p] = slots  # torch has cast them to the dtype of the parameter
            devices = dict.fromkeys(e.param.device for e in named_params(self.param_groups))
            self._network = dict(zip(devices, loading["network"], strict=False))
            self._bound, self._buffers = None, {}
            self.param_groups[0][NETWORK] = ""
            self._steps = max((int(n["clock"]) for n in loading["network"]), default=0)
            if self._known != "infer":
                self._stop_recording()

        # after the caller's hooks that may adapt the state dict, before those that see it loaded
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "nan_policy", "skipped_steps", "_given", "_steps", "_outlasted")
        kept = {k: getattr(self, k) for k in own} | {"_known": self._placed(), "_network": self._networks()}
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bound, self._names, self._complete = None, WeakIdKeyDictionary(), True
        self._buffers = {}
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("_agreed", False)
        if "_recorder" not in self.__dict__:  # a copy; torch also calls this to load a state dict
            self._recorder = ForwardRecorder(self) if self._known == "infer" else None
        for group in self.param_groups:  # options that an older state dict lacks
            for option in ("lr", "weight_decay", "total_steps", "maximize"):
                group.setdefault(option, self.defaults[option])

    def __repr__(self) -> str:
        entries = named_params(self.param_groups)
        count = sum(e.param.numel() for e in entries)
        symmetry = {"infer": "symmetry to be inferred at the first step", "independent": "independent axes"}
        if isinstance(self._known, ParamMap):
            known = self._known.symmetry
            groups = sum(not label.fixed for label in known.labels.values())
            text = f"symmetry of {len(known.specs)} tensors in {groups} groups"
        else:
            text = symmetry[self._known]
        lines = [f"NFNOpt({describe(self.rule)}, {text}, {len(entries)} tensors, {count} weights)"]
        for i, group in enumerate(self.param_groups):
            options = {k: v for k, v in group.items() if k not in ("params", "param_names", NETWORK)}
            lines.append(f"  group {i}: " + ", ".join(f"{k}={v}" for k, v in options.items()))
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------ helpers
@contextmanager
def _plain_modes(devices: Iterable[torch.device]) -> Iterator[None]:
    """No gradients, no autocast; and no inference mode, in which state that is made could not be used outside of it."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _refuse_unsupported(entry: NamedParam) -> None:
    if not entry.trained:
        return
    if entry.param.is_complex():
        raise RuntimeError(f"NFNOpt does not take complex parameters: {entry.name}. Train its torch.view_as_real.")
    if entry.grad.layout != torch.strided:
        raise RuntimeError(f"NFNOpt does not take sparse gradients: {entry.name}. Use nn.Embedding(sparse=False).")


def _add(params: list[Tensor], updates: list[Tensor], rates: list[float | Tensor]) -> None:
    """``params += rates * updates``, in place."""
    same = all(p.dtype == u.dtype for p, u in zip(params, updates, strict=True))
    if same and not isinstance(rates[0], Tensor) and rates.count(rates[0]) == len(rates):
        torch._foreach_add_(params, updates, alpha=rates[0])
        return
    for param, update, lr in zip(params, updates, rates, strict=True):
        param.copy_(stepped(param, update, lr))


def _largest_magnitudes(tensors: list[Tensor]) -> list[float]:
    """A bound of the largest magnitude of each, NaN if it has one: the 2-norm, which is fast, unless it overflows."""
    largest = [0.0] * len(tensors)
    for device in {t.device for t in tensors}:
        here = [i for i, t in enumerate(tensors) if t.device == device]
        norms = torch._foreach_norm([tensors[i] for i in here])
        if not all(x < LARGEST for x in torch.stack([n.float() for n in norms]).tolist()):
            norms = torch._foreach_norm([tensors[i] for i in here], math.inf)
        wide = any(n.dtype == torch.float64 for n in norms)
        stacked = torch.stack([n.to(torch.float64 if wide else torch.float32) for n in norms])
        for i, x in zip(here, stacked.tolist(), strict=True):
            largest[i] = x
    return largest
