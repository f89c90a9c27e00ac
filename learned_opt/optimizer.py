"""NFNOpt: a ``torch.optim.Optimizer`` around an update rule.

A step hands weights, gradients and state to :func:`learned_opt.functional.apply_rule`, which all ways to take a step
share, and adds the updates to the weights (:mod:`learned_opt.stepper`).
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from learned_opt.binding import Binding
from learned_opt.buffers import create_slots
from learned_opt.distributed import refuse_pieces
from learned_opt.gradients import NanPolicy, nothing_to_do, usable
from learned_opt.habits import ScheduleWatch, warn_of_habit
from learned_opt.params import (
    Mode,
    NamedParam,
    ParamMap,
    check_choices,
    check_options,
    checked_group,
    named_params,
    refuse_unsupported,
)
from learned_opt.recorder import modules_behind
from learned_opt.report import Report, report_of
from learned_opt.rules import make_rule
from learned_opt.rules.base import UpdateRule
from learned_opt.sharded import create_shards
from learned_opt.spread import seen_by_all, spread_of
from learned_opt.state_dict import NETWORK, Loaded, add_identity, loaded, summary
from learned_opt.stepper import Stepper
from learned_opt.symmetry import Symmetry, SymmetryError


class NFNOpt(torch.optim.Optimizer):
    """Trains a network with an update rule that knows the symmetry of its weights.

    ::

        optimizer = NFNOpt(model.parameters(), total_steps=1000)

    Weights, gradients and state are computed in float32 (float64 for float64 parameters); narrower parameters are
    rounded at the end of a step. A step uses no random numbers and never changes a gradient.

    Args:
        params: a module, its ``parameters()`` or ``named_parameters()``, tensors, or parameter groups of any of these.
        symmetry: which axes of the parameters are permuted and rescaled together. "infer": inferred from the forward
            passes before the first step (docs/usage.md, Symmetry); if that fails, as "independent", with a warning.
            "independent": no axis shares anything with another, which is safe for any model. A :class:`Symmetry`: that
            one; it may describe more tensors than are optimised. Named parameters are matched by name, others by
            position.
        lr: multiplies the rate that the rule sets itself (also per group); a number or a 1-element tensor. 1 is right;
            one as of other optimizers, such as 1e-3, gives a warning.
        weight_decay: None: the rule's own small decay of matrices. Else decoupled as AdamW's, times the rate: ``lr``
            times what the rule sets, which is about 0.01 and decays; 0 is none. Also per group.
        total_steps: how many steps the training takes, if that is known; it sets the schedule.
        rule: a name in ``RULES``, the path of a ``.safetensors`` file of learned weights, or an :class:`UpdateRule`.
            "whitened_polar" are hand-made steps, "auto_lr" the same at a rate that the first steps measure, and
            "learned" the same under controls of a neural functional network, without effect until it is meta-trained.
        nan_policy: what a gradient with NaN or infinity does. "skip": the tensor is not updated at this step, its
            weights and state stay as they are (:attr:`skipped_steps` counts, a warning names it once). "raise":
            FloatingPointError before anything moves. "propagate": nothing is checked. (Where it is checked, a gradient
            with entries over 1e15 is scaled down to that, lest squares overflow.)
        maximize: ascend instead (also per group).
        state_dtype: of momentum, last update and roots: torch.bfloat16, float32 or float64. None: for float32
            parameters bfloat16 for the last update and roots of over 128 units, else float32. Second moments keep their
            dtype. A state that is loaded is converted.
        process_group: of ``torch.distributed``, on whose ranks these parameters, and their gradients at every step, are
            equal. All of its ranks then agree on one symmetry at the first step, which all must take. None: the group
            of the ``DistributedDataParallel`` that holds the parameters, if one does.

    Attributes:
        rule: the :class:`UpdateRule`, with its learned weights if it has any.
        nan_policy: as given; may be changed.
        skipped_steps: for each tensor, by name, the steps at which a non-finite gradient kept it from being updated.

    Raises:
        SymmetryError: the symmetry does not describe the parameters.
        ValueError: no parameters, or an option out of range.
        TypeError: something that is not a tensor.
        RuntimeError: parameters of ``FullyShardedDataParallel`` or ``parallelize_module``, or inside of
            ``ZeroRedundancyOptimizer``; with those of ``fully_shard`` another rule than "auto_lr" and "whitened_polar".
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
        state_dtype: torch.dtype | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        check_choices(symmetry, nan_policy, state_dtype)
        options = {"lr": lr, "weight_decay": weight_decay, "total_steps": total_steps, "maximize": maximize}
        check_options(options)
        self.rule = make_rule(rule)
        if self.rule.sets_rate:
            warn_of_habit(lr)
        self.nan_policy, self.state_dtype = nan_policy, state_dtype
        self.skipped_steps: Counter[str] = Counter()
        self._binding = Binding(symmetry, process_group)
        self._schedule = ScheduleWatch()
        self._stepper = Stepper(state_dtype)
        self._steps = 0  # those that the state's clock has counted, where reading it costs no synchronisation
        self._complete = False  # groups arrive one by one; the symmetry is for all of them
        modules = modules_behind(params)  # before their generators are used up
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, options)
        self.param_groups[0][NETWORK] = ""  # a key that torch's distributed checkpointing asks for by the groups' keys
        self._complete = True
        self._binding.watch(self, modules)
        if self._binding.recorder is None:
            self._bind()
        entries = [e for e in named_params(self.param_groups) if e.has_data]
        if entries and not isinstance(rule, UpdateRule):  # ours alone: keep it where the weights are
            self.rule.to(entries[0].param.device)

    # -- the step
    @torch._disable_dynamo  # as torch.compiler.disable, which would import the compiler with this module
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. ``torch.compile`` leaves it as it is.

        Args:
            closure: reevaluates the model, calls ``backward`` and returns the loss; run with gradients enabled.

        Returns:
            What the closure returns, else None.

        Raises:
            RuntimeError: a complex parameter, a sparse gradient or a parameter without data (meta device); at the first
                step ranks whose parameters, states or gradients differ.
            SymmetryError: a symmetry that was given or loaded does not describe the parameters.
            FloatingPointError: a non-finite gradient under ``nan_policy="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = named_params(self.param_groups)
        with _plain_modes({e.param.device for e in entries if e.has_data}):
            refuse_unsupported(entries)
            spread = spread_of([e.param for e in entries])
            entries = seen_by_all(entries, spread) if spread else entries
            create = create_shards if spread else create_slots
            trained = {e.name: e.param for e in entries if e.trained}
            if nothing_to_do([e for e in entries if e.trained], self.param_groups):
                create(self.rule, trained, self.state, self.state_dtype)
                return loss
            self._binding.settle(entries, self._steps)
            entries, symmetry = self._bind(entries)
            moving = usable([e for e in entries if e.trained], self.nan_policy, self.skipped_steps)
            create(self.rule, trained, self.state, self.state_dtype)
            self._steps += bool(moving)
            if moving and self.rule.ends:
                self._schedule.see(self.param_groups, self._steps)
            self._stepper.step(self.rule, entries, moving, symmetry, self.state, self.param_groups, spread)
        return loss

    # -- parameters, their names and their symmetry
    @property
    def symmetry(self) -> Symmetry | None:
        """How the axes of the parameters move together; None until it is inferred, at the first step."""
        return None if self._binding.known == "infer" else self._bind()[1]

    def report(self) -> Report:
        """What each tensor is told to do, and why (its strongest features); ``print`` it for a table.

        Raises:
            RuntimeError: before the first step, or the first after loading; of parameters of ``fully_shard``; of rules
                without such a state.
        """
        buffers = () if self._stepper.sharded else self._stepper.buffers.values()
        return report_of(self.rule, buffers, self.param_groups[0]["total_steps"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, also in mid-training. A symmetry that was given must describe them too.

        Raises:
            SymmetryError, ValueError, RuntimeError: as the constructor; the optimizer is then as before.
        """
        modules = modules_behind(param_group)
        if isinstance(param_group, dict):  # torch refuses anything else
            param_group = checked_group(param_group, self.param_groups)
        super().add_param_group(param_group)
        try:
            refuse_pieces([p for group in self.param_groups for p in group["params"]], self.rule)
            if self._complete and self._binding.recorder is None:
                self._bind()
        except (SymmetryError, RuntimeError):
            self.param_groups.pop()
            raise
        if self._complete:
            self._binding.expect(modules)

    def _bind(self, entries: list[NamedParam] | None = None) -> tuple[list[NamedParam], Symmetry]:
        """The tensors under the symmetry's names, and the symmetry."""
        return self._binding.bound(named_params(self.param_groups) if entries is None else entries)

    # -- saving and loading
    def state_dict(self) -> dict[str, Any]:
        """State by position and parameter groups, as torch's.

        The first group also names the rule and holds theta (tensors) and the symmetry (JSON, with the name of every
        position), so that a run resumes bit for bit with what it was started with.

        Of sharded parameters the state is in shards, as they are; all ranks must call this.
        """
        kept, state = self.state, self._stepper.at_rest(self.state)
        self.state = defaultdict(  # not of tensors that are gone
            dict, {p: state[p] for group in self.param_groups for p in group["params"] if p in state}
        )
        try:
            saved = super().state_dict()
        finally:
            self.state = kept
        numbers = self.__getstate__()["_numbers"]
        add_identity(saved, self.rule, self._binding.known, list(numbers.values()))
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; accumulators keep their precision.

        theta is restored as well (into a copy of the rule, with a warning if it differs), and so is the symmetry if
        none was given: then nothing is inferred any more.

        Raises:
            ValueError: another rule, other names, shapes or slots, or an altered theta. Nothing is changed then.
        """
        found: list[Loaded] = []

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            saved = {**saved, "param_groups": [dict(g) for g in saved["param_groups"]]}
            found.append(loaded(saved, self.param_groups, self.rule, self._binding.known, self._binding.given))
            return saved

        def restore(_: torch.optim.Optimizer) -> None:
            self.rule, known, state, self._stepper.loaded, total_steps = found[0]
            self._binding.load(known)
            for p, slots in state:  # torch has cast them to the dtype of the parameters
                self.state[p] |= slots
            for group in self.param_groups:
                group["total_steps"] = total_steps
            self.param_groups[0][NETWORK] = ""
            self._steps = max((int(n["clock"]) for n in self._stepper.loaded.values()), default=0)
            if known == "independent" or "param_names" in self.param_groups[0]:
                self._binding.stop()  # of others, the next forward pass tells their order

        # after the caller's hooks that may adapt the state dict, before those that see it loaded
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._binding.known, ParamMap):
            self._bind()  # the names where the groups have their tensors now
        kept = ("rule", "nan_policy", "state_dtype", "skipped_steps", "_binding", "_steps", "_schedule")
        own = {k: getattr(self, k) for k in kept}
        return super().__getstate__() | own | {"_numbers": self._stepper.numbers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)
        numbers = own.pop("_numbers", None)
        super().__setstate__(own)
        self._stepper = Stepper(self.state_dtype, self._stepper.loaded if numbers is None else numbers)
        self._complete = True
        self._schedule = ScheduleWatch(self._schedule.outlasted)
        self._binding.load(self._binding.known)
        if "_binding" in state:  # a copy; torch also calls this to load a state dict
            self._binding = copy.copy(self._binding)
            self._binding.watch(self)
        for group in self.param_groups:  # options that an older state dict lacks
            for option in ("lr", "weight_decay", "total_steps", "maximize"):
                group.setdefault(option, self.defaults[option])

    def __repr__(self) -> str:
        return summary(self.rule, self._binding.known, self.param_groups)


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
