"""The Small CNN Zoo: its architecture trained many at once, its files written and read.

Unterthiner et al. 2020, "Predicting Neural Network Accuracy from Weights": three 3x3 convolutions of 16 filters,
stride 2, no padding, relu or tanh, dropout; global average pooling; a dense layer to 10 classes. 4,970 parameters.
"""

import ast
import contextlib
import csv
import gzip
import io
import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks.seeds import generator_of
from tasks.zoo import training
from tasks.zoo.chunks import generate
from tasks.zoo.sources import Examples, image_examples
from tasks.zoo.training import Weights
from tasks.zoo.zoo import Zoo, ZooError, number, read_table, to_columns, write_atomically

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}
MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh}
FILTERS, CLASSES, LAYERS = 16, 10, 3
CHUNK = 40  # networks to a file
Activation = Literal["relu", "tanh"]


@dataclass(frozen=True)
class Settings:
    """What a CNN zoo depends on."""

    activation: Activation = "relu"
    images: int = 5000  # to train on; all others are tested on
    steps: int = 600
    checkpoints: tuple[int, ...] = (60, 200, 600)  # the column "step"
    batch: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"  # of training; evaluation is in float32
    seed: int = 0

    def __post_init__(self) -> None:
        training.check_checkpoints(self.steps, self.checkpoints)


def build(activation: str = "relu", dropout: float = 0.0) -> nn.Sequential:
    """One network of the zoo: conv1, conv2, conv3, dense, for images [batch, 1, h, w] of at least 15 x 15."""
    layers: list[tuple[str, nn.Module]] = []
    for i in range(LAYERS):
        layers.append((f"conv{i + 1}", nn.Conv2d(1 if i == 0 else FILTERS, FILTERS, 3, stride=2)))
        layers.append((f"act{i + 1}", MODULES[activation]()))
        layers.append((f"drop{i + 1}", nn.Dropout(dropout)))
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("dense", nn.Linear(FILTERS, CLASSES))]
    return nn.Sequential(OrderedDict(layers))


def forward(
    weights: Mapping[str, Tensor],
    x: Tensor,
    activation: str,
    noise: Sequence[Tensor] = (),
    dropout: Tensor | None = None,
) -> Tensor:
    """Logits [networks, batch, 10] of all networks, by convolutions with one group for each.

    Args:
        weights: stacked, as `build` names them.
        x: [batch, networks, h, w], each network's own image, or [batch, 1, h, w], the same for all.
        activation: relu or tanh.
        noise: per convolution uniform numbers [batch, 16, h', w'], below `dropout` [networks] drops; shared by all.
        dropout: each network's probability.
    """
    k = len(weights["dense.bias"])
    h, kept = x, torch.ones(k)  # 1 / (1 - p), which dropout multiplies by, is put on the weights that read: cheaper
    for i in range(LAYERS):
        w, b = weights[f"conv{i + 1}.weight"] / kept.view(-1, 1, 1, 1, 1), weights[f"conv{i + 1}.bias"]
        h = functional.conv2d(h, w.flatten(0, 1), b.flatten(), stride=2, groups=k if h.shape[1] % k == 0 else 1)
        h = ACTIVATIONS[activation](h)
        if noise and dropout is not None:
            kept = 1 - dropout
            keep = noise[i].to(h.dtype).unsqueeze(1) >= dropout.to(h.dtype).view(-1, 1, 1, 1)
            h = h * keep.flatten(1, 2).to(h.dtype)
    pooled = h.to(weights["dense.bias"].dtype).mean((2, 3)).view(-1, k, FILTERS).transpose(0, 1)
    return torch.baddbmm(weights["dense.bias"].unsqueeze(1), pooled, weights["dense.weight"].mT / kept.view(-1, 1, 1))


# ------------------------------------------------------------------------------ hyper-parameters
def sample_config(seed: int, network: int, activation: str, dataset: str) -> dict[str, Any]:
    """Hyper-parameters of one network, by the names of the published metrics.

    The published ranges are not documented; those here spread the accuracies of a short training.
    """
    g = generator_of("cnn", seed, network, "config")
    optimizer = _choice(g, ("adam", "rmsprop", "momentum", "sgd"))
    rate = {"sgd": 10 ** _uniform(g, -2, 0), "momentum": 10 ** _uniform(g, -2.5, -0.5)}
    return {
        "config.activation": activation,
        "config.b_init": "zeros",
        "config.dataset": dataset,
        "config.dropout": _choice(g, (0.0, 1.0)) * _uniform(g, 0, 0.6),
        "config.init_std": 10 ** _uniform(g, -1.5, -0.3),
        "config.l2reg": 10 ** _uniform(g, -8, -2),
        "config.learning_rate": rate.get(optimizer, 10 ** _uniform(g, -3, -1.5)),
        "config.optimizer": optimizer,
        "config.train_fraction": _choice(g, (0.1, 0.25, 0.5, 1.0)),
        "config.w_init": _choice(g, ("glorot_normal", "he_normal", "orthogonal", "normal", "truncated_normal")),
    }


