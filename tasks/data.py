"""Embedded and downloaded data behind one interface.

`Data` is what a task needs: fresh training examples on demand and a fixed held-out batch. Sources
hold tensors (`Rows`, `Crops`, `Windows`); views change what a source gives (`Noisy`, `Flat`,
`Patches`, `Reconstruct`), so that

    Noisy(Flat(digits(shift=1)), 0.3)

reads as the problem it is. Loaded data is float32 (tokens int64), on the CPU, cached, and split
once and for all.
"""

import functools
import gzip
import math
import pydoc_data.topics
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
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
    """Examples (x, y): training examples are drawn, with augmentation; held-out ones are fixed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one x."""

    @property
    def classes(self) -> int:
        """How many values y can take."""

    def sample(self, generator: Generator, count: int) -> Batch:
        """Training examples x [count, *shape], y [count, ...], drawn from the generator alone."""

    def held_out(self) -> Batch:
        """The fixed held-out batch, disjoint from the training data; <= `HELD_OUT` examples."""


# ------------------------------------------------------------------------------------------ sources


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

    canvas: [n, channels, height, width], y: [n]; a crop has the label of its canvas. Images padded
    by one pixel are canvases too: a crop of one is the image shifted by at most a pixel. Held-out
    crops, held_x [m, channels, size, size], are given. Bytes stay bytes until they are drawn:
    x = (crop - mean) / std, with mean and std [channels, 1, 1].
    """

    canvas: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    mean: Tensor
    std: Tensor
    classes: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.canvas.shape[1], self.size, self.size)

    def sample(self, generator: Generator, count: int) -> Batch:
        x, y = crop(self.canvas, self.y, self.size, generator, count)
        return (x - self.mean) / self.std, y

    def held_out(self) -> Batch:
        return (self.held_x[:HELD_OUT] - self.mean) / self.std, self.held_y[:HELD_OUT]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a token stream, x = tokens[i : i + length]; y is the same moved by one."""

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


def crop(canvas: Tensor, y: Tensor, size: int, generator: Generator, count: int) -> tuple[Tensor, Tensor]:
    """Uniform crops [count, channels, size, size] of uniform canvases, and their labels [count]."""
    # A view, nothing is copied: n, c, rows, columns, size, size.
    windows = canvas.unfold(2, size, 1).unfold(3, size, 1)
    windows = windows.permute(0, 2, 3, 1, 4, 5)
    n, row, column = (_integers(generator, count, high) for high in windows.shape[:3])
    return windows[n, row, column], y[n]


def _integers(generator: Generator, count: int, high: int) -> Tensor:
    return torch.randint(high, (count,), generator=generator)


# -------------------------------------------------------------------------------------------- views


@dataclass(frozen=True, eq=False)
class View(ABC):
    """Other data, seen through `_see`."""

    data: Data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def classes(self) -> int:
        return self.data.classes

    def sample(self, generator: Generator, count: int) -> Batch:
        return self._see(*self.data.sample(generator, count))

    def held_out(self) -> Batch:
        return self._see(*self.data.held_out())

    @abstractmethod
    def _see(self, x: Tensor, y: Tensor) -> Batch: ...


@dataclass(frozen=True, eq=False)
class Noisy(View):
    """Adds Gaussian noise to the training x; std 1 is that of the (standardised) data."""

    std: float

    def sample(self, generator: Generator, count: int) -> Batch:
        x, y = self.data.sample(generator, count)
        return x + self.std * torch.randn(x.shape, generator=generator), y

    def _see(self, x: Tensor, y: Tensor) -> Batch:
        return x, y


