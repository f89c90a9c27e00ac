"""Which module an optimizer trains, and one call of it: what inferring its symmetry needs.

``NFNOpt(model.parameters())`` gets tensors, not the model. Its forward pass tells the rest. One mechanism serves every
way to pass the parameters, and ``torch.compile`` before or after: a global forward *pre*-hook that ends with the first
call of a module that has all the parameters.

* The first call to come by is the outermost, and it is the one to take: the function of the outermost module is what
  is trained. A module inside of it may hold all the parameters too and not show every use of them (the body of a
  language model whose head reads the embedding), so that its symmetry need not be one of the whole.
* The hook is gone before the forward pass runs. Dynamo traces hooks and guards on them: one that stayed until the first
  step would make every compiled model compile twice (measured on torch 2.15: 2 frames instead of 1, for global and for
  per-module hooks; 1 frame this way).
* Global pre-hooks are not told keyword arguments; a forward hook on that one module, for that one call, is.

The generator ``model.parameters()`` also holds the model in its frame. That is used for what the hook cannot see: a
model that was compiled in place (``model.compile()``), a call with other tensors in the place of the parameters
(``torch.func.functional_call``), and parameters of several modules that are never called as one.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import GeneratorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from learned_opt.symmetry.lock import EXPORT_LOCK

# what a compiled module says about any global hook, once: about ours it is untrue, which does not fire twice
HOOK_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks"


class Call(NamedTuple):
    """A forward pass: the module (without wrappers), detached arguments, and the modes it ran in."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: dict[nn.Module, bool]

    @contextmanager
    def in_its_modes(self) -> Iterator[None]:
        """The module in training or evaluation mode, as it was when it was called."""
        now = {m: m.training for m in self.training}
        try:
            for module, mode in self.training.items():
                module.training = mode
            yield
        finally:
            for module, mode in now.items():
                module.training = mode


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` around it.

    These call what they hold with the arguments that they get. Of any other wrapper that is not known.
    """
    while True:
        if "_orig_mod" in module._modules:  # a ScriptModule has no dict there, and no get
            module = module.get_submodule("_orig_mod")
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def modules_behind(params: Any) -> list[nn.Module]:
    """The modules that the generators among ``params`` (or its groups) run over, outermost only, in order.

    It must be asked before the generators are used up: ``model.parameters()`` and ``named_parameters()``, generator
    expressions over them, and generators that ``yield from`` them.
    """
    found: list[nn.Module] = []
    _look_behind(params, found)
    inner = {m for root in found for m in root.modules() if m is not root}
    return [m for m in dict.fromkeys(found) if m not in inner]


def _look_behind(params: Any, found: list[nn.Module]) -> None:
    if isinstance(params, nn.Module):
        found.append(unwrapped(params))
    elif isinstance(params, GeneratorType):
        names = params.gi_frame.f_locals if params.gi_frame is not None else {}
        _look_behind(params.gi_yieldfrom, found)
        _look_behind(names.get(".0"), found)  # what a generator expression iterates over
        if isinstance(names.get("self"), nn.Module):
            found.append(unwrapped(names["self"]))
    elif isinstance(params, Mapping):
        _look_behind(params.get("params"), found)
    elif isinstance(params, list | tuple) and any(isinstance(x, Mapping) for x in params):
        for group in params:
            _look_behind(group, found)


class ForwardRecorder:
    """Records the forward passes of the modules that an optimizer trains; see the module's docstring.

    :attr:`calls` holds the call of a module with all the optimizer's parameters, or, until one is seen, of those among
    ``roots`` that were called. Only calls that record gradients count: they are what is trained. Nothing here keeps the
    optimizer alive, and its end ends the recording.

    Args:
        optimizer: any optimizer with parameters.
        roots: modules known to hold some of them.
    """

    _waiting: "weakref.WeakSet[ForwardRecorder]" = weakref.WeakSet()

    def __init__(self, optimizer: torch.optim.Optimizer, roots: Iterable[nn.Module] = ()) -> None:
        self.calls: list[Call] = []
        self._missing: list[nn.Module] = []
        self._in_place: list[tuple[nn.Module, Callable[..., Any], Callable[..., Any]]] = []
        self._handles: list[RemovableHandle] = []
        self._optimizer = weakref.ref(optimizer, lambda _: self.release())
        self._global = register_module_forward_pre_hook(self._before)
        self._waiting.add(self)
        warnings.filterwarnings("ignore", HOOK_WARNING)
        self.expect(roots)

    def expect(self, roots: Iterable[nn.Module]) -> None:
        """Wait for these modules too, if it is still waited."""
        if self in self._waiting:
            for root in roots:
                self._missing.append(root)
                if root._compiled_call_impl is not None:
                    self._intercept(root, root._compiled_call_impl)

    def release(self) -> list[Call]:
        """Remove every trace of the recorder, and hand over what was seen."""
        self._stop_waiting()
        for handle in self._handles:
            handle.remove()
        calls, self.calls, self._handles = self.calls, [], []
        return calls

    def _stop_waiting(self) -> None:
        self._global.remove()
        for module, ours, compiled in self._in_place:
            if module._compiled_call_impl is ours:
                module._compiled_call_impl = compiled
        self._in_place, self._missing = [], []
        if self in self._waiting:
            self._waiting.remove(self)
            if not self._waiting:
                filters: Any = warnings.filters  # a list, which the standard library's types call a sequence
                filters[:] = [f for f in filters if getattr(f[1], "pattern", None) != HOOK_WARNING]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The global pre-hook. Under dynamo and export it must be nothing: they see no real tensors.

        Nor is a scripted module anything: it takes no hooks, and what it calls cannot be exported.
        """
        if torch.compiler.is_dynamo_compiling() or isinstance(module, torch.jit.ScriptModule):
            return
        if torch.compiler.is_compiling() and not EXPORT_LOCK.is_elsewhere():
            return
        if torch.is_grad_enabled() and self._wanted(module):
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def _wanted(self, module: nn.Module) -> bool:
        """Whether to take this call; nothing more is waited for where it is the last that is needed."""
        optimizer, inner = self._optimizer(), unwrapped(module)
        if optimizer is None:
            return False
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if not _is_integer(p)}
        if trained <= {id(p) for p in inner.parameters()}:
            self.calls.clear()
            self._stop_waiting()
            return True
        if not any(inner is root for root in self._missing):
            return False
        self._missing = [root for root in self._missing if root is not inner]
        if not self._missing:
            self._stop_waiting()
        return True

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        for handle in self._handles:
            if handle.id in module._forward_hooks:
                handle.remove()
        self._keep(module, args, kwargs)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        inner = unwrapped(module)
        self.calls.append(Call(inner, args, kwargs, {m: m.training for m in inner.modules()}))

    def _intercept(self, root: nn.Module, compiled: Callable[..., Any]) -> None:
        """See a call of a module that was compiled in place: its hooks run inside of what is compiled."""

        def ours(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and self._wanted(root):
                self._keep(root, args, kwargs)
            return compiled(*args, **kwargs)

        root._compiled_call_impl = ours
        self._in_place.append((root, ours, compiled))


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
