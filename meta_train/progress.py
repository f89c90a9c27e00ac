"""What a long run tells and how it is stopped: log, TensorBoard, progress bar, signals."""

import contextlib
import json
import math
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from torch.utils.tensorboard import SummaryWriter

from learned_opt.progress import progress_bar
from meta_train import jsonl
from meta_train.bench.output import COLOURS, new_figure, write_figure
from meta_train.processes import under_torchrun


class Stopped(BaseException):
    """Raised by the signal handler inside work that may be given up."""


class GracefulShutdown(contextlib.AbstractContextManager["GracefulShutdown"]):
    """SIGINT and SIGTERM become ``signal``; a second one exits at once, but not under ``torchrun``, which kills."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._may_raise = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "GracefulShutdown":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for s in (signal.SIGINT, signal.SIGTERM):
                self._before[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.signal is not None:
            if under_torchrun():  # which passes on a signal that this process got too
                return
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        if self._may_raise:
            raise Stopped

    @contextlib.contextmanager
    def may_end_this(self) -> Iterator[None]:
        """Work that changes nothing: a signal ends it where it is; the code goes on after it."""
        try:
            if self.signal is None:
                self._may_raise = True
                yield
                self._may_raise = False
            else:
                yield
        except Stopped:
            pass
        finally:
            self._may_raise = False


class Reporter(contextlib.AbstractContextManager["Reporter"]):
    """log.jsonl, TensorBoard, and a progress bar or, where there is no terminal, plain lines.

    A process that does not ``write`` says and logs nothing.
    """

    def __init__(self, out: Path, total: int, write: bool = True) -> None:
        self.out, self.total, self.write = out, total, write
        self.console = Console(stderr=False)
        self.bar: Progress | None = None
        self.log: Any = None
        self.board: Any = None
        self._printed = -math.inf
        self._last = (0.0, 0.0)  # seconds and particle-steps at the last report

    def __enter__(self) -> "Reporter":
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def clear(self) -> None:
        """Delete what an earlier run logged, and its result."""
        named = [self.out / name for name in ("log.jsonl", "theta.safetensors", "training.png")]
        for path in [*named, *self.out.glob("tensorboard/events.out.tfevents.*")]:
            path.unlink(missing_ok=True)

    def open(self, step: int, log_bytes: int) -> None:
        """Start, or go on after outer step ``step``, forgetting what was logged since."""
        if not self.write:
            return
        path = self.out / "log.jsonl"
        path.touch()
        os.truncate(path, min(log_bytes, path.stat().st_size))  # a longer file would be filled up with zeros
        self.log = path.open("a", buffering=1)  # whole lines, also when killed
        self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)
        if self.console.is_terminal:
            self.bar = progress_bar(self.console)
            self.bar.add_task("meta-training", total=self.total, completed=step)
            self.bar.start()

    def __exit__(self, *_: object) -> None:
        for thing in (self.log, self.board):
            if thing is not None:
                thing.close()
        if self.bar is not None:
            self.bar.stop()

    def flush(self) -> int:
        """Everything logged is on disk; returns the length of the log in bytes."""
        self.log.flush()
        return self.log.tell()

    def say(self, text: str) -> None:
        """One line to the user."""
        if not self.write:
            return
        if self.bar is not None:
            self.bar.console.print(text, soft_wrap=True, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def stepped(self, metrics: dict[str, Any], seconds: float) -> None:
        """Log an outer step."""
        if not self.write:
            return
        before, count = self._last
        rate = (metrics["particle_steps"] - count) / max(seconds - before, 1e-9)
        self._last = (seconds, metrics["particle_steps"])
        self._write(metrics | {"seconds": round(seconds, 3)})
        scalars = {k: v for k, v in metrics.items() if k != "step"}
        if count:  # the first interval includes start-up
            scalars["particle_steps_per_second"] = rate
        scalars["memory_MB"] = _peak_memory()
        for name, value in scalars.items():
            self.board.add_scalar(name, value, metrics["step"])
        text = f"loss {metrics['loss']:.4f}"
        if self.bar is not None:
            task = self.bar.task_ids[0]
            self.bar.update(task, completed=metrics["step"], description=text)
        elif seconds - self._printed >= 10 or metrics["step"] == self.total:
            self._printed = seconds
            self.say(
                f"step {metrics['step']}/{self.total}  {text}  gradient "
                f"{metrics['gradient_norm']:.3g}  diverged {metrics['diverged']:.1%}  "
                f"{rate:.0f} particle-steps/s  {seconds:.0f} s"
            )

    def fitted(self, step: int, factors: dict[str, float]) -> None:
        """Log factors of the parts of theta, and the change of the log of the final loss that they promise."""
        if not self.write:
            return
        self._write({"step": step, "factors": factors})
        for name, value in factors.items():
            self.board.add_scalar(f"lengths/{name}", value, step)
        text = ", ".join(f"{n} {v:.2f}" for n, v in factors.items() if n != "change")
        self.say(f"step {step}/{self.total}  lengths {text}: change {factors['change']:+.3f}")

    def validated(self, step: int, scores: dict[str, float], first: dict[str, float], best: bool) -> None:
        """Log a validation, and how it differs from that of the start (``first``), if there is one."""
        if not self.write:
            return
        tasks_ = {n: v for n, v in scores.items() if n != "loss"}
        changes = np.array([v - first[n] for n, v in tasks_.items() if n in first and not n.startswith("held_out/")])
        change = float(changes.mean()) if len(changes) else math.nan
        error = float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else math.nan
        self._write(
            {"step": step, "validation": scores["loss"], "change": change, "error": error, "tasks": tasks_},
        )
        for name, value in (scores | {"change": change, "change_error": error}).items():
            self.board.add_scalar(f"validation/{name}", value, step)
        since = f", change from the start {change:+.4f} +- {error:.4f}" if first else ""
        self.say(f"step {step}/{self.total}  validation {scores['loss']:.4f}{since}{' (best)' if best else ''}")

    def _write(self, line: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.log.write(json.dumps(finite) + "\n")


def _peak_memory() -> float:
    """Highest resident memory of the process so far, MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def draw_training(folder: Path) -> bool:
    """Draw ``training.png`` from ``log.jsonl``: meta-loss by outer step, families, running mean, validation.

    False if the log has no outer step with a finite loss yet.
    """
    lines = [line for line in jsonl.read(folder / "log.jsonl") if "step" in line]
    steps = [line for line in lines if line.get("loss") is not None]
    if not steps:
        return False
    figure = new_figure(7.5, 4.2)
    axis = figure.subplots()
    families = sorted({k for line in steps for k in line if k.startswith("loss/")})
    for k, family in enumerate(families):
        there = [line for line in steps if line.get(family) is not None]
        colour, name = COLOURS[k % len(COLOURS)], family.removeprefix("loss/")
        mark = ".x"[k // len(COLOURS) % 2]
        axis.plot([x["step"] for x in there], [x[family] for x in there], mark, color=colour, label=name)
    losses, width = np.array([line["loss"] for line in steps]), max(1, len(steps) // 10)
    mean = np.convolve(losses, np.ones(width) / width, "valid")
    axis.plot([x["step"] for x in steps][width - 1 :], mean, color="black", label=f"mean of {width} steps")
    checks = [line for line in lines if line.get("validation") is not None]
    if checks:
        axis.plot([x["step"] for x in checks], [x["validation"] for x in checks], "k--", label="validation")
    axis.set_xlabel("outer step")
    axis.set_ylabel("meta-loss")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper")
    write_figure(figure, folder / "training.png")
    return True
