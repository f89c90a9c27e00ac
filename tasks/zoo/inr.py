"""Images as sine networks (SIREN 2-32-32-1), many fitted at once; the published folders written and read.

Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions"; files as in the INR data
of Zhou et al. 2023, "Permutation Equivariant Neural Functionals": a folder per label, a state_dict per image.
"""

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from tasks.schedule import half_cosine
from tasks.seeds import generator_of
from tasks.zoo.chunks import generate
from tasks.zoo.sources import images
from tasks.zoo.training import Weights
from tasks.zoo.zoo import Zoo, ZooError, write_atomically

OMEGA, HIDDEN = 30.0, 32
FOLDER = re.compile(r"^randinit_smaller_(\d+)s$")  # not the copies, randinit_smaller_aug1_3s
FILE = re.compile(r"^net(\d+)\.pth$")


class Sin(nn.Module):
    """sin(30 x), elementwise and odd."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(OMEGA * x)


@dataclass(frozen=True)
class Settings:
    """What an INR zoo depends on. Every step sees all pixels; Adam's rate falls by half a cosine."""

    steps: int = 100
    learning_rate: float = 5e-3
    seed: int = 0


def build(channels: int = 1) -> nn.Sequential:
    """One network of the zoo, coordinates [..., 2] -> values [..., channels], with the published names."""

    def layer(fan_in: int) -> nn.Sequential:
        return nn.Sequential(OrderedDict(linear=nn.Linear(fan_in, HIDDEN), sine=Sin()))

    return nn.Sequential(OrderedDict(net=nn.Sequential(layer(2), layer(HIDDEN), nn.Linear(HIDDEN, channels))))


NAMES = tuple(name for name, _ in build().named_parameters())


def initial(generator: Generator, channels: int = 1) -> Weights:
    """Initial weights of one network: uniform, +-1/n before the first sine, +-sqrt(6/n)/30 later; PyTorch's biases."""
    weights = {}
    for i, (name, p) in enumerate(build(channels).named_parameters()):
        fan_in = 2 if i < 2 else HIDDEN
        bound = 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / OMEGA if p.ndim > 1 else 1 / math.sqrt(fan_in)
        weights[name] = torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
    return weights


def coordinates(size: int) -> Tensor:
    """[size * size, 2]: (row, column) of every pixel, linspace(-1, 1) each, rows slowest."""
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)


def forward(weights: Mapping[str, Tensor], points: Tensor) -> Tensor:
    """Values [networks, points, channels] of all networks at points [points, 2]."""
    w0, b0, w1, b1, w2, b2 = (weights[name] for name in NAMES)
    h = points.expand(len(w0), -1, -1)
    h = torch.sin(OMEGA * torch.baddbmm(b0.unsqueeze(1), h, w0.mT))
    h = torch.sin(OMEGA * torch.baddbmm(b1.unsqueeze(1), h, w1.mT))
    return torch.baddbmm(b2.unsqueeze(1), h, w2.mT)


@torch.no_grad()
def render(weights: Mapping[str, Tensor], size: int) -> Tensor:
    """The images [networks, channels, size, size] that the networks are."""
    return forward(weights, coordinates(size)).mT.unflatten(2, (size, size))


def psnr(rendered: Tensor, x: Tensor) -> Tensor:
    """[n] decibels for images [n, ...] with values in [-1, 1] (the peak is 2)."""
    return 10 * torch.log10(4 / (rendered - x).square().flatten(1).mean(1))


