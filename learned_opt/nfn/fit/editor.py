"""Edit the weights of networks as a loss on the edited weights asks: fitted on a list of state_dicts and targets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_opt.nfn.chain import Features
from learned_opt.nfn.fit.builders import make_editor
from learned_opt.nfn.fit.fitting import Fitted, Weights
from learned_opt.nfn.fit.scores import check_finite, warned
from learned_opt.nfn.fit.weight_spaces import Data, Space, States, replaced


class WeightSpaceEditor(Fitted):
    """Changes the weights of networks of one architecture, as a loss on the edited weights asks.

    ::

        render = network_outputs(siren, coordinates)
        editor = WeightSpaceEditor(chain, loss=lambda w, images: (render(w) - images).square().mean(), kind="hnp")
        editor.fit(state_dicts, images)
        edited = editor.edit(other_state_dicts)

    Targets are ``[networks, ...]`` and passed to the loss row by row; the weights with the least loss are kept.

    Args:
        space: as for :class:`WeightSpacePredictor`.
        loss: ``(weights {name: [batch, *shape]}, targets [batch, ...]) -> scalar``, a mean over the batch.
        kind: for chains as in :class:`EquivariantNFN` (default ``exact``, or ``hnp`` without scales); ``general``.
        module: instead of space and kind, any module from features with one channel to features with one channel.
        seed: of the initial weights.
        options: for the module.

    Attributes:
        module: the fitted module.
        history: measures by epoch of the last fit.
    """

    chunk = 64  # rendering needs more room than weights

    def __init__(
        self,
        space: Space | None = None,
        *,
        loss: Callable[[Weights, Tensor], Tensor],
        kind: str | None = None,
        module: nn.Module | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.loss = loss
        super().__init__(space, kind, module, seed, options)

    def _make(self) -> nn.Module:
        assert self.space is not None
        return make_editor(self.space, self.kind, self.options)

    def _about(self) -> dict[str, Any]:
        return {}

    def _targets(self, targets: Tensor) -> Tensor:
        return check_finite(targets)

    def _edited(self, x: Features) -> Weights:
        return {n: y.squeeze(1) for n, y in self.module(x).items()}

    def _loss(self, data: Data, targets: Tensor) -> Tensor:
        return self.loss(self._edited(data), targets)

    @torch.no_grad()
    def _measures(self, data: Data, targets: Tensor) -> dict[str, float]:
        total = 0.0
        for i in range(0, len(targets), self.chunk):
            rows = slice(i, i + self.chunk)
            part = targets[rows]
            total += float(self._loss({n: x[rows] for n, x in data.items()}, part)) * len(part)
        return {"loss": total / len(targets)}

    def edit_stacked(self, states: States) -> Weights:
        """Edited weights as ``{name: [networks, *shape]}`` on the CPU, by the names of the weight space.

        Raises:
            RuntimeError: nothing was fitted.
        """
        self._need_fit()
        table = self._table(states)
        self.module.eval()
        count = len(next(iter(table.values())))
        edited = self._chunks(lambda part: self._edited(self._features(part)), table, count)
        return warned({n: x.cpu() for n, x in edited.items()})

    def edit(self, states: States) -> list[Weights]:
        """Edited state_dicts, one per network, which the network loads: with all names and tensors that its own has.

        A tensor that the weight space does not describe is as it was.

        Raises:
            RuntimeError: nothing was fitted.
        """
        return replaced(states, self.edit_stacked(states))

    @classmethod
    def load(
        cls, path: str | Path, *, loss: Callable[[Weights, Tensor], Tensor], module: nn.Module | None = None
    ) -> "WeightSpaceEditor":
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            loss: as it was fitted with.
            module: of the same kind, where it was fitted with a module of your own.

        Raises:
            CheckpointError: damaged, of another class, or the module is missing.
        """
        _, tensors, arguments = cls._read(path, module)
        found = cls(**arguments, loss=loss)
        found.module.load_state_dict(tensors)
        found.module.eval()
        found.ready = True
        return found
