"""Parameters that ``fully_shard`` has cut into rows: how they are cut, and the way to whole tensors and back."""

import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from learned_opt.gradients import largest_magnitudes
from learned_opt.params import NamedParam
from learned_opt.rules.base import UpdateRule

BUNDLES, LEAST, MOST = 8, 1_000_000, 64_000_000  # exchanges of all tensors, and entries of whole tensors in each

Key = TypeVar("Key", bound=Hashable)


# ------------------------------------------------------------------------------------- what is sharded, and how
class Spread(NamedTuple):
    """How the parameters of an optimizer are cut: rows of each over the ranks of one dimension of a mesh."""

    mesh: Any
    placements: tuple[Any, ...]
    dim: int

    @property
    def group(self) -> "dist.ProcessGroup":
        """The ranks that together have every tensor once."""
        return self.mesh.get_group(self.dim)

    @property
    def device(self) -> torch.device:
        """Where what is sent must be."""
        return torch.device(self.mesh.device_type)

    def on_all(self, x: Tensor) -> Tensor:
        """The maximum over all ranks of the mesh."""
        found = x.to(self.device)
        for group in self.mesh.get_all_groups():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        return found.to(x.device)


def is_sharded(p: Tensor) -> bool:
    """Whether it is a DTensor, whose class takes long to import."""
    return hasattr(p, "placements")


def spread_of(params: Iterable[Tensor]) -> Spread | None:
    """How these parameters are sharded; None: they are not.

    Raises:
        RuntimeError: in another way than ``fully_shard`` does it, not all, or in several ways.
    """
    params = [p for p in params if p.is_floating_point() or p.is_complex()]
    pieces: list[Any] = [p for p in params if is_sharded(p)]
    if not pieces:
        return None
    first = pieces[0]
    for p in pieces:
        cut = [x for x in p.placements if type(x).__name__ == "Shard" and x.dim == 0]
        if len(cut) != 1 or not all(x in cut or x.is_replicate() for x in p.placements):
            raise RuntimeError(
                f"NFNOpt does not take sharded parameters (DTensor) placed as {tuple(p.placements)}, as of "
                "parallelize_module: its steps need whole matrices, which it puts together only from rows as "
                "fully_shard alone cuts them (Shard(0), or Replicate and Shard(0)). Use DistributedDataParallel."
            )
        if p.device_mesh != first.device_mesh or p.placements != first.placements or p.device != first.device:
            raise RuntimeError(
                "the parameters of this NFNOpt are sharded over several meshes or devices. Give those of each an "
                "optimizer of their own."
            )
    if len(pieces) < len(params):
        raise RuntimeError(
            f"{len(pieces)} parameters of this NFNOpt are sharded (fully_shard) and {len(params) - len(pieces)} are "
            "not (ignored_params?). Shard all, or give the others an optimizer of their own."
        )
    return Spread(first.device_mesh, tuple(first.placements), [x.is_shard() for x in first.placements].index(True))


def refuse_rule(rule: UpdateRule) -> None:
    """Raises RuntimeError for a rule that cannot step some of a network's tensors."""
    if not rule.spreads:
        raise RuntimeError(
            f"the rule {type(rule).__name__} does not take sharded parameters (fully_shard): it reads the whole "
            'network in one process. Use rule="auto_lr", or DistributedDataParallel.'
        )


def rows_of(p: Any, gradient: bool = False) -> Tensor:
    """This rank's rows of a parameter, or of its gradient; zeros where the rank has none."""
    if not gradient:
        return p.to_local()
    return torch.zeros_like(p.to_local()) if p.grad is None else placed(p.grad, p).to_local()


def seen_by_all(entries: list[NamedParam], spread: Spread) -> list[NamedParam]:
    """The entries with the bound of their gradients' magnitudes over all ranks: one small exchange."""
    grads = {e.name: rows_of(e.param, gradient=True) for e in entries if e.trained}
    some = {n: g for n, g in grads.items() if g.numel()}
    found = dict.fromkeys(grads, 0.0) | dict(zip(some, largest_magnitudes(list(some.values())), strict=True))
    sizes = [found.get(e.name, -1.0) for e in entries]
    bounds = spread.on_all(torch.tensor([x if x == x else math.inf for x in sizes], dtype=torch.float64)).tolist()
    return [e._replace(largest=x) for e, x in zip(entries, bounds, strict=True)]


def rows(shape: Collection[int], spread: Spread, rank: int | None = None) -> range:
    """The rows of a tensor that a rank of the group has (None: this one)."""
    n, (length, *_) = spread.mesh.size(spread.dim), shape
    rank = spread.mesh.get_local_rank(spread.dim) if rank is None else rank
    most = -(-length // n)
    return range(min(rank * most, length), min((rank + 1) * most, length))


def as_shards(x: Tensor, shape: torch.Size, spread: Spread) -> Tensor:
    """This rank's rows as a DTensor; numbers stay as they are."""
    from torch.distributed.tensor import DTensor

    if not shape:
        return x
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, spread.mesh, spread.placements, run_check=False, shape=shape, stride=stride)