@dataclass(frozen=True, eq=False)
class Flat(View):
    """x as one vector."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.data.shape),)

    def _see(self, x: Tensor, y: Tensor) -> Batch:
        return x.flatten(1), y


@dataclass(frozen=True, eq=False)
class Patches(View):
    """Images [c, height, width] as sequences of square patches [tokens, c * size * size].

    Raises:
        ValueError: height or width is not a multiple of `size`.
    """

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

    def _see(self, x: Tensor, y: Tensor) -> Batch:
        return functional.unfold(x, self.size, stride=self.size).transpose(1, 2), y


@dataclass(frozen=True, eq=False)
class Reconstruct(View):
    """The target is x itself. Noise outside, `Noisy(Reconstruct(data), std)`, is to be removed."""

    @property
    def classes(self) -> int:
        raise TypeError("a reconstruction has no classes: its y is x. Pass loss=mean_squared_error to the task.")

    def _see(self, x: Tensor, y: Tensor) -> Batch:
        return x, x


# ------------------------------------------------------------------------------- embedded data sets


@functools.cache
def digits(shift: int = 1) -> Crops:
    """scikit-learn's 1,797 handwritten digits [1, 8, 8], 10 classes, shifted by <= `shift` pixels.

    The first 1,500 train, the last 297 are held out: the file goes from writer to writer.
    """
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.uint8).view(-1, 1, 8, 8), torch.tensor(y)
    return _images(x[:1500], y[:1500], x[1500:], y[1500:], shift)


@functools.cache
def tabular(name: str) -> Rows:
    """scikit-learn's "wine" (178 x 13, 3 classes) or "breast_cancer" (569 x 30, 2), standardised.

    Four fifths train, drawn by a fixed permutation, for the files are ordered by class.

    Raises:
        ValueError: another name.
    """
    loaders = {"wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer}
    if name not in loaders:
        raise ValueError(f"no tabular data set {name!r} is embedded. Choose one of {sorted(loaders)}.")
    x, y = loaders[name](return_X_y=True)
    order = torch.randperm(len(x), generator=Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    train = len(x) * 4 // 5
    x = (x - x[:train].mean(0)) / x[:train].std(0)
    return Rows(x[:train], y[:train], x[train:], y[train:], int(y.max()) + 1)


@functools.cache
def photos(size: int = 8, grid: tuple[int, int] = (2, 4)) -> Crops:
    """Colour patches [3, size, size] of scikit-learn's two photographs, labelled by their region.

    Each photograph (427 x 640) is cut in grid = (rows, columns) regions, so there are
    2 * rows * columns classes; the middle quarter of every region's width is held out.
    """
    photographs = np.stack(datasets.load_sample_images().images)  # [2, 427, 640, 3] uint8
    left, middle, right = split_regions(torch.tensor(photographs).permute(0, 3, 1, 2), *grid)
    y = torch.arange(len(middle))
    train = torch.cat([left, right])
    held_x, held_y = crop(middle, y, size, Generator().manual_seed(0), HELD_OUT)
    return Crops(train, torch.cat([y, y]), held_x, held_y, *_moments(train), len(y), size)


def split_regions(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images x [n, c, h, w] as rows x columns regions, and these as left, middle and right.

    Each [n * rows * columns, c, h / rows, w / columns * (3/8, 1/4, 3/8)], sizes rounded down.
    """
    height, width = x.shape[2] // rows, x.shape[3] // columns
    # unfolded: n, c, rows, columns, height, width
    regions = x.unfold(2, height, height).unfold(3, width, width)
    regions = regions.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    side, middle = width * 3 // 8, width // 4
    left, held, right, _ = regions.split([side, middle, side, width - 2 * side - middle], dim=3)
    return left, held, right


# 96 printable characters; one more symbol stands for any other.
VOCABULARY = "\n" + "".join(chr(code) for code in range(32, 127))


def encode(text: str) -> Tensor:
    """int64 tokens [len(text)] in 0..96; 96 stands for every character not in the vocabulary."""
    index = {character: i for i, character in enumerate(VOCABULARY)}
    return torch.tensor([index.get(character, len(VOCABULARY)) for character in text])


@functools.cache
def text(length: int = 32) -> Windows:
    """Characters of Python's own help texts (about 465,000); the first nine tenths train.

    The text varies with the Python version.
    """
    tokens = _help_tokens()
    train = len(tokens) * 9 // 10
    return Windows(tokens[:train], tokens[train:], len(VOCABULARY) + 1, length)


@functools.cache
def _help_tokens() -> Tensor:
    topics = pydoc_data.topics.topics
    return encode("\n".join(topics[name] for name in sorted(topics)))


