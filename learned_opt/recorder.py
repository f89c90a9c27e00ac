"""Which module an optimizer trains, and the calls of it: what inferring its symmetry needs.

``NFNOpt(model.parameters())`` gets tensors, not the model. Its forward passes tell the rest. One mechanism serves every
way to pass the parameters, and ``torch.compile`` before or after: a global forward *pre*-hook that ends with the first
call of a module that has all the parameters, or with the first step.

* The first call to come by is the outermost, and it is the one to take: the function of the outermost module is what
  is trained. A module inside of it may hold all the parameters too and not show every use of them (the body of a
  language model whose head reads the embedding), so that its symmetry need not be one of the whole.
* The global hook is gone before the forward pass runs. Dynamo traces hooks and guards on them: one that stayed until
  the first step would make every compiled model compile twice (measured on torch 2.15: 2 frames instead of 1, for
  global and for per-module hooks; 1 frame this way).
* Until then every outermost call of a module that has some of the parameters counts: where no module with all of them
  is called (a training step calls an encoder and a decoder), these *parts* are what is known, if their gradients can
  be compared: only that tells that they have no other uses.
* A module of which nothing is compiled keeps hooks of its own until the first step: what it is called for may differ
  from call to call (modes, arguments, inputs), and the symmetry must be one of all of them. The gradients that reach
  the outputs and the parameters tell whether there were other uses of the parameters.

The generator ``model.parameters()`` also holds the model in its frame. That is used for what the hook cannot see: a
model that was compiled in place (``model.compile()``), a call with other tensors in the place of the parameters
(``torch.func.functional_call``), and parameters of several modules that are never called as one.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from learned_opt.calls import Call, kind_of, sample, unwrapped
from learned_opt.symmetry.lock import EXPORT_LOCK

__all__ = ["Call", "ForwardRecorder", "modules_behind"]

# what a compiled module says about any global hook, once: about ours it is untrue, which does not fire twice
HOOK_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks"
KEPT = 8  # calls whose gradients can be compared (one if they cannot); of later ones those that are unlike these
PARTS = 64  # modules that are called one by one; what others hold stands beside these
DIFFERENTIATED = 20_000_000  # weights; of larger modules gradients are not compared


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

    :attr:`calls` holds the calls of a module with all the optimizer's parameters, or, until one is seen, of ``roots``
    and of other outermost modules with some of them. Only calls that record gradients count: they are what is trained.
    Nothing here keeps the optimizer alive, and its end ends the recording.

    Args:
        optimizer: any optimizer with parameters.
        roots: modules known to hold some of them: when all were called, no others are waited for.
    """

    _waiting: "weakref.WeakSet[ForwardRecorder]" = weakref.WeakSet()

    def __init__(self, optimizer: torch.optim.Optimizer, roots: Iterable[nn.Module] = ()) -> None:
        self.calls: list[Call] = []
        self._running: list[Call] = []
        self._gradients: dict[int, Tensor] = {}
        self._missing: list[nn.Module] = []
        self._parts: set[nn.Module] = set()
        self._unrelated: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # called, and hold none of the parameters
        self._in_place: list[tuple[nn.Module, Callable[..., Any], Callable[..., Any]]] = []
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}  # by the module that was called
        self._optimizer = weakref.ref(optimizer, lambda _: self.release())
        self._global = register_module_forward_pre_hook(self._before)
        self._waiting.add(self)
        warnings.filterwarnings("ignore", HOOK_WARNING)
        self.expect(roots)

    def expect(self, roots: Iterable[nn.Module]) -> None:
        """Wait for these modules too, if it is still waited. There may be parameters that others hold by now."""
        self._unrelated.clear()
        if self in self._waiting:
            for root in roots:
                self._missing.append(root)
                if root._compiled_call_impl is not None:
                    self._intercept(root, root._compiled_call_impl)

    def release(self) -> list[Call]:
        """Remove every trace of the recorder, and hand over what was seen."""
        self._stop_waiting()
        self._let_go()
        calls, self.calls, self._gradients = self.calls, [], {}
        return calls

    def _let_go(self) -> None:
        for module in list(self._handles):
            self._forget(module)
        self._running = []

    def _forget(self, module: nn.Module) -> None:
        """See no more calls of a module."""
        self._parts.discard(module)
        for handle in self._handles.pop(module):
            handle.remove()

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
        if _is_traced() or module in self._unrelated or isinstance(module, torch.jit.ScriptModule):
            return
        if not (torch.is_grad_enabled() and self._wanted(module)):
            return
        compiled, inner = _is_compiled(module), unwrapped(module)
        self._running.append(Call.begin(inner, args, compiled, inner in self._parts))
        if compiled:
            self._handles[inner] = [module.register_forward_hook(_Hook(self._only), with_kwargs=True)]
        else:
            self._handles[inner] = [
                module.register_forward_pre_hook(_Hook(self._again), with_kwargs=True),
                module.register_forward_hook(_Hook(self._after), with_kwargs=True),
                *self._follow_gradients(module),
            ]

    def _wanted(self, module: nn.Module) -> bool:
        """Whether to take this call; nothing more is waited for where it is the last that is needed."""
        inner, trained = unwrapped(module), self._trained()
        if not trained:
            return False
        if {id(p) for p in trained} <= {id(p) for p in inner.parameters()}:
            self.calls.clear()
            self._let_go()
            self._stop_waiting()
            return True
        if any(inner is root for root in self._missing):
            self._missing = [root for root in self._missing if root is not inner]
            if not self._missing:
                self._stop_waiting()
        elif self._is_outermost(inner, trained):
            self._parts.add(inner)
        else:
            if not self._has_some(inner):
                self._unrelated.add(module)
            return False
        within = {m for m in inner.modules() if m in self._handles}
        self.calls = [c for c in self.calls if c.module not in within]
        for module in within:  # called alone before
            self._forget(module)
        return True

    def _is_outermost(self, module: nn.Module, trained: list[Tensor]) -> bool:
        """Whether a module has some of the parameters, and is in none whose calls are seen."""
        mine = {id(p) for p in module.parameters()}
        if len(self._handles) >= PARTS or not any(id(p) in mine for p in trained):
            return False
        return not any(module is m for other in self._handles for m in other.modules())

    def _has_some(self, module: nn.Module) -> bool:
        """Whether a module has some of the parameters, or of those that may still get data."""
        mine = {id(p) for p in module.parameters()}
        return any(id(p) in mine for p in self._params())

    def _trained(self) -> list[Tensor]:
        return [p for p in self._params() if _counts(p)]

    def _params(self) -> list[Tensor]:
        optimizer = self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    def _only(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the one call of a compiled module that is recorded."""
        for handle in self._handles.get(unwrapped(module), ()):
            handle.remove()
        self._keep(kwargs, output)

    def _again(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a further call."""
        if _is_traced() or not torch.is_grad_enabled():
            return
        inner = unwrapped(module)
        mine = [c for c in self.calls if c.module is inner]
        if len(mine) >= (KEPT if self._comparable() else 1):
            for call in mine:
                call.complete = False
            kind = kind_of(inner, args, kwargs, shapes=False)
            if len(mine) >= 2 * KEPT or any(c.kind(shapes=False) == kind for c in mine):
                return
        self._running.append(Call.begin(inner, args, _is_compiled(module), inner in self._parts))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inner = unwrapped(module)
        if torch.is_grad_enabled() and self._running and self._running[-1].module is inner:
            self._keep(kwargs, output)

    def _keep(self, kwargs: dict[str, Any], output: Any) -> None:
        call = self._running.pop()
        call.gradients = self._gradients
        call.end(kwargs, output, not call.compiled and self._comparable())
        self.calls.append(call)

    # -- gradients
    def _comparable(self) -> bool:
        """Whether gradients can be those of the recorded calls: not if they are averaged over processes."""
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        alone = alone or torch.distributed.get_world_size() == 1
        return alone and sum(p.numel() for p in self._trained()) <= DIFFERENTIATED

    def _follow_gradients(self, module: nn.Module) -> list[RemovableHandle]:
        """Take a sample of each gradient as a backward pass leaves it, before anything (clipping) changes it.

        Those of all parameters of the module: some may be another optimizer's, which shares what is inferred here.
        """
        followed = [p for p in module.parameters() if p.requires_grad and p.is_leaf] if self._comparable() else []
        return [p.register_post_accumulate_grad_hook(_Hook(self._accumulated)) for p in followed]

    def _accumulated(self, p: Tensor) -> None:
        if p.grad is None or p.grad.layout != torch.strided or p._backward_hooks or torch.is_grad_enabled():
            self._gradients.pop(id(p), None)  # nothing to compare, or changed by a hook
        else:
            self._gradients[id(p)] = sample(p.grad)

    def _intercept(self, root: nn.Module, compiled: Callable[..., Any]) -> None:
        """See a call of a module that was compiled in place: its hooks run inside of what is compiled."""

        def ours(*args: Any, **kwargs: Any) -> Any:
            if not (torch.is_grad_enabled() and self._wanted(root)):
                return compiled(*args, **kwargs)
            self._handles[root] = []
            self._running.append(Call.begin(root, args, True))
            output = compiled(*args, **kwargs)
            self._keep(kwargs, output)
            return output

        root._compiled_call_impl = ours
        self._in_place.append((root, ours, compiled))


class _Hook:
    """A hook that copies of the module (and pickles of it) do not have."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if self.function is not None:
            self.function(*args)

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return _Hook()

    def __reduce__(self) -> Any:
        return _Hook, ()


def _is_traced() -> bool:
    """Whether what runs in this thread is being compiled or exported."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and not EXPORT_LOCK.is_elsewhere()


def _is_compiled(module: nn.Module) -> bool:
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in module.modules())


def _counts(tensor: Tensor) -> bool:
    """Whether a module must have this tensor to be what is trained: no integers, nothing that is frozen elsewhere."""
    trainable = tensor.is_floating_point() or tensor.is_complex()
    return trainable and (tensor.requires_grad or tensor.device.type != "meta")
