"""The Small Transformer Zoo: its architecture trained many at once, its files written and read.

Tran et al. 2024, "Equivariant Neural Functional Networks for Transformers": two encoder blocks of width 32, two heads,
hidden width 64, ReLU, no biases in attention, no residual connections, layer normalisation without gain and bias
(before attention, before the feed-forward part, at the end), mean over tokens, classifier 32-32-classes. Patches of
4x4 pixels through a convolution, or frozen word vectors; sinusoidal positions.
"""

import csv
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.schedule import warm_up_and_cosine
from tasks.seeds import generator_of
from tasks.zoo import training
from tasks.zoo.chunks import generate
from tasks.zoo.inr import read_state_dict
from tasks.zoo.sources import Examples, Texts, ag_news, image_examples
from tasks.zoo.training import Weights
from tasks.zoo.zoo import Zoo, ZooError, number, read_table, to_columns, write_atomically

WIDTH, HEADS, HIDDEN, BLOCKS, PATCH = 32, 2, 64, 2, 4
Task = Literal["mnist", "ag_news"]

# the published grid (v2): the rest is common to all optimizers
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    **dict.fromkeys(
        ("adam", "rmsprop"),
        {"lr": (3e-4, 5e-4, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2, 5e-2), "w_init_std": (0.1, 0.2, 0.3, 0.4, 0.5)},
    ),
    **dict.fromkeys(
        ("sgd", "sgd_momentum"),
        {"lr": (1e-3, 3e-3, 5e-3, 7e-3, 1e-2, 3e-2, 5e-2, 7e-2), "w_init_std": (0.1, 0.15, 0.2, 0.25, 0.3)},
    ),
}
COMMON: dict[str, tuple[float, ...]] = {
    "l2": (1e-8, 1e-7, 1e-6, 1e-4, 1e-2),
    "train_fraction": (0.7, 0.8, 0.9, 1.0),
    "dropout": (0.0, 0.05, 0.1, 0.15, 0.2),
}
OPTIMIZERS = {"sgd_momentum": "momentum"}  # names that differ from training.OPTIMIZERS
ACCURACY = {"mnist": "test_top1_accuracy", "digits": "test_top1_accuracy", "ag_news": "test_accuracy"}


@dataclass(frozen=True)
class Settings:
    """What a transformer zoo depends on."""

    task: Task = "mnist"  # mnist: scikit-learn's digits where the data folder has no MNIST
    examples: int = 5000  # to train on
    size: int = 16  # side of an image: fewer tokens, so more steps for the same time; the published zoo has 28
    length: int = 16  # words of a text
    steps: int = 2000
    checkpoints: tuple[int, ...] = (60, 250, 800, 2000)  # the column "ckpt_epoch"; accuracies from chance up
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < PATCH or self.size % PATCH:
            raise ZooError(f"images of side {self.size} do not divide into patches of {PATCH}. Use a multiple of it.")
        training.check_checkpoints(self.steps, self.checkpoints)


