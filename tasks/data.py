"""Embedded and downloaded data behind one interface.

`Data` is what a task needs: fresh training examples on demand and a fixed held-out batch. Sources hold tensors
(`Rows`, `Crops`, `Windows`); views change what a source gives (`Noisy`, `Flat`, `Patches`, `Reconstruct`), so that

    Noisy(Flat(digits(shift=1)), 0.3)

reads as the problem it is. Loaded data is float32 (tokens int64), on the CPU, cached, and split once and for all.
"""

import functools
import gzip
import hashlib
import math
import pydoc_data.topics
import struct
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from sklearn import datasets
from torch import Generator, Tensor
from torch.nn import functional

HELD_OUT = 1024  # at most this many held-out examples

Batch = tuple[Tensor, ...]


class Data(Protocol):
    """Examples (x, y): `sample` draws training examples with augmentation, `held_out` is one fixed batch without."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one x."""

    @property
    def classes(self) -> int:
        """How many values y can take."""

    def sample(self, generator: Generator, count: int) -> Batch:
        """`count` training examples: x [count, *shape], y [count, ...]; all randomness is the generator's."""

    def held_out(self) -> Batch:
        """The fixed held-out batch, disjoint from the training data, at most `HELD_OUT` examples."""


# --------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples taken as they are: x [n, ...] float32, y [n] int64."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def sample(self, generator: Generator, count: int) -> Batch:
        i = _integers(generator, count, len(self.x))
        return self.x[i], self.y[i]

    def held_out(self) -> Batch:
        return self.held_x[:HELD_OUT], self.held_y[:HELD_OUT]