def placed(x: Any, like: Any) -> Any:
    """A DTensor, in shards as another one is."""
    return x if x.placements == like.placements else x.redistribute(placements=like.placements)


# -------------------------------------------------------------------------------------------- exchanges
class Exchange:
    """Between rows on all ranks and whole tensors on some. All ranks of the group do all of it together.

    Args:
        spread: how tensors are cut.
        device: where they are.
    """

    def __init__(self, spread: Spread, device: torch.device) -> None:
        self.spread, self.device, self.group = spread, device, spread.group
        self.rank, self.count = dist.get_rank(self.group), dist.get_world_size(self.group)

    def gathered(
        self, local: Mapping[Key, Tensor], shapes: Mapping[Key, torch.Size], owner: Mapping[Key, int]
    ) -> dict[Key, Tensor]:
        """Whole tensors of what this rank owns, of the rows that every rank has."""
        whole: dict[Key, Tensor] = {}
        for keys in _bundles({k: (shapes[k], x.dtype) for k, x in local.items()}):
            sent = [[local[k].reshape(-1) for k in keys if owner[k] == rank] for rank in range(self.count)]
            mine = [k for k in keys if owner[k] == self.rank]
            sizes = [[self._numel(shapes[k], rank) for k in mine] for rank in range(self.count)]
            parts = self._exchanged(sent, sizes, local[keys[0]])
            for i, k in enumerate(mine):
                whole[k] = torch.cat([part[i] for part in parts]).view(shapes[k]).to(self.device)
        return whole

    def scattered(
        self,
        whole: Mapping[Key, Tensor],
        form: Mapping[Key, tuple[torch.Size, torch.dtype]],
        owner: Mapping[Key, int],
    ) -> dict[Key, Tensor]:
        """This rank's rows of all tensors (shapes and dtypes in ``form``), of the whole ones of their owners."""
        local: dict[Key, Tensor] = {}
        for keys in _bundles(form):
            mine = [whole[k] for k in keys if owner[k] == self.rank]
            cut = [[self._numel(x.shape, rank) for rank in range(self.count)] for x in mine]
            pieces = [x.reshape(-1).split(sizes) for x, sizes in zip(mine, cut, strict=True)]
            sent = [[piece[rank] for piece in pieces] for rank in range(self.count)]
            theirs = [[k for k in keys if owner[k] == rank] for rank in range(self.count)]
            sizes = [[self._numel(form[k][0], self.rank) for k in own] for own in theirs]
            parts = self._exchanged(sent, sizes, torch.empty(0, dtype=form[keys[0]][1], device=self.device))
            for own, part in zip(theirs, parts, strict=True):
                local |= {k: x.view(-1, *form[k][0][1:]).to(self.device) for k, x in zip(own, part, strict=True)}
        return local

    def total(self, x: Tensor, group: "dist.ProcessGroup | None" = None, by: Any = dist.ReduceOp.SUM) -> Tensor:
        """The sum over the ranks (of a part of the group), in float64, the same to the bit on all of them."""
        found = x.to(self.spread.device, torch.float64, copy=True)
        dist.all_reduce(found, by, group=group or self.group)
        return found.to(x)

    def _exchanged(self, sent: list[list[Tensor]], sizes: list[list[int]], like: Tensor) -> list[tuple[Tensor, ...]]:
        """``sent[r]`` goes to rank r, one after the other; from each rank come tensors of these sizes."""
        out = torch.cat([x.to(self.spread.device, like.dtype) for xs in sent for x in xs] or [like.new_empty(0)])
        counts = [sum(x.numel() for x in xs) for xs in sent]
        found = out.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(found, out.to(found.device), [sum(s) for s in sizes], counts, group=self.group)
        return [part.split(s) for part, s in zip(found.split([sum(s) for s in sizes]), sizes, strict=True)]

    def _numel(self, shape: torch.Size, rank: int) -> int:
        return len(rows(shape, self.spread, rank)) * math.prod(shape[1:])


def _bundles(form: Mapping[Key, tuple[torch.Size, torch.dtype]]) -> Iterator[list[Key]]:
    """Tensors of one dtype, some at a time: what is sent and received lies in memory twice."""
    most = min(max(sum(shape.numel() for shape, _ in form.values()) // BUNDLES, LEAST), MOST)
    for dtype in dict.fromkeys(dtype for _, dtype in form.values()):
        bundle: list[Key] = []
        total = 0
        for k in (k for k, (_, own) in form.items() if own == dtype):
            if bundle and total + form[k][0].numel() > most:
                yield bundle
                bundle, total = [], 0
            bundle.append(k)
            total += form[k][0].numel()
        yield bundle
