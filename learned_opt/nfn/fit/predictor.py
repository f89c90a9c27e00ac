"""Predict numbers or classes from the weights of networks: fitted on a list of state_dicts and targets."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from learned_opt.checkpoint import CheckpointError
from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.fit.builders import make_predictor
from learned_opt.nfn.fit.fitting import Fitted, Weights
from learned_opt.nfn.fit.scores import Loss, LossFunction, LossName, warned
from learned_opt.nfn.fit.weight_spaces import Data, Space, States
from learned_opt.nfn.general import frame_of
from learned_opt.nfn.models import InvariantNFN
from learned_opt.nfn.transformer_space import TransformerSpec
from learned_opt.symmetry import Symmetry


class WeightSpacePredictor(Fitted):
    """Predicts numbers or classes from the weights of networks of one architecture.

    ::

        predictor = WeightSpacePredictor(infer_symmetry(model, x))
        predictor.fit(state_dicts, accuracies, settings=Fit(epochs=50))
        predictor.predict(other_state_dicts)

    Targets are ``[networks]`` or ``[networks, outputs]``, integer classes ``[networks]`` for cross_entropy.

    Args:
        space: a Chain (MLPs, CNNs), a TransformerSpec, or an inferred Symmetry (taken as a chain if it is one).
        kind: for chains as in :class:`InvariantNFN` (default ``monomial``, or ``hnp`` without scales); ``general``
            takes the general layers for a symmetry.
        module: instead of space and kind, any module from features ``{name: [batch, 1, *shape]}`` to
            ``[batch, outputs]``. With a TransformerSpec as space it reads ``TransformerFeatures``.
        outputs: numbers per network, or classes.
        loss: ``bce`` (a sigmoid is put behind the outputs: accuracies), ``mse``, ``cross_entropy``, or a function
            ``(outputs, targets) -> scalar``.
        standardise: divide every parameter tensor by its root mean square over the training networks (and where
            nothing but permutations is asked for subtract its mean first). One number per tensor commutes with every
            symmetry; the per-entry statistics of the NP experiments would not.
        seed: of the initial weights.
        options: for the module (``channels``, ``head_width`` and so on).

    Attributes:
        module: the fitted module.
        history: measures by epoch of the last fit.

    Raises:
        SymmetryError: the kind does not suit the space.
        ValueError: nothing to build from, or too much.
    """

    def __init__(
        self,
        space: Space | None = None,
        *,
        kind: str | None = None,
        module: nn.Module | None = None,
        outputs: int = 1,
        loss: LossName | LossFunction = "bce",
        standardise: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.outputs, self.loss, self.standardise = outputs, Loss.of(loss), standardise
        self.moments: dict[str, tuple[float, float]] = {}
        super().__init__(space, kind, module, seed, options)

    def _make(self) -> nn.Module:
        assert self.space is not None
        return make_predictor(self.space, self.outputs, self.kind, self.options)

    def _about(self) -> dict[str, Any]:
        made = {"outputs": self.outputs, "loss": self.loss.name, "standardise": self.standardise}
        return made | {"moments": self.moments}

    def _targets(self, targets: Tensor) -> Tensor:
        return self.loss.check(targets, self.outputs)

    def _keep(self) -> tuple[str, bool]:
        return self.loss.keep, self.loss.higher

    def _fit_moments(self, table: Weights) -> None:
        if not self.standardise:
            return
        shift = isinstance(self.space, Chain) and self.space.scale is None
        for name, x in table.items():
            mean = float(x.double().mean()) if shift else 0.0
            rms = float((x.double() - mean).square().mean().sqrt())
            self.moments[name] = (mean, rms if rms > 0 else 1.0)

    @property
    def _stage(self) -> nn.Module | None:
        """A pool without parameters that comes first: its result is computed once."""
        m = self.module
        if isinstance(m, InvariantNFN) and not len(m.layers) and not list(m.pool.parameters()):
            return m.pool
        return None

    def _prepare(self, x: Features) -> Data:
        if self.moments:
            x = {n: (t - self.moments[n][0]) / self.moments[n][1] for n, t in x.items()}
        if isinstance(self.space, TransformerSpec):
            return self.space.pack(x)
        if isinstance(self.space, Symmetry) and not self.own:
            frame = frame_of(self.space, {n: t[:, 0] for n, t in x.items()})
            return {n: t / frame[n].unsqueeze(1) for n, t in x.items()}
        return x if self._stage is None else self._stage(x)

    def _forward(self, data: Data) -> Tensor:
        if self._stage is None:
            return self.module(data)
        assert isinstance(self.module, InvariantNFN)
        return self.module.head(data)

    def _loss(self, data: Data, targets: Tensor) -> Tensor:
        return self.loss.function(self._forward(data), targets)

    def _measures(self, data: Data, targets: Tensor) -> dict[str, float]:
        return self.loss.measures(self._chunks(self._forward, data, len(targets)), targets)

    def outputs_of(self, states: States) -> Tensor:
        """What the module returns, ``[networks, outputs]``, on the CPU: logits for bce and cross_entropy.

        A warning names networks whose outputs are not finite (polynomials of large weights overflow).

        Raises:
            RuntimeError: nothing was fitted.
        """
        self._need_fit()
        table = self._table(states)
        self.module.eval()
        count = len(next(iter(table.values())))
        return warned({"outputs": self._chunks(self._forward, self._prepared(table), count).cpu()})["outputs"]

    def predict(self, states: States) -> Tensor:
        """``[networks]`` (or ``[networks, outputs]``): numbers (in [0, 1] for bce), or classes.

        Warnings and errors are those of :meth:`outputs_of`.
        """
        return self.loss.predict(self.outputs_of(states))

    @classmethod
    def load(
        cls, path: str | Path, *, module: nn.Module | None = None, loss: LossFunction | None = None
    ) -> "WeightSpacePredictor":
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            module: of the same kind, where it was fitted with a module of your own.
            loss: where it was fitted with a loss of your own.

        Raises:
            CheckpointError: damaged, of another class, or a module or loss is missing.
        """
        about, tensors, arguments = cls._read(path, module)
        if (about["loss"] == "custom") != (loss is not None):
            raise CheckpointError(path, f"its loss is {about['loss']!r}: pass loss= for a custom one, and only then.")
        found = cls(
            **arguments,
            outputs=about["outputs"],
            standardise=about["standardise"],
            loss=loss if loss is not None else about["loss"],
        )
        found.module.load_state_dict(tensors)
        found.moments = {n: (a, b) for n, (a, b) in about["moments"].items()}
        found.module.eval()
        found.ready = True
        return found
