"""What is kept of a call of a module, so that the function that ran can be told from the one that is there later.

A module is not its function: ``forward`` may be replaced for the time of one call (Lightning's strategies run
``training_step`` so), hooks change what comes out, buffers are written. A :class:`Call` holds what is needed to put
that back, and samples of what the call returned and of the gradients, against which the inference is checked.
"""

import random
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

COPIED = 256_000_000  # bytes of inputs, and of buffers, that are copied; above, inputs are kept as they are
DIFFERENTIATED = 32_000_000  # entries of an output whose gradient is kept
SAMPLE = 512  # entries
_GOLDEN = 0.6180339887498949
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


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


def sample(t: Tensor) -> Tensor:
    """At most ``SAMPLE`` entries ``[n]`` of a tensor, spread over it, always from the same places, as float64."""
    flat = t.detach().reshape(-1)
    if flat.numel() > SAMPLE:
        at = torch.arange(SAMPLE, dtype=torch.float64).mul_(_GOLDEN).frac_().mul_(flat.numel()).long()
        flat = flat[at.to(flat.device)]
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).double().clone()


def without_cache(output: Any) -> Any:
    """What counts of a model's output by default: all of it, except the key-value cache of a language model.

    A cache is known by its class (``DynamicCache``), wherever it is, or as tensors by its old key. Other objects that
    are no tensors are not dropped: what they hold may be the output (a dataclass), which must not be forgotten.
    """
    if isinstance(output, Mapping):
        output = {k: v for k, v in output.items() if k != "past_key_values" and v is not None}
    return pytree.tree_map(lambda x: None if _is_cache(x) else x, output, is_leaf=_is_cache)


def _is_cache(x: Any) -> bool:
    return any(c.__name__.endswith("Cache") for c in type(x).__mro__)


