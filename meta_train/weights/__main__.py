"""The command line: ``python -m meta_train.weights EXPERIMENT --out DIR``."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from learned_opt.checkpoint import CheckpointError
from learned_opt.symmetry import SymmetryError
from meta_train.errors import UsageError
from tasks.zoo.zoo import ZooError

PROG = "python -m meta_train.weights"
# command -> the module and the function whose arguments are its options; imported when asked for
COMMANDS = {
    "cnn": ("meta_train.weights.cnn", "generalisation"),
    "inr-classification": ("meta_train.weights.inr", "classification"),
    "inr-editing": ("meta_train.weights.inr", "editing"),
    "transformer": ("meta_train.weights.transformer", "generalisation"),
    "efficiency": ("meta_train.weights.efficiency", "efficiency"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run an experiment; bad input is one line."""
    import tyro

    args = list(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)  # the tensors are too small to share
    if not args or args[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        usage = f"usage: {PROG} {{{known}}} --out DIR; every experiment has --help"
        if args in (["-h"], ["--help"]):
            print(usage)
            return
        raise SystemExit(usage)
    module, name = COMMANDS[args[0]]
    command: Callable[..., Any] = getattr(importlib.import_module(module), name)
    try:
        tyro.cli(command, prog=f"{PROG} {args[0]}", args=args[1:])
    except (UsageError, ZooError, CheckpointError, SymmetryError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on after the last finished run.") from None


if __name__ == "__main__":
    main()