# ------------------------------------------------------------------------------------- one network
class Attention(nn.Module):
    """Two heads, softmax, no mask, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.out_projection = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 32] -> the same shape."""
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.queries, self.keys, self.values))
        scores = q @ k.mT / math.sqrt(WIDTH // HEADS)
        return self.out_projection((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """FFN(norm(attention(norm(x)))): nothing is added to x."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 32] -> the same shape."""
        x = self.attention(functional.layer_norm(x, (WIDTH,)))
        return self.fc2(self.fc1(functional.layer_norm(x, (WIDTH,))).relu())


class Network(nn.Module):
    """One network of the zoo, by the published names. Without `patches` its input is word vectors."""

    def __init__(self, classes: int = 10, patches: bool = True) -> None:
        super().__init__()
        if patches:
            self.embedding = nn.ModuleDict({"conv1": nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)})
        self.patches = patches
        self.encoder = nn.ModuleList(Encoder() for _ in range(BLOCKS))
        self.classifier = nn.ModuleDict({"fc1": nn.Linear(WIDTH, WIDTH), "fc2": nn.Linear(WIDTH, classes)})

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, 1, h, w] or word vectors [batch, tokens, 32]."""
        if self.patches:
            x = self.embedding["conv1"](x).flatten(2).mT
        x = x + positions(x.shape[1])
        for block in self.encoder:
            x = block(x)
        x = functional.layer_norm(x, (WIDTH,)).mean(1)
        return self.classifier["fc2"](self.classifier["fc1"](x).relu())


def positions(length: int) -> Tensor:
    """[length, 32]: sines and cosines interleaved, wavelengths from 2 pi to 10000 * 2 pi."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


# ------------------------------------------------------------------------------ many networks
def forward(
    weights: Mapping[str, Tensor], x: Tensor, noise: Sequence[Tensor] = (), dropout: Tensor | None = None
) -> Tensor:
    """Logits [networks, batch, classes] of all networks.

    Args:
        weights: stacked, as `Network` names them.
        x: [networks or 1, batch, tokens, features]: flattened patches (see `patches_of`), or word vectors.
        noise: for the embedding and each block's two halves uniform numbers [batch, tokens, 32], below `dropout` drops.
        dropout: each network's probability, [networks].
    """
    networks = len(weights["classifier.fc1.bias"])
    sizes = x.shape[1:3]

    def linear(name: str, h: Tensor) -> Tensor:
        w, b = weights[f"{name}.weight"].flatten(2), weights.get(f"{name}.bias")
        return h @ w.mT if b is None else torch.baddbmm(b.unsqueeze(1), h, w.mT)

    def drop(h: Tensor, i: int) -> Tensor:
        if not noise or dropout is None:
            return h
        p = dropout.view(-1, 1, 1)
        return h * ((noise[i].flatten(0, 1) >= p) / (1 - p))

    def heads(h: Tensor) -> Tensor:  # [networks, batch * tokens, 32] -> [networks * batch, heads, tokens, 16]
        return h.view(networks * sizes[0], sizes[1], HEADS, -1).transpose(1, 2)

    h = x.expand(networks, -1, -1, -1).flatten(1, 2)
    if "embedding.conv1.weight" in weights:
        h = linear("embedding.conv1", h)
    h = drop(h + positions(sizes[1]).repeat(sizes[0], 1), 0)
    for i in range(BLOCKS):
        name = f"encoder.{i}"
        h = functional.layer_norm(h, (WIDTH,))
        q, k, v = (heads(linear(f"{name}.attention.{part}", h)) for part in ("queries", "keys", "values"))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(networks, -1, WIDTH)
        h = drop(linear(f"{name}.attention.out_projection", h), 1 + 2 * i)
        h = linear(f"{name}.fc1", functional.layer_norm(h, (WIDTH,))).relu()
        h = drop(linear(f"{name}.fc2", h), 2 + 2 * i)
    h = functional.layer_norm(h, (WIDTH,)).view(networks, *sizes, WIDTH).mean(2)
    return linear("classifier.fc2", linear("classifier.fc1", h).relu())


def patches_of(x: Tensor) -> Tensor:
    """Images [n, 1, h, w] -> [n, tokens, 16], in the order of a convolution of stride 4."""
    return functional.unfold(x, PATCH, stride=PATCH).mT


def resized(x: Tensor, size: int) -> Tensor:
    """Images [n, 1, h, w] -> [n, 1, size, size], bilinear, smoothed where they shrink."""
    if x.shape[-2:] == (size, size):
        return x
    return functional.interpolate(x, (size, size), mode="bilinear", antialias=True)


# ---------------------------------------------------------------------------------------- training
def sample_config(seed: int, network: int, task: str) -> dict[str, Any]:
    """Hyper-parameters of one network, uniform on the published grid."""
    g = generator_of("transformer", seed, network, "config")

    def pick(options: Sequence[Any]) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    optimizer = pick(tuple(GRID))
    return {
        "dataset": task,
        "optimizer": optimizer,
        **{key: pick(options) for key, options in {**GRID[optimizer], **COMMON}.items()},
    }


def initial(network: nn.Module, std: float, generator: torch.Generator) -> Weights:
    """Truncated normal matrices of this deviation, zero biases."""
    weights = {}
    for name, p in network.named_parameters():
        w = torch.zeros(p.shape)
        weights[name] = nn.init.trunc_normal_(w, 0, std, -2 * std, 2 * std, generator=generator) if w.ndim > 1 else w
    return weights


def load_examples(settings: Settings, data: Path | None) -> Examples:
    """Inputs of `forward`, without the axis of networks: patches, or token indices with their embedding."""
    if settings.task == "ag_news":
        return ag_news(data, settings.examples, settings.length, WIDTH)
    found = image_examples(data, settings.examples)
    x, test_x = (patches_of(resized(x, settings.size)) for x in (found.x, found.test_x))
    return Examples(found.name, x, found.y, test_x, found.test_y, found.classes)


def train_many(settings: Settings, examples: Examples, networks: Sequence[int], group: int = 8) -> Zoo:
    """Train these networks, `group` at a time, and return one row per network and checkpoint.

    Which networks share a group changes rounding alone. All networks see the same random numbers (batches, dropout);
    one with train fraction f draws from the first f of the examples. Those that diverge are left out.
    """
    parts = [_train_group(settings, examples, networks[i : i + group]) for i in range(0, len(networks), group)]
    return Zoo.join(parts)


def _train_group(settings: Settings, examples: Examples, networks: Sequence[int]) -> Zoo:
    seed = settings.seed
    configs = [sample_config(seed, n, examples.name) for n in networks]
    shape = Network(examples.classes, not isinstance(examples, Texts))
    starts = [
        initial(shape, c["w_init_std"], generator_of("transformer", seed, n, "weights"))
        for n, c in zip(networks, configs, strict=True)
    ]
    rows = [
        {"optimizer": OPTIMIZERS.get(c["optimizer"], c["optimizer"]), "learning_rate": c["lr"], "decay": c["l2"]}
        for c in configs
    ]
    dropout = torch.tensor([c["dropout"] for c in configs])
    used = torch.tensor([c["train_fraction"] * len(examples.x) for c in configs]).round()
    order, drop = (generator_of("transformer", seed, use) for use in ("order", "dropout"))

    def loss(weights: Weights, step: int) -> Tensor:
        index = (torch.rand(settings.batch, generator=order) * used[:, None]).long()
        shape = (1 + 2 * BLOCKS, settings.batch, examples.x.shape[1], WIDTH)
        noise = torch.rand(shape, generator=drop).unbind()
        logits = forward(weights, _embed(examples, examples.x[index]), noise if dropout.any() else (), dropout)
        return cross_entropy(logits, examples.y[index])

    start = {key: torch.stack([w[key] for w in starts]) for key in starts[0]}
    optimizers = training.Optimizers.of(rows)
    schedule = warm_up_and_cosine
    kept = training.train(loss, start, optimizers, settings.steps, settings.checkpoints, schedule)
    sane = training.finite(kept[max(kept)]).nonzero().flatten()
    parts = []
    for step, weights in kept.items():
        accuracy = evaluate(weights, examples)
        table = [
            c | {"run": f"{examples.name}{seed}n{n}", "ckpt_epoch": str(step), ACCURACY[examples.name]: a}
            for n, c, a in zip(networks, configs, accuracy.tolist(), strict=True)
        ]
        parts.append(Zoo(weights, accuracy, to_columns(table)).select(sane))
    return Zoo.join(parts)


def _embed(examples: Examples, x: Tensor) -> Tensor:
    return examples.embedding[x] if isinstance(examples, Texts) else x


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """[networks] means over the batch of logits [networks, batch, classes] against y [networks, batch]."""
    return functional.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


@torch.no_grad()
def evaluate(weights: Weights, examples: Examples, batch: int = 100, most: int = 2000) -> Tensor:
    """Accuracy [networks] on the last `most` test examples."""
    x, y = examples.test_x[-most:], examples.test_y[-most:]
    right = [
        (forward(weights, _embed(examples, part).unsqueeze(0)).argmax(2) == goal).float().sum(1)
        for part, goal in zip(x.split(batch), y.split(batch), strict=True)
    ]
    return torch.stack(right).sum(0) / len(x)


def make(settings: Settings, out: Path, count: int, data: Path | None = None, chunk: int = 24) -> Zoo:
    """Generate a zoo of `count` networks into `out`: chunks, and zoo.safetensors of all checkpoints, split by run."""
    examples = load_examples(settings, data)
    about = {"kind": "transformer", **asdict(settings), "examples": len(examples.x), "dataset": examples.name}
    zoo = generate(out, count, chunk, about, lambda rows: train_many(settings, examples, rows))
    if isinstance(examples, Texts):
        with write_atomically(out / "embedding.pt") as file:
            torch.save({"weight": examples.embedding}, file)
    zoo = split_by_run(zoo)
    zoo.save(out / "zoo.safetensors")
    return zoo


# ---------------------------------------------------------------------------------- published files
def published_protocol(zoo: Zoo, epoch: str = "75", cut_off: float = 0.0, seed: int = 0) -> Zoo:
    """The networks of one checkpoint with at least this accuracy, then shuffled and split 70 / 15 / 15 %."""
    epochs = torch.tensor([str(e) == epoch for e in zoo.columns["ckpt_epoch"]], dtype=torch.bool)
    if not epochs.any():
        raise ZooError(f"no checkpoint of epoch {epoch}; there are {sorted(set(map(str, zoo.columns['ckpt_epoch'])))}.")
    return zoo.select(epochs & (zoo.targets >= cut_off)).split(0.7, 0.15, seed)


def split_by_run(zoo: Zoo, train: float = 0.7, val: float = 0.15, seed: int = 0) -> Zoo:
    """The same networks, split at random such that all checkpoints of one run (column "run") are in one part."""
    runs = sorted(set(zoo.columns["run"]))
    random.Random(seed).shuffle(runs)
    a, b = int(train * len(runs)), int(train * len(runs)) + int(val * len(runs))
    parts = {"train": set(runs[:a]), "val": set(runs[a:b]), "test": set(runs[b:])}
    rows = {name: [i for i, run in enumerate(zoo.columns["run"]) if run in part] for name, part in parts.items()}
    return replace(zoo, splits={name: torch.tensor(index, dtype=torch.int64) for name, index in rows.items()})


def save_published(zoo: Zoo, folder: Path) -> None:
    """<dataset>/<run>_<epoch>_<accuracy * 10^4>.pt per network and metadata/<dataset>.csv, as published."""
    name = zoo.columns["dataset"][0]
    rows = []
    for i in range(len(zoo)):
        row = {key: column[i] for key, column in zoo.columns.items()}
        file_name = f"{name}/{row['run']}_{row['ckpt_epoch']}_{int(zoo.targets[i].item() * 10000)}.pt"
        with write_atomically(folder / file_name) as file:
            torch.save({key: x.clone() for key, x in zoo.state_dict(i).items()}, file)
        rows.append({**row, "ckpt_file": file_name})
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_atomically(folder / "metadata" / f"{name}.csv") as file:
        file.write(text.getvalue().encode())


def load_published(folder: str | Path, name: str, epoch: str = "75", cut_off: float = 0.0, seed: int = 0) -> Zoo:
    """The networks of metadata/<name>.csv by the published protocol; frozen tensors (positions) are left out.

    Raises:
        FileNotFoundError: the table or a network's file is missing.
        ZooError: a file is truncated or holds another network than the others.
    """
    folder = Path(folder)
    path = folder / "metadata" / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a transformer zoo needs it.")
    with path.open(newline="") as file:
        table = read_table(file, ("ckpt_epoch", "ckpt_file"), str(path))
    measure = next((key for key in (ACCURACY.get(name, ""), *ACCURACY.values()) if key in table), None)
    if measure is None:
        raise ZooError(f"{path} has neither test_top1_accuracy nor test_accuracy.")
    accuracy = [float(a) for a in table[measure]]
    chosen = [e == epoch and a >= cut_off for e, a in zip(table["ckpt_epoch"], accuracy, strict=True)]
    rows = [i for i, take in enumerate(chosen) if take]
    if not rows:
        raise ZooError(f"{path}: no checkpoint of epoch {epoch} has an accuracy of {cut_off} or more.")
    states = [_trained(folder / table["ckpt_file"][i]) for i in rows]
    shapes = {key: x.shape for key, x in states[0].items()}
    for state, i in zip(states, rows, strict=True):
        if {key: x.shape for key, x in state.items()} != shapes:
            raise ZooError(f"{table['ckpt_file'][i]} has other names or shapes than {table['ckpt_file'][rows[0]]}.")
    weights = {key: torch.stack([s[key] for s in states]) for key in shapes}
    columns = {key: [number(column[i]) for i in rows] for key, column in table.items()}
    targets = torch.tensor([accuracy[i] for i in rows])
    return Zoo(weights, targets, columns, {}, {"kind": "transformer", "folder": folder.name}).split(0.7, 0.15, seed)


def _trained(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but the table names it.")
    return {name: x for name, x in read_state_dict(path).items() if not name.endswith("pos_embedding")}


def block_matrices(weights: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """One block in the papers' row-vector convention, with a leading axis of networks.

    W_q, W_k, W_v [n, heads, 32, 16], W_o [n, heads, 16, 32], W_A [n, 32, 64], b_A, W_B [n, 64, 32], b_B.
    """
    at = f"encoder.{block}"
    q, k, v = (weights[f"{at}.attention.{part}.weight"] for part in ("queries", "keys", "values"))
    split = {n: w.unflatten(1, (HEADS, -1)).mT for n, w in (("W_q", q), ("W_k", k), ("W_v", v))}
    return {
        **split,
        "W_o": weights[f"{at}.attention.out_projection.weight"].mT.unflatten(1, (HEADS, -1)),
        "W_A": weights[f"{at}.fc1.weight"].mT,
        "b_A": weights[f"{at}.fc1.bias"],
        "W_B": weights[f"{at}.fc2.weight"].mT,
        "b_B": weights[f"{at}.fc2.bias"],
    }