# ---------------------------------------------------------------------------------------- random state
@dataclass(frozen=True)
class Noise:
    """States of the generators that a call on a device draws from."""

    python: Any
    numpy: Any
    cpu: Tensor
    device: torch.device | None = None
    accelerator: Tensor | None = None

    @classmethod
    def now(cls, module: nn.Module) -> "Noise":
        """Those of Python, NumPy, the CPU, and of the first CUDA device on which the module has a parameter."""
        device = next((p.device for p in module.parameters() if p.device.type == "cuda"), None)
        state = torch.cuda.get_rng_state(device) if device is not None and _readable() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), device, state)

    def tossed(self) -> bool:
        """Whether Python's or NumPy's generator is in another state now."""
        _, keys, *rest = self.numpy
        _, now, *rest_now = np.random.get_state()
        return random.getstate() != self.python or rest != rest_now or not np.array_equal(keys, now)

    def set(self) -> None:
        """Make them the present states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device or torch.device("cuda"))

    @contextmanager
    def again(self, module: nn.Module) -> Iterator[None]:
        """These states for a time, and those of before afterwards."""
        before = Noise.now(module)
        self.set()
        try:
            yield
        finally:
            before.set()


def _readable() -> bool:
    return not torch.cuda.is_current_stream_capturing()


# ------------------------------------------------------------------------------------------- the call
@dataclass(eq=False)
class Call:
    """A forward pass that recorded gradients.

    Attributes:
        module: what was called, without wrappers.
        args: detached arguments, as they were before the call.
        kwargs: the same of keyword arguments.
        training: mode of every module.
        forwards: for modules whose ``forward`` was replaced on the instance at the time of the call, what it was.
        noise: random states before the call.
        buffers: copies of the module's buffers before the call.
        compiled: what ran was, or may have been, compiled: noise and rounding are others.
        autocast: the kinds of devices on which it ran in mixed precision, and in which type.
        tossed: it drew numbers from the generators of Python or NumPy, on which branches may depend.
        outputs: samples of the tensors among the leaves of what it returned; None for other leaves.
        shapes: the shapes of those tensors.
        output_grads: for every leaf the gradient that a backward pass brought it, if one did.
        explains: whether ``output_grads`` has all that reached the outputs. False where gradients were themselves
            differentiated, where the call was compiled and where outputs are very large.
        gradients: of every trained parameter by its id, a sample of its gradient after the last backward pass. Shared
            by all calls of one recording.
        complete: whether ``gradients`` is of the calls that were kept, and of no others.
        part: the module has some of the optimizer's parameters and was not named: that it has no other uses must be
            shown by the gradients.
        reads: what tells this forward pass from others: the memory of arguments and parameters, and how often each was
            written to.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: dict[nn.Module, bool]
    forwards: dict[nn.Module, Any] = field(default_factory=dict)
    noise: Noise | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    compiled: bool = False
    autocast: dict[str, torch.dtype] = field(default_factory=dict)
    tossed: bool = False
    outputs: list[Tensor | None] | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    output_grads: dict[int, Tensor] = field(default_factory=dict)
    explains: bool = False
    gradients: MutableMapping[int, Tensor] = field(default_factory=dict)
    complete: bool = True
    part: bool = False
    reads: tuple[Any, ...] = ()

    @classmethod
    def begin(cls, module: nn.Module, args: tuple[Any, ...], compiled: bool, part: bool = False) -> "Call":
        """What must be taken down before the call."""
        buffers, left = {}, COPIED
        for name, b in sorted(module.named_buffers(), key=lambda item: item[1].numel()):
            left -= b.numel() * b.element_size()
            if left < 0:
                break
            if b.layout == torch.strided and b.device.type != "meta":
                buffers[name] = b.detach().clone()
        kinds = {p.device.type for p in module.parameters()} | {"cpu"}
        return cls(
            module,
            copied(args),
            {},
            _modes(module),
            _forwards(module),
            Noise.now(module),
            buffers,
            compiled,
            {k: torch.get_autocast_dtype(k) for k in kinds if k != "meta" and torch.is_autocast_enabled(k)},
            part=part,
            reads=_memory((args, list(module.parameters()))),
        )

    def end(self, kwargs: dict[str, Any], output: Any, differentiate: bool) -> None:
        """What is known after it; with ``differentiate`` the gradients of its outputs are kept when they come."""
        self.kwargs = copied(kwargs)
        self.tossed = self.noise is not None and self.noise.tossed()
        leaves = pytree.tree_leaves(without_cache(output))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self.explains = differentiate and sum(t.numel() for t in tensors) <= DIFFERENTIATED
        self.explains = self.explains and not any(t.requires_grad and t.is_leaf for t in tensors)
        plain = all(t.layout == torch.strided and not t.is_nested for t in tensors)
        self.outputs = [sample(x) if isinstance(x, Tensor) else None for x in leaves] if plain else None
        self.shapes = [tuple(t.shape) for t in tensors] if plain else []
        for i, leaf in enumerate(leaves):
            if self.explains and isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda grad, i=i: self._reached(i, grad))

    def _reached(self, leaf: int, grad: Tensor) -> None:
        if torch.is_grad_enabled():  # a gradient that is to be differentiated: the parameters get more than this
            self.explains = False
            self.output_grads.clear()
        elif self.explains:
            before = self.output_grads.get(leaf)
            self.output_grads[leaf] = grad.detach().clone() if before is None else before + grad

    def kind(self, *, shapes: bool = True) -> Any:
        """Calls of one kind ran the same code, as far as can be told without looking at what tensors hold."""
        return kind_of(self.module, self.args, self.kwargs, self.training, self.forwards, shapes=shapes)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast as it was at the call."""
        with ExitStack() as stack:
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    @contextmanager
    def as_it_ran(self) -> Iterator[None]:
        """The module in the modes, and with the ``forward`` methods, with which it was called."""
        modes = {m: m.training for m in self.training}
        forwards = _forwards(self.module)
        try:
            for module, mode in self.training.items():
                module.training = mode
            _install(self.training, self.forwards)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            _install(self.training, forwards)


def _memory(read: Any) -> tuple[Any, ...]:
    """What tells forward passes apart: the same memory, not written to in between, is read in one alone."""
    found: list[Any] = []
    for x in pytree.tree_leaves(read):
        try:
            found.append((x.data_ptr(), x._version, x.shape) if isinstance(x, Tensor) else _plain(x))
        except RuntimeError:  # without memory
            found.append(object())
    return tuple(found)


def _plain(x: Any) -> Any:
    return repr(x) if isinstance(x, _PLAIN) else id(x)


def _modes(module: nn.Module) -> dict[nn.Module, bool]:
    return {m: m.training for m in module.modules()}


def _forwards(module: nn.Module) -> dict[nn.Module, Any]:
    return {m: m.__dict__["forward"] for m in module.modules() if "forward" in m.__dict__}


def kind_of(
    module: nn.Module,
    args: Any,
    kwargs: Any,
    modes: Mapping[nn.Module, bool] | None = None,
    forwards: Mapping[nn.Module, Any] | None = None,
    *,
    shapes: bool = True,
) -> Any:
    """The kind of a call (:meth:`Call.kind`), in the modes and with the methods given, or as they are now."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    what = tuple(_leaf(x, shapes) for x in leaves)
    modes = _modes(module) if modes is None else modes
    forwards = _forwards(module) if forwards is None else forwards
    methods = tuple((id(m), _code(f)) for m, f in forwards.items())
    return str(structure), what, tuple(modes.values()), methods


def _install(modules: Mapping[nn.Module, Any], forwards: Mapping[nn.Module, Any]) -> None:
    for m in modules:
        if m in forwards:
            m.__dict__["forward"] = forwards[m]
        else:
            m.__dict__.pop("forward", None)


def copied(x: Any) -> Any:
    """Arguments without gradients, with tensors of their own as far as they are not too large."""
    tensors = [t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)]
    small = sum(t.numel() * t.element_size() for t in tensors if t.layout == torch.strided) <= COPIED
    seen: dict[int, Tensor] = {}

    def copy(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if id(t) not in seen:
            seen[id(t)] = t.detach().clone() if small and t.layout == torch.strided else t.detach()
        return seen[id(t)]

    return pytree.tree_map(copy, x)


def _leaf(x: Any, shapes: bool) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape if shapes else ()), x.dtype
    return repr(x) if isinstance(x, _PLAIN) else type(x).__name__


def _code(x: Any, depth: int = 4) -> Any:
    """What tells one function from another, if each call has a closure (a partial, a bound method) of its own."""
    if depth and hasattr(x, "__func__"):
        return _code(x.__func__, depth - 1), id(x.__self__)
    if depth and isinstance(x, partial):
        return _code(x.func, depth - 1), tuple(_code(a, depth - 1) for a in x.args)
    if depth and hasattr(x, "__code__"):
        cells = x.__closure__ or ()
        return id(x.__code__), tuple(_code(_content(c), depth - 1) for c in cells)
    return id(x)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
