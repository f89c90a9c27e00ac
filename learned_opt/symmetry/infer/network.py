"""From a model to its graph, and to the tensors that a group element moves.

``torch.export`` gives ATen operators at the level at which they were written (linear, layer_norm, attention), which is
the level of our rules; no decomposition is needed, except for operators that no rule knows, which get a second chance
in their decomposed form.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx import config as tracing
from torch.nn.modules import transformer

from learned_opt.calls import without_cache
from learned_opt.symmetry.infer.quiet import silent
from learned_opt.symmetry.infer.recurrence import UnknownLengths, as_operators, recorded_lengths
from learned_opt.symmetry.labels import STATISTICS, SymmetryError

VIEWS = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "select", "slice", "unsqueeze", "squeeze",
    "expand", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "narrow", "movedim", "contiguous",
    "to", "getitem", "view_as", "unfold", "mT", "numpy_T", "expand_as", "lift_fresh",
}  # fmt: skip
_MULTIPLICATIONS = ("linear", "conv", "mm", "addmm", "matmul")
_BATCH_NORMS = ("batch_norm", "cudnn_batch_norm", "native_batch_norm", "_native_batch_norm_legit")


class InferenceError(SymmetryError):
    """The symmetry of a model cannot be inferred."""


# ------------------------------------------------------------------------------------------- export
class _Selected(nn.Module):
    """A model of which only selected outputs count."""

    def __init__(self, model: nn.Module, outputs: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        self.training = model.training  # of this module alone: those of the model stay as they are

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs(self.model(*args, **kwargs))


def export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outputs: Callable[[Any], Any] | None = None,
) -> ExportedProgram:
    """The model's graph, in its present mode. The model is not changed.

    Raises:
        InferenceError: torch.export cannot trace the model, or the model raises on these inputs.
    """
    wrapped = _Selected(model, outputs or without_cache)
    try:
        try:
            return _exported(wrapped, args, kwargs, [])
        except Exception as error:
            if not _caused_by(error, UnknownLengths):
                raise
        return _exported(wrapped, args, kwargs, _lengths(wrapped, args, kwargs))
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InferenceError(
            f"{type(model).__name__} cannot be exported with these inputs, so that its symmetry cannot be inferred:"
            f" {type(error).__name__}: {first}\nIf the inputs are right (it must run with them), the model has python"
            " control flow that depends on data, or operators that torch.export does not trace. Write the symmetry by"
            " hand (docs/symmetry.md), or use learned_opt.independent(dict(model.named_parameters()))."
        ) from error


def _exported(
    wrapped: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], lengths: Sequence[Sequence[int]]
) -> ExportedProgram:
    with torch.enable_grad(), _traceable(), as_operators(lengths), silent():
        return torch.export.export(wrapped, tuple(args), dict(kwargs), strict=False)


def _lengths(wrapped: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[int]]:
    """Batch sizes of the sequences that a run of the model packs. Its buffers stay as they are."""
    found: list[list[int]] = []
    buffers = {n: b.clone() for n, b in wrapped.named_buffers()}
    with torch.no_grad(), recorded_lengths(found):
        torch.func.functional_call(wrapped, buffers, tuple(args), dict(kwargs))
    return found


def _caused_by(error: BaseException | None, kind: type[Exception]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def _traceable() -> Iterator[None]:
    """Functions of torch that look at what tensors hold, replaced by some that do not, for the time of an export; and
    no node says where it was called, which takes a fifth of the time and is not read."""
    detect, without = transformer._detect_is_causal_mask, getattr(tracing, "do_not_emit_stack_traces", False)
    # whether a mask is causal only says which kernel may be used; the mask is applied all the same
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    tracing.do_not_emit_stack_traces = True  # torch before it had this does not read it
    try:
        yield
    finally:
        transformer._detect_is_causal_mask, tracing.do_not_emit_stack_traces = detect, without


def operator_name(target: Any) -> str:
    """Name of an operator without namespace and overload."""
    if hasattr(target, "overloadpacket"):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


# ------------------------------------------------------------------------------------- the network
class Network:
    """An exported model: its graph, and the tensors that a group element moves.

    Attributes:
        tensors: parameters and running statistics by their first name in the model.
        placeholders: for every placeholder of the graph the name of its tensor, or the constant that it holds, or
            None for an input of the model.
    """

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph_module
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        first: dict[Any, str] = {}
        for name, tensor in named.items():
            first.setdefault(_storage_key(tensor), name)
        specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
        written = set(program.graph_signature.buffers_to_mutate.values())  # where the graph is functional
        mutated = _mutated(self.graph) | {n for n, s in specs.items() if s.target in written}
        changed = _statistics(self.graph, specs, mutated)
        self.tensors: dict[str, Tensor] = {}
        self.placeholders: dict[str, str | Tensor | None] = {}
        for node in self.graph.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs.get(node.name)
            target = (spec.target or "").removeprefix("model.") if spec is not None else ""
            if spec is not None and (spec.kind == InputKind.PARAMETER or node.name in changed):
                name = first[_storage_key(named[target])]
                self.tensors[name] = named[target]
                self.placeholders[node.name] = name
            elif spec is not None and spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                value = named.get(target)
                value = program.constants.get(spec.target) if value is None else value
                held = value is not None and value.device.type != "meta" and node.name not in mutated
                self.placeholders[node.name] = value.detach().clone() if held else None  # graphs may write into it
            else:
                self.placeholders[node.name] = None
        order = {n: i for i, n in enumerate(named)}
        self.tensors = dict(sorted(self.tensors.items(), key=lambda item: order[item[0]]))
        self.overlapping = _overlapping(self.tensors)

    def operations(self) -> float:
        """Multiplications of linear maps and convolutions with weights in one forward pass (an estimate)."""
        total = 0.0
        for node in self.graph.graph.nodes:
            held = [self.placeholders.get(a.name) for a in node.all_input_nodes if a.op == "placeholder"]
            matrices = [self.tensors[n] for n in held if isinstance(n, str) and self.tensors[n].ndim > 1]
            meta = node.meta.get("val")
            if matrices and isinstance(meta, Tensor) and operator_name(node.target).startswith(_MULTIPLICATIONS):
                total += meta.numel() * max(m.numel() / m.shape[0] for m in matrices)
        return total


def has_data(t: Tensor) -> bool:
    """Whether it is more than a shape: neither on the meta device nor fake."""
    return t.device.type != "meta" and not isinstance(t, FakeTensor)


def _storage_key(t: Tensor) -> Any:
    return (t.data_ptr(), tuple(t.shape), t.stride()) if has_data(t) and t.data_ptr() else id(t)


def _overlapping(tensors: Mapping[str, Tensor]) -> set[str]:
    """Tensors that share memory with another one of another shape: nothing can be said of them."""
    owners: dict[int, list[str]] = {}
    for name, t in tensors.items():
        if has_data(t) and t.untyped_storage().data_ptr():
            owners.setdefault(t.untyped_storage().data_ptr(), []).append(name)
    # parameters flattened into one buffer share storage without overlap
    found: set[str] = set()
    for names in owners.values():
        furthest, owner = 0, ""
        for name in sorted(names, key=lambda n: tensors[n].storage_offset()):
            t = tensors[name]
            end = int(t.storage_offset()) + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            if owner and t.storage_offset() < furthest:
                found |= {owner, name}
            if end > furthest:
                furthest, owner = end, name
    return found


def _statistics(graph: GraphModule, specs: Mapping[str, Any], mutated: Set[str]) -> set[str]:
    """Placeholders of running means and variances: what a batch norm reads, and what is called so.

    They are no constants, though a new network's look like some (0 and 1): training will have changed them.
    """
    found = set()
    for node in _all_nodes(graph):
        spec = specs.get(node.name)
        if node.op == "placeholder" and spec is not None and spec.kind == InputKind.BUFFER and spec.persistent:
            called_so = spec.target.rpartition(".")[2] in STATISTICS and node.meta["val"].is_floating_point()
            found |= {node.name} if called_so and node.name not in mutated else set()
        if node.op == "call_function" and operator_name(node.target).startswith(_BATCH_NORMS):
            found |= {
                a.name
                for a in node.args[1:]
                if isinstance(a, Node) and a.name in specs and specs[a.name].kind == InputKind.BUFFER
            }
    return found


def _mutated(graph: GraphModule) -> set[str]:
    """Placeholders that the graph writes into: what they hold now is not a constant."""
    found = set()
    for node in graph.graph.nodes:
        if node.op == "call_function" and is_in_place(operator_name(node.target)) and isinstance(node.args[0], Node):
            base: Any = node.args[0]
            while base.op == "call_function" and operator_name(base.target) in VIEWS:
                base = base.args[0]
            found.add(base.name)
    return found


def _all_nodes(graph: GraphModule) -> list[Node]:
    return [n for m in graph.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]


def is_in_place(name: str) -> bool:
    """``add_`` is, ``__and__`` is not."""
    return name.endswith("_") and not name.endswith("__")
