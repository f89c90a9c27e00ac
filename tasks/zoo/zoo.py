"""A dataset of trained networks of one architecture, in memory and as one safetensors file."""

import csv
import json
import math
import os
import random
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "zoo 1"


class ZooError(ValueError):
    """A zoo's file cannot be used, or its parts do not belong together."""


@dataclass(frozen=True, eq=False)
class Zoo:
    """Networks of one architecture, and what is to be predicted of them.

    weights: by the name in a state_dict, [networks, *shape], PyTorch's conventions (convolutions [out, in, h, w]).
    targets: [networks], float32 accuracies or int64 labels.
    columns: one list of numbers or strings per hyper-parameter or measurement, an entry per network.
    splits: "train", "val", "test" -> int64 indices of networks; may be empty.
    about: plain data that say what the zoo is and what made it.

    Raises:
        ZooError: where a tensor, a column or a split does not fit the number of networks.
    """

    weights: Mapping[str, Tensor]
    targets: Tensor
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    splits: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {name: len(x) for name, x in self.weights.items()} | {n: len(c) for n, c in self.columns.items()}
        wrong = {name: n for name, n in counts.items() if n != len(self)}
        if wrong:
            raise ZooError(f"there are {len(self)} targets, but {wrong} entries. Every part needs one per network.")
        for name, index in self.splits.items():
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
                raise ZooError(f"split {name!r} names networks outside 0..{len(self) - 1}.")

    def __len__(self) -> int:
        return len(self.targets)

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """The weights of network i."""
        return {name: x[i] for name, x in self.weights.items()}

    def select(self, index: Tensor) -> "Zoo":
        """The networks at `index` (int64, or a mask), in that order, without splits."""
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        rows = index.tolist()
        return Zoo(
            {name: x[index] for name, x in self.weights.items()},
            self.targets[index],
            {name: [column[i] for i in rows] for name, column in self.columns.items()},
            {},
            self.about,
        )

    def part(self, split: str) -> "Zoo":
        """The networks of one split.

        Raises:
            ZooError: there is no such split.
        """
        if split not in self.splits:
            raise ZooError(f"no split {split!r}; this zoo has {sorted(self.splits)}. Split it first.")
        return self.select(self.splits[split])

    def split(self, train: float, val: float, seed: int = 0) -> "Zoo":
        """The same networks, split at random: these fractions (rounded down), the rest is "test"."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        a, b = int(train * len(self)), int(train * len(self)) + int(val * len(self))
        parts = {"train": order[:a], "val": order[a:b], "test": order[b:]}
        return replace(self, splits={name: torch.tensor(rows, dtype=torch.int64) for name, rows in parts.items()})

    @classmethod
    def join(cls, zoos: Sequence["Zoo"]) -> "Zoo":
        """One zoo of several, in order, without splits; `about` is the first one's.

        Raises:
            ZooError: names, shapes or columns differ, or there is none.
        """
        if not zoos:
            raise ZooError("nothing to join.")
        first = zoos[0]
        for other in zoos[1:]:
            for one, two in ((first.weights, other.weights), (first.columns, other.columns)):
                if list(one) != list(two):
                    raise ZooError(f"zoos with {list(one)} and {list(two)} cannot be joined.")
            for name, x in first.weights.items():
                if x.shape[1:] != other.weights[name].shape[1:]:
                    raise ZooError(
                        f"{name} has shapes {tuple(x.shape[1:])} and {tuple(other.weights[name].shape[1:])}."
                    )
        return cls(
            {name: torch.cat([z.weights[name] for z in zoos]) for name in first.weights},
            torch.cat([z.targets for z in zoos]),
            {name: [value for z in zoos for value in z.columns[name]] for name in first.columns},
            {},
            first.about,
        )

    # -- one file
    def save(self, path: str | Path) -> None:
        """Write one safetensors file atomically; columns, splits and `about` are JSON in its header."""
        tensors = {f"weights.{name}": x.contiguous() for name, x in self.weights.items()}
        tensors |= {f"split.{name}": x for name, x in self.splits.items()} | {"targets": self.targets}
        header = {"columns": dict(self.columns), "about": dict(self.about), "names": list(self.weights)}
        with write_atomically(path) as file:
            file.write(save(tensors, {"format": FORMAT, "zoo": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> "Zoo":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ZooError: the file is truncated, or no zoo.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no zoo {path}. Generate it with `python -m tasks.zoo`.")
        try:
            with safe_open(str(path), "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, struct.error) as error:
            raise ZooError(f"{path} is truncated or damaged ({error}). Delete it and run the same command.") from error
        if meta.get("format") != FORMAT:
            raise ZooError(f"{path} is {meta.get('format', 'something else')!r}, not {FORMAT!r}. Generate it anew.")
        header = json.loads(meta["zoo"])
        return cls(
            {name: tensors[f"weights.{name}"] for name in header["names"]},
            tensors["targets"],
            header["columns"],
            {n.removeprefix("split."): x for n, x in tensors.items() if n.startswith("split.")},
            header["about"],
        )

    # -- for people
    def describe(self) -> str:
        """A table (Markdown): every numeric column's quartiles, every other column's counts, and the targets."""
        shapes = ", ".join(f"{name} {tuple(x.shape[1:])}" for name, x in self.weights.items())
        size = sum(x[0].numel() for x in self.weights.values()) if len(self) else 0
        lines = [f"{len(self)} networks of {size} parameters: {shapes}"]
        lines += [f"{key}: {value}" for key, value in self.about.items()]
        if self.splits:
            lines.append("splits: " + ", ".join(f"{name} {len(index)}" for name, index in self.splits.items()))
        rows = {"target": self.targets.tolist(), **self.columns}
        lines += ["", "| column | min | 25 % | median | 75 % | max |", "|---|---|---|---|---|---|"]
        lines += [f"| {name} | {' | '.join(_quartiles(values))} |" for name, values in rows.items() if _numeric(values)]
        for name, values in rows.items():
            if not _numeric(values) and len(counts := {v: values.count(v) for v in sorted(set(values))}) <= 12:
                lines.append(f"| {name} | " + ", ".join(f"{v}: {n}" for v, n in counts.items()) + " |||||")
        return "\n".join(lines)


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) for v in values)


def _quartiles(values: Sequence[float]) -> list[str]:
    finite = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
    if not len(finite):
        return ["-"] * 5
    return [f"{q:.4g}" for q in finite.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)).tolist()]


# ---------------------------------------------------------------------------------------- helpers
@contextmanager
def write_atomically(path: str | Path) -> Iterator[Any]:
    """A binary file that takes the name `path` when it is whole; nothing is left behind otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode hides the file from everyone else
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """One list per key, of mappings with the same keys."""
    return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}


def read_table(file: Any, needed: Sequence[str], name: str) -> dict[str, list[str]]:
    """A CSV file's columns as text.

    Raises:
        ZooError: a needed column is missing, or a row is cut short.
    """
    reader = csv.DictReader(file)
    rows = list(reader)
    missing = [key for key in needed if key not in (reader.fieldnames or ())]
    if missing:
        raise ZooError(f"{name} has no column {', '.join(missing)}; it has {reader.fieldnames}.")
    if any(None in row.values() for row in rows):
        raise ZooError(f"{name} has a row with too few entries: it is truncated. Fetch it again.")
    return {key: [row[key] for row in rows] for key in reader.fieldnames or ()}


def number(text: str) -> Any:
    """A table's entry as int, else float, else the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