def _choice(generator: Generator, options: Sequence[Any]) -> Any:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def initial(config: Mapping[str, Any], generator: Generator) -> Weights:
    """Initial weights of one network: Keras's initialisers, zero biases."""
    weights = {}
    for name, p in build().named_parameters():
        kind, std = config["config.w_init"], config["config.init_std"]
        w = torch.zeros(p.shape)
        if w.ndim > 1:
            area = w[0, 0].numel()
            std = {
                "glorot_normal": math.sqrt(2 / (area * (w.shape[0] + w.shape[1]))),
                "he_normal": math.sqrt(2 / (area * w.shape[1])),
            }.get(kind, std)
            if kind == "orthogonal":
                nn.init.orthogonal_(w, generator=generator)
            elif kind == "normal":
                w.normal_(0, std, generator=generator)
            else:
                nn.init.trunc_normal_(w, 0, std, -2 * std, 2 * std, generator=generator)
        weights[name] = w
    return weights


# ---------------------------------------------------------------------------------------- training
def train_many(settings: Settings, examples: Examples, networks: Sequence[int], group: int = 8) -> Zoo:
    """Train these networks, `group` at a time, and return one row per network and checkpoint.

    Which networks share a group changes rounding alone. As in the published zoo all networks see the same random
    numbers (batches, dropout); a network with train fraction f draws from the first f of the images. Networks that
    diverge (weights not finite) are left out.
    """

    def drops(network: int) -> bool:  # dropout doubles the time of its whole group
        return sample_config(settings.seed, network, settings.activation, examples.name)["config.dropout"] > 0

    order = sorted(networks, key=drops)
    zoo = Zoo.join([_train_group(settings, examples, order[i : i + group]) for i in range(0, len(order), group)])
    number_of = [int(name.rpartition("/")[2]) for name in zoo.columns["modeldir"]]
    return zoo.select(torch.tensor(sorted(range(len(zoo)), key=number_of.__getitem__), dtype=torch.int64))


def _train_group(settings: Settings, examples: Examples, networks: Sequence[int]) -> Zoo:
    seed, name = settings.seed, settings.activation
    configs = [sample_config(seed, n, name, examples.name) for n in networks]
    starts = [initial(c, generator_of("cnn", seed, n, "weights")) for n, c in zip(networks, configs, strict=True)]
    # Keras's l2 adds l2 * w^2 to the loss
    rows = [
        {key: c[f"config.{key}"] for key in ("optimizer", "learning_rate")} | {"decay": 2 * c["config.l2reg"]}
        for c in configs
    ]
    dropout = torch.tensor([c["config.dropout"] for c in configs])
    used = torch.tensor([c["config.train_fraction"] * len(examples.x) for c in configs]).round()
    order, drop = generator_of("cnn", seed, "order"), generator_of("cnn", seed, "dropout")
    images = examples.x.squeeze(1).to(getattr(torch, settings.precision))
    sizes = _spatial(examples.x.shape[-1])

    def loss(weights: Weights, step: int) -> Tensor:
        u = torch.rand(settings.batch, generator=order)
        noise = [torch.rand(settings.batch, FILTERS, s, s, generator=drop) for s in sizes]
        index = (u[:, None] * used).long()
        x = images[index].contiguous(memory_format=torch.channels_last)
        with _precision(settings.precision):
            logits = forward(weights, x, name, noise if dropout.any() else (), dropout)
        return cross_entropy(logits, examples.y[index].T)

    start = {key: torch.stack([w[key] for w in starts]) for key in starts[0]}
    optimizers = training.Optimizers.of(rows)
    kept = training.train(loss, start, optimizers, settings.steps, settings.checkpoints)
    sane = training.finite(kept[max(kept)]).nonzero().flatten()
    parts = []
    for step, weights in kept.items():
        test, train = (evaluate(weights, x, y, name) for x, y in _judged(examples))
        table = [
            configs[k]
            | {"modeldir": f"{examples.name}-{name}-{seed}/{networks[k]}", "step": step}
            | {"test_accuracy": test[0][k].item(), "test_loss": test[1][k].item()}
            | {"train_accuracy": train[0][k].item(), "train_loss": train[1][k].item()}
            for k in range(len(networks))
        ]
        parts.append(Zoo(weights, test[0], to_columns(table)).select(sane))
    return Zoo.join(parts)


