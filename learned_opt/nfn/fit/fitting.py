"""What predictors and editors share: a module over weight features is made, fitted, scored, saved and read.

:mod:`learned_opt.nfn.fit.predictor` and :mod:`learned_opt.nfn.fit.editor` say which module, loss and measures.
"""

import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Generator, Tensor, nn

from learned_opt.checkpoint import CheckpointError, digest, write_atomically
from learned_opt.nfn.chain import Chain, Features
from learned_opt.nfn.fit.scores import OVERFLOW
from learned_opt.nfn.fit.training import Fit, MakeOptimizer, read_tensors, train
from learned_opt.nfn.fit.weight_spaces import (
    Data,
    Space,
    States,
    features,
    fitting,
    join_data,
    map_data,
    space_from_data,
    space_to_data,
    stacked,
)
from learned_opt.symmetry import Symmetry, SymmetryError

FORMAT = "learned-opt weight-space 1"
CHUNK = 512  # networks that are prepared or evaluated at a time
Weights = dict[str, Tensor]
Rows = tuple[Weights, Tensor]  # networks and their targets
Augment = Callable[[Features, Generator], Features]
Validation = float | tuple[States, Any] | None


class Fitted(ABC):
    """A module over weight features, what it was made from, how it is fitted, and its file."""

    module: nn.Module
    chunk = CHUNK

    def __init__(
        self, space: Space | None, kind: str | None, module: nn.Module | None, seed: int, options: dict[str, Any]
    ) -> None:
        if not isinstance(space, Space | None):
            raise TypeError(
                f"no weight space, but of type {type(space).__name__}. Pass infer_symmetry(model, x) of one of the"
                " networks, Chain.from_state_dict(...) or a TransformerSpec."
            )
        if isinstance(space, Symmetry) and module is None and kind != "general":
            try:
                space = Chain.from_symmetry(space)
            except SymmetryError:
                if kind is not None:
                    raise
        if space is None and module is None:
            raise ValueError("pass a weight space (Chain, TransformerSpec, Symmetry), or module= over weight features")
        if module is not None and (kind is not None or options):
            raise ValueError(f"module= is given, so kind= and options ({sorted(options)}) have nothing to say")
        self.space, self.kind, self.options, self.own = space, kind, options, module is not None
        self.seed = seed
        self.history: list[dict[str, float]] = []
        self.ready = self.own  # whether there is something to predict with: a module of one's own may be fitted already
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.module = module if module is not None else self._make()

    # -- what the two kinds say
    @abstractmethod
    def _make(self) -> nn.Module:
        """The module for the space."""

    @abstractmethod
    def _about(self) -> dict[str, Any]:
        """Settings of this kind, plain data."""

    @abstractmethod
    def _targets(self, targets: Tensor) -> Tensor:
        """Targets as the loss needs them."""

    def _fit_moments(self, table: Weights) -> None:
        """Statistics of the training networks, if any are needed."""
        return

    def _prepare(self, x: Features) -> Data:
        """Features as the module reads them; computed once unless minibatches are augmented."""
        return x

    @abstractmethod
    def _loss(self, data: Data, targets: Tensor) -> Tensor:
        """Loss of a minibatch."""

    @abstractmethod
    def _measures(self, data: Data, targets: Tensor) -> dict[str, float]:
        """Measures on all rows."""

    def _keep(self) -> tuple[str, bool]:
        """The measure that chooses the best weights, and whether more of it is better."""
        return "loss", False

    # -- data
    def _place(self) -> tuple[torch.device, torch.dtype]:
        p = next(self.module.parameters())
        return p.device, p.dtype

    def _table(self, states: States) -> Weights:
        return fitting(self.space, stacked(states))

    def _read_data(self, states: States, targets: Any) -> Rows:
        table, targets = self._table(states), torch.as_tensor(targets)
        count = len(next(iter(table.values())))
        if targets.ndim == 0 or len(targets) != count:
            raise ValueError(f"there are {count} networks, but targets of shape {tuple(targets.shape)}: one row each")
        return table, self._targets(targets)

    def _placed(self, targets: Tensor) -> Tensor:
        device, dtype = self._place()
        return targets.to(device, dtype) if targets.is_floating_point() else targets.to(device)

    @torch.no_grad()
    def _chunks(self, function: Callable[[Data], Data], data: Data, count: int) -> Data:
        def part(start: int) -> Data:
            return map_data(lambda x: x[start : start + self.chunk], data)

        return join_data([function(part(i)) for i in range(0, count, self.chunk)])

    def _features(self, table: Weights) -> Features:
        device, dtype = self._place()
        return features({n: x.to(device) for n, x in table.items()}, dtype)

    def _prepared(self, table: Weights) -> Data:
        count = len(next(iter(table.values())))
        return self._chunks(lambda part: self._prepare(self._features(part)), table, count)

    # -- what users call
    def fit(
        self,
        states: States,
        targets: Any,
        *,
        validation: Validation = 0.2,
        settings: Fit | None = None,
        optimizer: MakeOptimizer | None = None,
        augment: Augment | None = None,
        device: str = "cpu",
        folder: str | Path | None = None,
        tensorboard: str | Path | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Fit to networks and their targets; afterwards the module has the weights that were best on validation.

        Best is the highest Kendall's tau (bce, mse) or accuracy, or the least loss of your own. On Ctrl-C the best
        so far are put in place and the interruption is passed on.

        Args:
            states: state_dicts, modules, or stacked tensors ``{name: [networks, *shape]}``.
            targets: one row per network, as the class says.
            validation: a fraction of the networks, chosen by the seed, or ``(states, targets)``, or None (the last
                weights are kept).
            settings: see :class:`Fit`.
            optimizer: makes the optimizer from the parameters; default AdamW.
            augment: changes the features of every minibatch, given a generator.
            device: ``cpu`` or ``cuda``.
            folder: for checkpoints; a fit that was interrupted there goes on exactly. Another fit is refused as far
                as it can be told apart: a loss, module or augmentation of your own is not looked into, so give each
                a folder of its own.
            tensorboard: folder of event files.
            progress: show a bar; default: on a terminal.

        Raises:
            SymmetryError: a network does not fit the space or the other networks.
            ValueError: targets of another length or range, values that are not finite, too few networks.
            FloatingPointError: the loss was not finite from the beginning.
            CheckpointError: the folder holds another fit's checkpoint, or a damaged one.
        """
        settings = settings or Fit()
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but this PyTorch sees no GPU. Use device='cpu'.")
        table, wanted = self._read_data(states, targets)
        held: Rows | None = None
        if isinstance(validation, float | int):
            (table, wanted), held = split(table, wanted, float(validation), settings.seed)
        elif validation is not None:
            held = self._read_data(*validation)
        self.module.to(device)
        self._fit_moments(table)
        identity = self._identity((table, wanted), held)
        wanted = self._placed(wanted)
        data = self._prepared(table) if augment is None else self._features(table)

        def loss(rows: Tensor, generator: Generator) -> Tensor:
            batch = map_data(lambda x: x[rows], data)
            return self._loss(batch if augment is None else self._prepare(augment(batch, generator)), wanted[rows])

        measure = None
        if held is not None:
            held_data, held_targets = self._prepared(held[0]), self._placed(held[1])
            measure = lambda: self._measures(held_data, held_targets)  # noqa: E731
        keep, higher = self._keep()
        try:
            self.history = train(
                self.module,
                loss,
                len(wanted),
                measure,
                keep=keep,
                higher=higher,
                settings=settings,
                optimizer=optimizer,
                folder=None if folder is None else Path(folder),
                identity=identity,
                tensorboard=None if tensorboard is None else Path(tensorboard),
                progress=progress,
            )
        except KeyboardInterrupt:  # the best so far are in place
            self.ready = True
            raise
        self.ready = True
        return self

    def _identity(self, train: Rows, held: Rows | None) -> dict[str, Any]:
        """What a checkpoint must agree with, besides the settings and the optimizer."""
        made = {"kind": self.kind, "options": json.dumps(self.options, sort_keys=True, default=str), "seed": self.seed}
        data, validation = (r and digest({**r[0], "targets": r[1]}) for r in (train, held))
        return {"data": data, "validation": validation, **made, **self._about()}

    def score(self, states: States, targets: Any) -> dict[str, float]:
        """Measures against targets as in :meth:`fit`: ``loss`` and what the class adds.

        Raises:
            RuntimeError: nothing was fitted.
        """
        self._need_fit()
        table, wanted = self._read_data(states, targets)
        self.module.eval()
        found = self._measures(self._prepared(table), self._placed(wanted))
        if not all(map(math.isfinite, found.values())):
            warnings.warn(f"measures are not finite: {found}. {OVERFLOW}", stacklevel=2)
        return found

    def _need_fit(self) -> None:
        if not self.ready:
            name = type(self).__name__
            raise RuntimeError(f"this {name} is not fitted: call fit(...) first, or read one by {name}.load(path).")

    # -- files
    def save(self, path: str | Path) -> None:
        """Write the fitted module and its settings as one safetensors file, atomically.

        A module or loss of your own is not written: give it to ``load`` again.

        Raises:
            RuntimeError: nothing was fitted.
            ValueError: options that are no plain data.
        """
        try:
            header = {"class": type(self).__name__, "own": self.own, "space": space_to_data(self.space)}
            about = json.dumps(header | {"kind": self.kind, "options": self.options} | self._about())
        except TypeError as error:
            raise ValueError(f"the options are no plain data ({error}); build the module yourself: module=") from error
        self._need_fit()
        tensors = {n: x.detach().cpu().clone().contiguous() for n, x in self.module.state_dict().items()}
        write_atomically(path, save(tensors, {"format": FORMAT, "about": about, "sha256": digest(tensors)}))

    @classmethod
    def _read(cls, path: str | Path, module: nn.Module | None) -> tuple[dict[str, Any], Weights, dict[str, Any]]:
        """Header, tensors, and the arguments that the constructor needs."""
        path = Path(path)
        header, tensors = read_tensors(path, FORMAT)
        if header.get("sha256") != digest(tensors):
            raise CheckpointError(path, "the tensors do not match the recorded sha256: it was altered.")
        about = json.loads(header["about"])
        if about["class"] != cls.__name__:
            raise CheckpointError(path, f"it is a {about['class']}; use {about['class']}.load.")
        if about["own"] != (module is not None):
            why = "was fitted with a module of yours: pass module=" if about["own"] else "needs no module="
            raise CheckpointError(path, f"it {why}.")
        made = {"kind": about["kind"], **about["options"]} if module is None else {"module": module}
        return about, tensors, {"space": space_from_data(about["space"]), **made}


def split(table: Weights, targets: Tensor, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Training networks and, a random fraction, validation networks.

    Raises:
        ValueError: a fraction that leaves no network on one side.
    """
    count = len(targets)
    held = round(fraction * count)
    if not 0 < held < count:
        raise ValueError(
            f"validation={fraction} of {count} networks leaves none on one side; pass (states, targets), or None"
        )
    order = torch.randperm(count, generator=Generator().manual_seed(seed)).to(targets.device)
    one, two = (({n: x[i] for n, x in table.items()}, targets[i]) for i in (order[held:], order[:held]))
    return one, two
