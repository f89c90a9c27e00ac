"""The loop that fits a module: minibatches, the best weights by validation, checkpoints with exact resume.

All that is random in an epoch (order, dropout, augmentation) follows from the seed and the number of the epoch, and
checkpoints are taken between epochs. So a run that was killed and resumed is the uninterrupted run bit for bit.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn

from learned_opt.checkpoint import CheckpointError, write_atomically
from learned_opt.progress import progress_bar

FORMAT = "learned-opt fit 1"
CHECKPOINT = "checkpoint.safetensors"
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Fit:
    """How to fit.

    Attributes:
        epochs: passes over the training networks.
        batch: networks in a minibatch.
        lr: learning rate of AdamW (an optimizer of the user's has its own).
        weight_decay: of AdamW.
        schedule: ``cosine`` decays the rate to zero along half a cosine, ``constant`` keeps it.
        warmup: fraction of the steps in which the rate rises linearly.
        clip: largest norm of the gradient; None does not clip.
        seed: of the order, of dropout and of augmentation.
        evaluate_every: epochs between two validations (the last epoch always has one).
        checkpoint_seconds: least time between two checkpoints (there is always one at the end).
    """

    epochs: int = 50
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    clip: float | None = 1.0
    seed: int = 0
    evaluate_every: int = 1
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.evaluate_every < 1:
            raise ValueError("epochs, batch and evaluate_every are at least 1")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}; there are cosine and constant")

    def rate(self, step: int, steps: int) -> float:
        """Factor of the learning rate at a step (from 0)."""
        warm = max(1, round(self.warmup * steps))
        rising = min(1.0, (step + 1) / warm)
        if self.schedule == "constant":
            return rising
        return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warm) / max(1, steps - warm))))


@dataclass
class State:
    """Where a fit stands between two epochs."""

    epoch: int
    best: float | None
    history: list[dict[str, float]]


Measure = Callable[[], dict[str, float]]


def train(
    module: nn.Module,
    loss: Callable[[Tensor, Generator], Tensor],
    networks: int,
    validate: Measure | None,
    *,
    keep: str,
    higher: bool,
    settings: Fit,
    optimizer: MakeOptimizer | None = None,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    tensorboard: Path | None = None,
    progress: bool | None = None,
) -> list[dict[str, float]]:
    """Fit a module; it ends with the weights that were best on validation, or the last where there is none.

    Args:
        module: what is fitted, on its device.
        loss: (rows of a minibatch, generator for augmentation) -> scalar.
        networks: number of training rows.
        validate: measures of the module as it is.
        keep: the measure that chooses the best weights.
        higher: whether more of it is better.
        settings: see :class:`Fit`.
        optimizer: makes the optimizer from the parameters; default AdamW.
        folder: for checkpoints; a run found there goes on.
        identity: plain data that a checkpoint must agree with, besides the settings.
        tensorboard: folder of event files.
        progress: show a bar; default: on a terminal.

    Returns:
        One dict of measures per epoch.

    Raises:
        FloatingPointError: the loss was not finite before there were any best weights.
        CheckpointError: the folder holds a damaged checkpoint, or one of another fit.
        KeyboardInterrupt: passed on after the best weights so far were put in place.
    """
    opt = (
        torch.optim.AdamW(module.parameters(), settings.lr, weight_decay=settings.weight_decay)
        if optimizer is None
        else optimizer(module.parameters())
    )
    rates = [group["lr"] for group in opt.param_groups]
    about = {"settings": asdict(settings) | {"checkpoint_seconds": None}, "optimizer": _described(opt)}
    about |= identity or {}
    state, best = State(0, None, []), None
    if folder is not None and (folder / CHECKPOINT).exists():
        state, best = _restore(folder / CHECKPOINT, about, module, opt)
    saved = time.monotonic()
    try:
        with _reports(settings.epochs, state.epoch, tensorboard, progress) as report:
            for epoch in range(state.epoch, settings.epochs):
                row = {"epoch": float(epoch), "train_loss": _epoch(module, loss, networks, opt, rates, settings, epoch)}
                last = epoch + 1 == settings.epochs
                if not math.isfinite(row["train_loss"]):
                    if best is None:
                        raise FloatingPointError(
                            f"the training loss is {row['train_loss']} in epoch {epoch}. Use a smaller lr, clip "
                            "gradients, or standardise the weights."
                        )
                    warnings.warn(f"the loss is not finite in epoch {epoch}; the best weights are kept", stacklevel=3)
                    break
                if validate is not None and (last or (epoch + 1) % settings.evaluate_every == 0):
                    module.eval()
                    row |= validate()
                    value = row[keep] if higher else -row[keep]
                    value = -math.inf if math.isnan(value) else value
                    if state.best is None or value > state.best:
                        state.best, best = value, _copy(module)
                state.epoch = epoch + 1
                state.history.append(row)
                report(row)
                if folder is not None and (last or time.monotonic() - saved >= settings.checkpoint_seconds):
                    _save(folder / CHECKPOINT, about, state, module, best, opt)
                    saved = time.monotonic()
    finally:
        if best is not None:
            module.load_state_dict(best)
        module.eval()
    return state.history


def _epoch(
    module: nn.Module,
    loss: Callable[[Tensor, Generator], Tensor],
    networks: int,
    opt: torch.optim.Optimizer,
    rates: list[float],
    settings: Fit,
    epoch: int,
) -> float:
    """One pass; returns the mean loss."""
    module.train()
    device = next(module.parameters()).device
    generator = Generator().manual_seed(1_000_003 * settings.seed + epoch)
    batches = list(torch.randperm(networks, generator=generator).to(device).split(settings.batch))
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm needs two
        batches[-2:] = [torch.cat(batches[-2:])]
    total = torch.zeros((), device=device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [], device_type=device.type):
        # on the CPU, those of GPUs are the caller's
        (torch.default_generator if device.type == "cpu" else torch).manual_seed(1_000_003 * settings.seed + epoch)
        for k, rows in enumerate(batches):
            factor = settings.rate(epoch * len(batches) + k, settings.epochs * len(batches))
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            opt.zero_grad()
            value = loss(rows, generator)
            value.backward()
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip)
            opt.step()
            total += value.detach() * (len(rows) / networks)
    return float(total)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {n: x.detach().clone() for n, x in module.state_dict().items()}


# ------------------------------------------------------------------------------------------ reports
@contextmanager
def _reports(
    epochs: int, start: int, tensorboard: Path | None, progress: bool | None
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """What is told after every epoch: a progress bar where there is a terminal, and TensorBoard."""
    bar = _bar(epochs, start, progress)
    writer: Any = None
    if tensorboard is not None:
        from torch.utils.tensorboard.writer import SummaryWriter

        writer = SummaryWriter(str(tensorboard), purge_step=start)

    def report(row: Mapping[str, float]) -> None:
        if bar is not None:
            bar.advance(bar.task_ids[0])
            told = "  ".join(f"{n} {x:.4g}" for n, x in row.items() if n != "epoch")
            bar.update(bar.task_ids[0], description=told)
        if writer is not None:
            for name, x in row.items():
                writer.add_scalar(name, x, int(row["epoch"]))

    try:
        if bar is not None:
            bar.start()
        yield report
    finally:
        if bar is not None:
            bar.stop()
        if writer is not None:
            writer.close()


def _bar(epochs: int, start: int, progress: bool | None) -> Any:
    if progress is False:
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        if progress:
            raise
        return None
    console = Console(stderr=True)
    if progress is None and not console.is_terminal:
        return None
    bar = progress_bar(console)
    bar.add_task("", total=epochs, completed=start)
    return bar


# ------------------------------------------------------------------------------------------ checkpoints
def _save(
    path: Path,
    about: Mapping[str, Any],
    state: State,
    module: nn.Module,
    best: Mapping[str, Tensor] | None,
    opt: torch.optim.Optimizer,
) -> None:
    tensors: dict[str, Tensor] = {}
    content = {"module": module.state_dict(), "best": best, "optimizer": opt.state_dict(), "state": asdict(state)}
    tree = _to_plain(content, tensors)
    header = {"format": FORMAT, "about": json.dumps(about, sort_keys=True), "tree": json.dumps(tree)}
    write_atomically(path, save(tensors, header))


def _described(opt: torch.optim.Optimizer) -> str:
    """An optimizer's class and those of its options that are plain."""
    plain = {n: x for n, x in opt.defaults.items() if isinstance(x, bool | int | float | str | tuple | None)}
    return f"{type(opt).__name__}({', '.join(f'{n}={x}' for n, x in sorted(plain.items()))})"


def _restore(
    path: Path, about: Mapping[str, Any], module: nn.Module, opt: torch.optim.Optimizer
) -> tuple[State, dict[str, Tensor] | None]:
    header, tensors = read_tensors(path, FORMAT)
    before, now = json.loads(header["about"]), json.loads(json.dumps(about))
    if before != now:
        changed = {k: (before.get(k), now.get(k)) for k in {*before, *now} if before.get(k) != now.get(k)}
        raise CheckpointError(
            path, f"it is of another fit (before, now): {changed}. Give another folder, or delete this file."
        )
    content = _from_plain(json.loads(header["tree"]), tensors)
    try:
        module.load_state_dict(content["module"])
        opt.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            path, f"it is of another module or optimizer ({error}). Give another folder, or delete this file."
        ) from error
    return State(**content["state"]), content["best"]


def read_tensors(path: Path, form: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file of ours.

    Raises:
        CheckpointError: missing, truncated, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(path, "no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(path, f"not a whole safetensors file ({error}).") from error
    if header.get("format") != form:
        raise CheckpointError(path, f"its format is {header.get('format')!r}, but {form!r} is needed.")
    return header, tensors


def _to_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts and lists as JSON; tensors go into the table, their names into the JSON."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[k, _to_plain(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_to_plain(v, tensors) for v in value]
    return value


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_plain(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _from_plain(v, tensors) for k, v in value["items"]}
    return value