def _judged(examples: Examples) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """All test images, and at most a thousand of those that every network may have been trained on."""
    n = min(1000, len(examples.x) // 10)
    return (examples.test_x, examples.test_y), (examples.x[:n], examples.y[:n])


def _spatial(size: int) -> list[int]:
    return [size := (size - 3) // 2 + 1 for _ in range(LAYERS)]


def _precision(precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, precision))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """[networks] means over the batch of logits [networks, batch, classes] against y [networks, batch]."""
    return functional.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


@torch.no_grad()
def evaluate(weights: Weights, x: Tensor, y: Tensor, activation: str, batch: int = 100) -> tuple[Tensor, Tensor]:
    """Accuracy and loss, [networks] each, on images x [n, 1, h, w]."""
    logits = torch.cat([forward(weights, part, activation) for part in x.split(batch)], 1)
    target = y.expand(len(logits), -1)
    return (logits.argmax(2) == target).float().mean(1), cross_entropy(logits, target)


def every_checkpoint(settings: Settings, out: Path, count: int, data: Path | None = None, chunk: int = CHUNK) -> Zoo:
    """All checkpoints of the first `count` networks, without splits; makes the chunks in `out` that are not there."""
    examples = image_examples(data, settings.images)
    about = {"kind": "cnn", **asdict(settings), "images": len(examples.x), "dataset": examples.name}
    return generate(out, count, chunk, about, lambda rows: train_many(settings, examples, rows))


def make(settings: Settings, out: Path, count: int, data: Path | None = None, chunk: int = CHUNK) -> Zoo:
    """Generate a zoo of `count` networks into `out`: chunks, the published files, and zoo.safetensors.

    zoo.safetensors holds the last checkpoints with the published split; the published files hold all.
    """
    zoo = every_checkpoint(settings, out, count, data, chunk)
    save_published(zoo, out / "published")
    final = published_protocol(zoo)
    final.save(out / "zoo.safetensors")
    return final


# ---------------------------------------------------------------------------------- published files
METRICS = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")


def save_published(zoo: Zoo, folder: Path) -> None:
    """weights.npy, layout.csv and metrics.csv.gz as published: bias before kernel, kernels (h, w, in, out)."""
    flat, layout, end = [], [], 0
    for i, name in enumerate(("conv1", "conv2", "conv3", "dense")):
        keras = "dense" if name == "dense" else f"conv2d_{i}" if i else "conv2d"
        kernel = zoo.weights[f"{name}.weight"]
        kernel = kernel.permute(0, 3, 4, 2, 1) if kernel.ndim == 5 else kernel.mT
        for part, x in (("bias", zoo.weights[f"{name}.bias"]), ("kernel", kernel)):
            start, end = end, end + x[0].numel()
            layout.append((f"sequential/{keras}/{part}:0", start, end, str(tuple(x.shape[1:]))))
            flat.append(x.flatten(1))
    with write_atomically(folder / "weights.npy") as file:
        np.save(file, torch.cat(flat, 1).numpy())
    _write_csv(folder / "layout.csv", ("varname", "start_idx", "end_idx", "shape"), layout)
    _write_csv(folder / "metrics.csv.gz", tuple(zoo.columns), list(zip(*zoo.columns.values(), strict=True)))


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    content = text.getvalue().encode()
    with write_atomically(path) as file:
        file.write(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def load_published(
    folder: str | Path,
    activation: Activation | None = None,
    order: str | Path | None = None,
) -> Zoo:
    """A zoo in the published format, by the published protocol: see `published_protocol`.

    Args:
        folder: holds weights.npy, layout.csv and metrics.csv.gz.
        activation: keep only these networks; None keeps all.
        order: the split CSV of the NFN experiments: rows are put in this order first. The published files carry a
            spurious first line, which is left out.

    Raises:
        FileNotFoundError: a file is missing.
        ZooError: a file is truncated, or they do not belong together.
    """
    folder = Path(folder)
    for name in ("weights.npy", "layout.csv", "metrics.csv.gz"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; a CNN zoo needs it.")
    try:
        with gzip.open(folder / "metrics.csv.gz", "rt", newline="") as file:
            needed = ("config.activation", "step", "test_accuracy")
            table = read_table(file, needed, str(folder / "metrics.csv.gz"))
        flat = np.load(folder / "weights.npy", mmap_mode="r")
    except (EOFError, gzip.BadGzipFile, ValueError, OSError) as error:
        raise ZooError(f"a file of {folder} is truncated or damaged ({error}). Fetch or generate it again.") from error
    n = len(table["step"])
    if flat.ndim != 2 or len(flat) != n:
        raise ZooError(f"{folder}: weights.npy has shape {flat.shape}, but metrics.csv.gz has {n} rows.")
    rows = np.arange(n) if order is None else read_order(order, n)
    steps = np.array([number(s) for s in table["step"]])
    keep = steps[rows] == steps.max()
    if activation is not None:
        keep &= np.array(table["config.activation"])[rows] == activation
    rows = rows[keep]
    weights = _from_keras(torch.from_numpy(np.array(flat[rows], dtype=np.float32)), folder / "layout.csv")
    columns = {name: [number(column[i]) for i in rows] for name, column in table.items()}
    targets = torch.tensor([float(v) for v in columns["test_accuracy"]])
    return published_protocol(Zoo(weights, targets, columns, {}, {"kind": "cnn", "folder": folder.name}))


def published_protocol(zoo: Zoo) -> Zoo:
    """The last checkpoints alone, split 40 / 10 / 50 %: the second half tests, the first is shuffled and cut 4 : 1.

    The order of networks, then steps, must be random already (as ours is), or put so by the published order.
    """
    steps = torch.tensor(zoo.columns["step"])
    zoo = zoo.select(steps == steps.max())
    if not zoo.weights["dense.bias"].isfinite().all():
        raise ZooError("networks with weights that are not finite; select the others first.")
    half = len(zoo) // 2
    first = list(range(half))
    random.Random(0).shuffle(first)
    cut = int(0.8 * half)
    splits = {"train": first[:cut], "val": first[cut:], "test": list(range(half, len(zoo)))}
    index = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in splits.items()}
    return Zoo(zoo.weights, zoo.targets, zoo.columns, index, zoo.about)


def read_order(path: str | Path, n: int) -> np.ndarray:
    """A permutation of n rows, one integer a line; a spurious first line is left out.

    Raises:
        ZooError: what is left is no permutation of 0..n-1.
    """
    try:
        order = np.array([int(line) for line in Path(path).read_text().split()], dtype=np.int64)
    except ValueError as error:
        raise ZooError(f"{path}: {error}. One integer a line is expected.") from error
    order = order[1:] if len(order) == n + 1 else order
    if len(order) != n or not np.array_equal(np.sort(order), np.arange(n)):
        raise ZooError(f"{path} is no order of {n} rows: it has {len(order)} entries, or one twice.")
    return order


def _from_keras(flat: Tensor, layout: Path) -> Weights:
    """Rows [n, parameters] -> weights in PyTorch's conventions, by layout.csv."""
    with layout.open(newline="") as file:
        table = read_table(file, ("varname", "start_idx", "end_idx", "shape"), str(layout))
    weights: Weights = {}
    layer, end = 0, 0
    for i, varname in enumerate(table["varname"]):
        start, end, shape = int(table["start_idx"][i]), int(table["end_idx"][i]), ast.literal_eval(table["shape"][i])
        if end > flat.shape[1] or end - start != math.prod(shape):
            raise ZooError(f"{layout}: {varname} {shape} is not at {start}:{end} of {flat.shape[1]} numbers.")
        x = flat[:, start:end].reshape(-1, *shape)
        if not varname.endswith(("kernel:0", "bias:0")):
            raise ZooError(f"{layout}: {varname} is neither a kernel nor a bias.")
        layer = i // 2 + 1  # bias and kernel of a layer follow each other
        name = f"conv{layer}" if layer <= LAYERS else "dense"
        if varname.endswith("bias:0"):
            weights[f"{name}.bias"] = x
        else:
            x = x.permute(0, 4, 3, 1, 2) if x.ndim == 5 else x.mT
            weights[f"{name}.weight"] = x.contiguous()
    if end != flat.shape[1]:
        raise ZooError(f"{layout} ends at {end}, but a row of weights.npy has {flat.shape[1]} numbers.")
    expected = {name: p.shape for name, p in build().named_parameters()}
    if {name: x.shape[1:] for name, x in weights.items()} != expected:
        raise ZooError(f"{layout} describes another architecture than the Small CNN Zoo's.")
    return {name: weights[name] for name in expected}
