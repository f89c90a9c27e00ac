"""A module whose parameters are in shards, as a module of whole tensors without data: enough to infer its symmetry.

``fully_shard`` leaves DTensors in a module, between whose forward and backward passes there are no whole weights
anywhere. The twin has its classes, buffers and other attributes; its parameters are fake tensors, which have shape,
dtype and device, but no memory; hooks of torch.distributed, which would look for shards, are gone, and nothing is
compiled.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learned_opt.calls import Call

if TYPE_CHECKING:
    from learned_opt.params import NamedParam

_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of modules, by their id
_LEFT_OUT = ("__composable_api_state_key_", "_fsdp", "_is_fsdp", "_compiled_call_impl")  # starts of attributes' names


def on_twins(calls: list[Call], params: "list[NamedParam]") -> "tuple[list[Call], list[NamedParam]]":
    """The calls and the parameters of twins of the modules that were called; as they are, where nothing is sharded."""
    modules = list(dict.fromkeys(c.module for c in calls))
    if not any(_is_sharded(p) for m in modules for p in m.parameters()):
        return calls, params
    memo: dict[int, Any] = {}
    for module in modules:
        _twin(module, memo)
    twins = [
        replace(
            call,
            module=memo[id(call.module)],
            training={memo[id(m)]: mode for m, mode in call.training.items()},
            forwards={memo[id(m)]: copy.deepcopy(f, memo) for m, f in call.forwards.items()},
            explains=False,
        )
        for call in calls
    ]
    return twins, [p._replace(param=memo.get(id(p.param), p.param)) for p in params]


def _is_sharded(p: Tensor) -> bool:
    return hasattr(p, "placements")


def _twin(module: nn.Module, memo: dict[int, Any]) -> None:
    """Add the twins of a module, of all modules in it and of their parameters to ``memo``, as of ``copy.deepcopy``."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for p in (p for p in module.parameters() if id(p) not in memo):
            whole = torch.empty(p.shape, dtype=p.dtype, device=p.device)
            memo[id(p)] = nn.Parameter(whole, requires_grad=p.requires_grad)
    for b in (b for b in module.buffers() if id(b) not in memo):
        memo[id(b)] = b.detach().clone()
    new = [m for m in module.modules() if id(m) not in memo]
    for m in new:
        memo[id(m)] = object.__new__(_plain_class(m))
    for m in new:
        kept = {k: v for k, v in m.__dict__.items() if not k.startswith(_LEFT_OUT)}
        for name in _OWN:
            kept[name] = type(kept[name])((k, hook) for k, hook in kept[name].items() if not _is_of_torch(hook))
        memo[id(m)].__dict__.update({k: _copied(v, memo) for k, v in kept.items()})


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``fully_shard`` has derived another one from."""
    from torch.distributed.fsdp import FSDPModule

    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def _is_of_torch(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed")


def _copied(x: Any, memo: dict[int, Any]) -> Any:
    """A copy, with twins in it; what cannot be copied (a process group) is shared."""
    try:
        return copy.deepcopy(x, memo)
    except Exception:
        return x