def fit(settings: Settings, x: Tensor, y: Tensor, rows: range, group: int = 16) -> Zoo:
    """SIRENs of the images x [n, channels, size, size] at `rows`, `group` at a time; targets are their labels.

    Each starts from weights of its own, drawn for its row, so that the group changes rounding alone.
    """
    parts = []
    for i in range(0, len(rows), group):
        index = rows[i : i + group]
        goal = x[index.start : index.stop]
        starts = [initial(generator_of("inr", settings.seed, n), x.shape[1]) for n in index]
        weights = {name: torch.stack([w[name] for w in starts]).requires_grad_() for name in NAMES}
        optimizer = torch.optim.Adam(list(weights.values()), settings.learning_rate)
        points, values = coordinates(x.shape[-1]), goal.flatten(2).mT
        for step in range(settings.steps):
            for parameters in optimizer.param_groups:
                parameters["lr"] = settings.learning_rate * half_cosine(step, settings.steps)
            loss = (forward(weights, points) - values).square().mean((1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done = {name: w.detach() for name, w in weights.items()}
        columns = {"image": list(index), "psnr": psnr(render(done, x.shape[-1]), goal).tolist()}
        parts.append(Zoo(done, y[index.start : index.stop], columns))
    return Zoo.join(parts)


def make(settings: Settings, out: Path, count: int, data: Path | None = None, chunk: int = 400) -> Zoo:
    """SIRENs of the first `count` images (at most all) in `out`: chunks and zoo.safetensors, split by image.

    The published split is 45,000 / 5,000 / 10,000 images in order; here the same order and fractions (3/4, 1/12, 1/6).
    """
    name, x, y = images(data)
    about = {"kind": "inr", **asdict(settings), "dataset": name, "size": x.shape[-1]}
    zoo = generate(out, min(count, len(x)), chunk, about, lambda rows: fit(settings, x, y, rows))
    zoo = split_by_image(zoo, len(zoo) * 3 // 4, len(zoo) * 5 // 6)
    zoo.save(out / "zoo.safetensors")
    return zoo


def split_by_image(zoo: Zoo, train: int = 45000, test: int = 50000) -> Zoo:
    """Images before `train` train, those from `test` on test, those between validate (published: 45,000, 50,000)."""
    image = torch.tensor(zoo.columns["image"])
    masks = {"train": image < train, "val": (image >= train) & (image < test), "test": image >= test}
    return replace(zoo, splits={name: mask.nonzero().flatten() for name, mask in masks.items()})


# ---------------------------------------------------------------------------------- published files
def save_published(zoo: Zoo, folder: Path) -> None:
    """One file randinit_smaller_{label}s/net{image}.pth per network, as published."""
    for i, image in enumerate(zoo.columns["image"]):
        state = OrderedDict((name, x.clone()) for name, x in zoo.state_dict(i).items())
        with write_atomically(folder / f"randinit_smaller_{int(zoo.targets[i])}s" / f"net{image}.pth") as file:
            torch.save(state, file)


def load_published(folder: str | Path) -> Zoo:
    """The networks below `folder`, in the order of their images, with the published split.

    Folders of augmented copies (randinit_smaller_aug1_3s) are left out.

    Raises:
        FileNotFoundError: there are none.
        ZooError: a file is truncated, or holds another network than the others.
    """
    found = [
        (int(file[1]), int(label[1]), path)
        for path in Path(folder).glob("*/net*.pth")
        if (label := FOLDER.match(path.parent.name)) and (file := FILE.match(path.name))
    ]
    if not found:
        raise FileNotFoundError(f"{folder} has no files randinit_smaller_<label>s/net<image>.pth.")
    found.sort()
    states = [read_state_dict(path) for _, _, path in found]
    shapes = {name: x.shape for name, x in states[0].items()}
    for state, (_, _, path) in zip(states, found, strict=True):
        if {name: x.shape for name, x in state.items()} != shapes:
            raise ZooError(f"{path} has other names or shapes than {found[0][2]}. One architecture to a folder.")
    weights = {name: torch.stack([s[name] for s in states]) for name in shapes}
    labels = torch.tensor([label for _, label, _ in found])
    columns = {"image": [image for image, _, _ in found]}
    return split_by_image(Zoo(weights, labels, columns, {}, {"kind": "inr", "folder": Path(folder).name}))


def read_state_dict(path: Path) -> Weights:
    """A state_dict of tensors, read without running code from the file.

    Raises:
        ZooError: the file is truncated, or no state_dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise ZooError(f"{path} is truncated or no state_dict ({error}). Fetch it again.") from error
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ZooError(f"{path} holds no state_dict of tensors.")
    return dict(state)