@dataclass(frozen=True, eq=False)
class Crops:
    """Square crops, `size` wide, at uniform positions of larger canvases.

    canvas: [n, channels, height, width], y: [n]; a crop has the label of its canvas. Images padded by one pixel are
    canvases too: a crop of one is the image shifted by at most a pixel. The held-out crops are given.
    """

    canvas: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    classes: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.canvas.shape[1], self.size, self.size)

    def sample(self, generator: Generator, count: int) -> Batch:
        return crop(self.canvas, self.y, self.size, generator, count)

    def held_out(self) -> Batch:
        return self.held_x[:HELD_OUT], self.held_y[:HELD_OUT]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a token stream for next-token prediction: x = tokens[i : i + length], y the same moved by one."""

    tokens: Tensor
    held_tokens: Tensor
    classes: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    def sample(self, generator: Generator, count: int) -> Batch:
        return self._cut(self.tokens, _integers(generator, count, len(self.tokens) - self.length))

    def held_out(self) -> Batch:
        starts = torch.arange(0, len(self.held_tokens) - self.length, self.length)
        return self._cut(self.held_tokens, starts[: HELD_OUT // 4])

    def _cut(self, tokens: Tensor, starts: Tensor) -> Batch:
        window = tokens.unfold(0, self.length + 1, 1)[starts]
        return window[:, :-1], window[:, 1:]


def crop(canvas: Tensor, y: Tensor, size: int, generator: Generator, count: int) -> Batch:
    """`count` crops [count, channels, size, size] of uniform canvases at uniform positions, and their labels."""
    windows = (
        canvas.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)
    )  # a view: n, row, column, ...
    n, rows, columns = windows.shape[:3]
    i = _integers(generator, count, n)
    return windows[i, _integers(generator, count, rows), _integers(generator, count, columns)], y[i]


def _integers(generator: Generator, count: int, high: int) -> Tensor:
    return torch.randint(high, (count,), generator=generator)


# ----------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True, eq=False)
class Noisy:
    """Adds Gaussian noise of standard deviation `std` to the training x (data is standardised: std 1)."""

    data: Data
    std: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def classes(self) -> int:
        return self.data.classes

    def sample(self, generator: Generator, count: int) -> Batch:
        x, y = self.data.sample(generator, count)
        return x + self.std * torch.randn(x.shape, generator=generator), y

    def held_out(self) -> Batch:
        return self.data.held_out()


@dataclass(frozen=True, eq=False)
class Flat:
    """x as one vector."""

    data: Data

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.data.shape),)

    @property
    def classes(self) -> int:
        return self.data.classes

    def sample(self, generator: Generator, count: int) -> Batch:
        return self._view(*self.data.sample(generator, count))

    def held_out(self) -> Batch:
        return self._view(*self.data.held_out())

    def _view(self, x: Tensor, y: Tensor) -> Batch:
        return x.flatten(1), y


@dataclass(frozen=True, eq=False)
class Patches:
    """Images [channels, height, width] as a sequence of square patches [tokens, channels * size * size].

    Raises:
        ValueError: height or width is not a multiple of `size`.
    """

    data: Data
    size: int

    def __post_init__(self) -> None:
        if any(n % self.size for n in self.data.shape[1:]):
            raise ValueError(
                f"images of {self.data.shape[1:]} pixels cannot be cut in patches of {self.size}. "
                "Choose a patch size that divides height and width."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        channels, height, width = self.data.shape
        return (height // self.size) * (width // self.size), channels * self.size**2

    @property
    def classes(self) -> int:
        return self.data.classes

    def sample(self, generator: Generator, count: int) -> Batch:
        return self._view(*self.data.sample(generator, count))

    def held_out(self) -> Batch:
        return self._view(*self.data.held_out())

    def _view(self, x: Tensor, y: Tensor) -> Batch:
        return functional.unfold(x, self.size, stride=self.size).transpose(1, 2), y


@dataclass(frozen=True, eq=False)
class Reconstruct:
    """The target is x itself. Noise added outside, `Noisy(Reconstruct(data), std)`, makes a denoising problem."""

    data: Data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def classes(self) -> int:
        raise TypeError("a reconstruction has no classes: its y is x. Use the mean squared error.")

    def sample(self, generator: Generator, count: int) -> Batch:
        x, _ = self.data.sample(generator, count)
        return x, x

    def held_out(self) -> Batch:
        x, _ = self.data.held_out()
        return x, x


def digest(data: Data) -> str:
    """SHA-256 of all tensors and settings of `data`: equal digests mean the same problem, on any machine.

    The text corpus varies with the Python version, so record this beside every result that used it.
    """
    h = hashlib.sha256()
    _hash(h, data)
    return h.hexdigest()


def _hash(h, value: object) -> None:
    if is_dataclass(value):
        h.update(type(value).__name__.encode())
        for field in fields(value):
            h.update(field.name.encode())
            _hash(h, getattr(value, field.name))
    elif isinstance(value, Tensor):
        h.update(str((value.dtype, tuple(value.shape))).encode())
        h.update(value.contiguous().numpy().tobytes())
    else:
        h.update(repr(value).encode())


# ----------------------------------------------------------------------------------------- embedded data sets


@functools.cache
def digits(shift: int = 1) -> Crops:
    """scikit-learn's 1,797 handwritten digits [1, 8, 8], 10 classes: the first 1,500 train, the last 297 are held out.

    The file is ordered by writer, so held-out digits are from other hands. `shift`: augmentation in pixels.
    """
    x, y = datasets.load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)
    return _images(x, torch.tensor(y), 1500, shift)


@functools.cache
def tabular(name: str) -> Rows:
    """scikit-learn's "wine" (178 x 13, 3 classes) or "breast_cancer" (569 x 30, 2): standardised, 4/5 train.

    Raises:
        ValueError: another name.
    """
    loaders = {"wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer}
    if name not in loaders:
        raise ValueError(
            f"no tabular data set {name!r} is embedded. Choose one of {sorted(loaders)}."
        )
    x, y = loaders[name](return_X_y=True)
    order = torch.randperm(
        len(x), generator=Generator().manual_seed(0)
    )  # the files are ordered by class
    x, y = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    train = len(x) * 4 // 5
    x = (x - x[:train].mean(0)) / x[:train].std(0)
    return Rows(x[:train], y[:train], x[train:], y[train:], int(y.max()) + 1)


@functools.cache
def photos(size: int = 8, grid: tuple[int, int] = (2, 4)) -> Crops:
    """Colour patches [3, size, size] of scikit-learn's two photographs; the class is the region a patch comes from.

    Each photograph (427 x 640) is cut in grid = (rows, columns) regions, so there are 2 * rows * columns classes. The
    left three quarters of a region are for training, the rest is held out; channels are standardised.
    """
    photographs = np.stack(datasets.load_sample_images().images)  # [2, 427, 640, 3] uint8
    x = torch.tensor(photographs, dtype=torch.float32).permute(0, 3, 1, 2)
    train, held = split_regions(x, *grid)
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    train, held = (train - mean) / std, (held - mean) / std
    y = torch.arange(len(train))
    return Crops(
        train, y, *crop(held, y, size, Generator().manual_seed(0), HELD_OUT), len(train), size
    )


def split_regions(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Regions of images x [n, c, h, w]: train [n*rows*columns, c, h', 3w'/4] and held out [n*rows*columns, c, h', w'/4]."""
    height, width = x.shape[2] // rows, x.shape[3] // columns
    regions = x.unfold(2, height, height).unfold(
        3, width, width
    )  # n, c, rows, columns, height, width
    regions = regions.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return tuple(
        part.contiguous() for part in regions.split([width * 3 // 4, width - width * 3 // 4], dim=3)
    )


VOCABULARY = "\n" + "".join(
    chr(i) for i in range(32, 127)
)  # 96 printable characters; one more symbol is "other"


def encode(text: str) -> Tensor:
    """Text as int64 tokens < len(VOCABULARY) + 1 = 97; the last stands for every character not in the vocabulary."""
    index = {c: i for i, c in enumerate(VOCABULARY)}
    return torch.tensor([index.get(c, len(VOCABULARY)) for c in text])


@functools.cache
def _help_tokens() -> Tensor:
    topics = pydoc_data.topics.topics
    return encode("\n".join(topics[name] for name in sorted(topics)))


@functools.cache
def text(length: int = 32) -> Windows:
    """Characters of Python's own help texts (about 465,000): the first nine tenths train, the rest is held out.

    The text varies with the Python version; see `digest`.
    """
    return _windows(_help_tokens(), 0.9, length)


def _windows(tokens: Tensor, train: float, length: int) -> Windows:
    n = int(train * len(tokens))
    return Windows(tokens[:n], tokens[n:], len(VOCABULARY) + 1, length)


def _images(x: Tensor, y: Tensor, train: int, shift: int) -> Crops:
    """Images x [n, channels, h, h], standardised; the first `train` are padded by `shift`, the others held out."""
    mean, std = x[:train].mean((0, 2, 3), keepdim=True), x[:train].std((0, 2, 3), keepdim=True)
    background = float(x[:train].min())
    canvas = functional.pad(x[:train], 4 * (shift,), value=background)
    y = y.long()
    return Crops(
        (canvas - mean) / std,
        y[:train],
        (x[train:] - mean) / std,
        y[train:],
        int(y.max()) + 1,
        x.shape[-1],
    )


# --------------------------------------------------------------------------------------------- data in a folder


def images(name: str, data: Path | str, *, shift: int = 1, download: bool = False) -> Crops:
    """MNIST, FashionMNIST or CIFAR10 from the folder `data`; 10 classes, standardised, [1, 28, 28] or [3, 32, 32].

    `<data>/<name in lower case>/` may hold plain IDX files (`t10k-images-idx3-ubyte`, with or without `.gz`; also
    `train-...`): these need no torchvision. With the t10k files alone the first 9,000 train and the rest is held out.
    Otherwise the files are torchvision's, and `download=True` lets it fetch them into `data`.

    Raises:
        ValueError: another name.
        FileNotFoundError: the folder has no such data and download is False.
        ImportError: torchvision is needed and is not installed.
    """
    if name not in TORCHVISION:
        raise ValueError(f"unknown image data {name!r}. Choose one of {TORCHVISION}.")
    return _cached_images(name, Path(data).expanduser().resolve(), shift, download)


TORCHVISION = ("MNIST", "FashionMNIST", "CIFAR10")


@functools.cache
def _cached_images(name: str, data: Path, shift: int, download: bool) -> Crops:
    parts = _read_idx_folder(data / name.lower()) or _read_torchvision(name, data, download)
    (x, y), (held_x, held_y) = parts
    return _images(torch.cat([x, held_x]).float(), torch.cat([y, held_y]), len(x), shift)


def has_idx(name: str, data: Path | str | None) -> bool:
    """Whether the folder `data` has the IDX files of `name`, so that `images` needs neither torchvision nor a download."""
    return (
        data is not None
        and _idx_file(Path(data) / name.lower(), "t10k-images-idx3-ubyte") is not None
    )


Labelled = tuple[Tensor, Tensor]


def _read_idx_folder(folder: Path) -> tuple[Labelled, Labelled] | None:
    """Training and held-out (x [n, 1, h, w] uint8, y [n]) of the IDX files in `folder`; None if it has none."""
    test = _read_idx_pair(folder, "t10k")
    if test is None:
        return None
    train = _read_idx_pair(folder, "train")
    if train is not None:
        return train, test
    n = len(test[0]) * 9 // 10
    return (test[0][:n], test[1][:n]), (test[0][n:], test[1][n:])


def _read_idx_pair(folder: Path, part: str) -> Labelled | None:
    x, y = (
        _idx_file(folder, f"{part}-images-idx3-ubyte"),
        _idx_file(folder, f"{part}-labels-idx1-ubyte"),
    )
    return None if x is None or y is None else (read_idx(x).unsqueeze(1), read_idx(y).long())


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, plain or gzipped, as a uint8 tensor.

    Format: http://yann.lecun.com/exdb/mnist: two zero bytes, type, number of axes, big-endian sizes, then the bytes.

    Raises:
        ValueError: not an IDX file of unsigned bytes, or shorter than its header says.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        raw = file.read()
    zero, kind, axes = struct.unpack(">HBB", raw[:4]) if len(raw) >= 4 else (1, 0, 0)
    if zero != 0 or kind != 0x08:
        raise ValueError(
            f"{path.name} is not an IDX file of unsigned bytes: its header is {raw[:4]!r}. Fetch it again."
        )
    header = 4 + 4 * axes
    sizes = struct.unpack(f">{axes}I", raw[4:header])
    if len(raw) - header != math.prod(sizes):
        raise ValueError(
            f"{path.name} has {len(raw) - header} bytes, but its header says {sizes}. Fetch it again."
        )
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(sizes)


def _read_torchvision(name: str, data: Path, download: bool) -> tuple[Labelled, Labelled]:
    try:
        from torchvision import datasets as vision
    except ImportError as error:
        raise ImportError(
            f"{name} is not in the folder {data} as IDX files, and reading it otherwise needs torchvision, which is "
            f"not installed. Run `pip install torchvision`, or put the IDX files in {data / name.lower()}."
        ) from error
    try:
        parts = [
            getattr(vision, name)(str(data), train=train, download=download)
            for train in (True, False)
        ]
    except RuntimeError as error:  # torchvision's way to say that the files are not there
        raise FileNotFoundError(
            f"{name} is not in the folder {data}. Pass download=True, or put the IDX files in {data / name.lower()}."
        ) from error
    return tuple((_channels_first(part.data), torch.as_tensor(part.targets)) for part in parts)


def _channels_first(x: Tensor | np.ndarray) -> Tensor:
    x = torch.as_tensor(x)
    return x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