def _images(x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, shift: int) -> Crops:
    """Images x [n, channels, size, size] uint8, shifted by up to `shift` pixels over black."""
    canvas = functional.pad(x, 4 * (shift,))
    y, held_y = y.long(), held_y.long()
    return Crops(canvas, y, held_x, held_y, *_moments(x), int(y.max()) + 1, x.shape[-1])


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [channels, 1, 1], of x [n, channels, h, w]."""
    std, mean = torch.std_mean(x.float(), (0, 2, 3))
    return mean[:, None, None], std[:, None, None]


# --------------------------------------------------------------------------------- data in a folder


TORCHVISION = ("MNIST", "FashionMNIST", "CIFAR10")

Labelled = tuple[Tensor, Tensor]  # x [n, channels, size, size] uint8, y [n]


def images(name: str, data: Path | str, *, shift: int = 1, download: bool = False) -> Crops:
    """MNIST, FashionMNIST ([1, 28, 28]) or CIFAR10 ([3, 32, 32]) of the folder `data`.

    `<data>/<name in lower case>/` may hold plain IDX files (`t10k-images-idx3-ubyte`, with or
    without `.gz`; also `train-...`): these need no torchvision. With the t10k files alone the first
    nine tenths (9,000) train and the rest is held out. Otherwise the files are torchvision's, and
    `download=True` lets it fetch them into `data`.

    Raises:
        ValueError: another name.
        FileNotFoundError: the folder has no such data and download is False.
        ImportError: torchvision is needed and is not installed.
    """
    if name not in TORCHVISION:
        raise ValueError(f"unknown image data {name!r}. Choose one of {TORCHVISION}.")
    return _cached_images(name, Path(data).expanduser().resolve(), shift, download)


@functools.cache
def _cached_images(name: str, data: Path, shift: int, download: bool) -> Crops:
    idx = _read_idx_folder(data / name.lower())
    train, held = idx or _read_torchvision(name, data, download)
    return _images(*train, *held, shift)


@functools.cache
def handwriting(data: Path | None, shift: int = 1) -> Crops:
    """Digits [1, 28, 28]: MNIST of the folder, in IDX format; without a folder scikit-learn's 8 x 8 ones, enlarged.

    Raises:
        FileNotFoundError: the folder has no MNIST.
    """
    if data is not None:
        require_idx("MNIST", data)
        return images("MNIST", data, shift=shift)
    small = digits(shift=0)

    def enlarged(x: Tensor) -> Tensor:
        return functional.interpolate(x * 15.0, (28, 28), mode="bilinear").to(torch.uint8)  # bytes of 0..16 to 0..240

    return _images(enlarged(small.canvas), small.y, enlarged(small.held_x), small.held_y, shift)


def has_idx(name: str, data: Path | str) -> bool:
    """Whether `data` has IDX files of `name`, so that `images` needs no torchvision."""
    return _idx_pair(Path(data) / name.lower(), "t10k") is not None


def require_idx(name: str, data: Path | str) -> None:
    """Raises FileNotFoundError if `data` has no IDX files of `name`: other data in their place would go unseen."""
    if not has_idx(name, data):
        raise FileNotFoundError(
            f"the data folder {data} has no {name}: {name.lower()}/t10k-images-idx3-ubyte and -labels-idx1-ubyte (or "
            ".gz). Put them there, or leave the data folder out (--data, LEARNED_OPT_DATA): then a stand-in of "
            "scikit-learn's is used."
        )


def _read_idx_folder(folder: Path) -> tuple[Labelled, Labelled] | None:
    """Training and held-out images of the IDX files in `folder`; None if it has none."""
    train, test = _idx_pair(folder, "train"), _idx_pair(folder, "t10k")
    if test is None:
        return None
    x, y = _read_pair(*test)
    if train is not None:
        return _read_pair(*train), (x, y)
    n = len(x) * 9 // 10
    return (x[:n], y[:n]), (x[n:], y[n:])


def _read_pair(x: Path, y: Path) -> Labelled:
    return read_idx(x).unsqueeze(1), read_idx(y)


def _idx_pair(folder: Path, part: str) -> tuple[Path, Path] | None:
    x = _idx_file(folder, f"{part}-images-idx3-ubyte")
    y = _idx_file(folder, f"{part}-labels-idx1-ubyte")
    return None if x is None or y is None else (x, y)


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, plain or gzipped, as a uint8 tensor.

    Format (of the MNIST database): two zero bytes, a type, the number of axes, big-endian sizes,
    then the bytes.

    Raises:
        ValueError: not such a file, or its length is not what its header says.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        raw = file.read()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(
            f"{path.name} is not an IDX file of unsigned bytes: it starts with {raw[:4]!r}. Fetch it again."
        )
    header = 4 + 4 * raw[3]
    sizes = struct.unpack(f">{raw[3]}I", raw[4:header])
    if len(raw) - header != math.prod(sizes):
        raise ValueError(
            f"{path.name} has {len(raw) - header} bytes of data, but its header says {sizes}. Fetch it again."
        )
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=header)).view(sizes)


def _read_torchvision(name: str, data: Path, download: bool) -> tuple[Labelled, Labelled]:
    try:
        from torchvision import datasets as vision
    except ImportError as error:
        raise ImportError(
            f"the folder {data} has no IDX files of {name}, and other files need torchvision, "
            "which is not installed. Run `pip install torchvision`, or put IDX files in "
            f"{data / name.lower()}."
        ) from error
    load = functools.partial(getattr(vision, name), str(data), download=download)
    try:
        train, test = load(train=True), load(train=False)
    except RuntimeError as error:  # torchvision's way to say that the files are not there
        raise FileNotFoundError(
            f"{name} is not in the folder {data}. Pass download=True, or put IDX files in {data / name.lower()}."
        ) from error
    return _labelled(train), _labelled(test)


def _labelled(part) -> Labelled:
    x = torch.as_tensor(part.data)  # [n, h, w] or [n, h, w, channels]
    return x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2), torch.as_tensor(part.targets)
