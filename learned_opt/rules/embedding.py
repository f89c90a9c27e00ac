"""Embeddings of units, layers and the network: the equivariant linear layer as pool, mix and broadcast.

What an entry knows of the network is what it shares with other entries: the unit that it writes, the unit that it
reads, its layer, the network. Means of even features over each of them, mixed by small matrices, are an equivariant
map whatever the mixing is, at a cost linear in the number of weights.
"""

import torch
from torch import Tensor, nn

from learned_opt.blocks import BlockLayout, Units


class Embedding(nn.Module):
    """Entry features -> one vector per unit, per layer (matrix) and for the network.

    Args:
        entries: number of entry features (even).
        layer: number of features that a layer has of its own.
        network: number of features of the network (time and horizon).
        width: channels of every embedding.
        pool: False leaves out every mean over entries (a per-parameter rule): units and network are zero, a layer
            knows only its own features.
    """

    def __init__(self, entries: int, layer: int, network: int, width: int, pool: bool = True) -> None:
        super().__init__()
        self.pool, self.width = pool, width
        self.unit = nn.Linear(2 * entries, width)
        self.layer = nn.Linear(entries + layer + network, width)
        self.network = nn.Linear(width, width)

    def forward(
        self, layout: BlockLayout, entries: list[Tensor], layers: list[Tensor], network: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Pool, mix.

        Args:
            layout: where units are.
            entries: per stack ``[entries, N, R, C]``.
            layers: per stack ``[N, layer]``.
            network: ``[network]``.

        Returns:
            Units ``[n_units + 1, width]`` (the last, "no unit", zero) and layers per stack ``[N, width]``.
        """
        rows, cols = ([e.mean(d) for e in entries] for d in (-1, -2))
        means = [r.mean(-1).T for r in rows]
        if self.pool:
            pooled = torch.cat([self._units(layout, rows, "rows"), self._units(layout, cols, "cols")], -1)
            units = torch.tanh(self.unit(pooled))
            units = torch.cat([units[:-1], torch.zeros_like(units[:1])])
        else:
            means = [torch.zeros_like(m) for m in means]
            units = entries[0].new_zeros(layout.n_units + 1, self.width)
        own = [
            self.layer(torch.cat([m, x, network.expand(len(x), -1)], -1)) for m, x in zip(means, layers, strict=True)
        ]
        shared = torch.tanh(self.network(torch.tanh(torch.cat(own)).mean(0))) if self.pool else 0.0
        return units, [torch.tanh(x + shared) for x in own]

    def _units(self, layout: BlockLayout, pooled: list[Tensor], side: str) -> Tensor:
        """Mean over all rows (columns) of a unit, in whatever tensors: ``[n_units + 1, entries]``."""
        index, value = [], []
        for stack, x in zip(layout.stacks, pooled, strict=True):
            at: Units = getattr(stack, side)
            for k in range(at.index.shape[-1]):
                index.append(at.index[..., k].flatten())
                value.append(x.flatten(1))
        if not index:
            return pooled[0].new_zeros(layout.n_units + 1, pooled[0].shape[0])
        flat = torch.cat(value, 1)
        ones = torch.cat([flat, torch.ones_like(flat[:1])])
        total = ones.new_zeros(len(ones), layout.n_units + 1).index_add(1, torch.cat(index), ones)
        return (total[:-1] / total[-1:].clamp(min=1)).T
