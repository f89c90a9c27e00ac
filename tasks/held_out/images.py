"""Letters of many fonts, patches of a mountain range, and fields of an equation: mixing, denoising, solving."""

import functools
import math
import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor, nn
from torch.nn import functional

from tasks.data import Batch
from tasks.held_out.layers import dense, shrunk
from tasks.task import Problem, cross_entropy, mean_squared_error

# ----------------------------------------------------------------------------------------- letters

SIDE, MARGIN = 24, 2
SYMBOLS = string.ascii_letters + string.digits
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmss10", "cmtt10"),
)
HELD_OUT_FONTS = ("DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBolIta", "cmb10")


@functools.cache
def letters(fonts: tuple[str, ...]) -> Tensor:
    """White on black, [fonts, symbols, 1, SIDE + 2 MARGIN, SIDE + 2 MARGIN] in [-1, 1], by fonts of matplotlib."""
    side = SIDE + 2 * MARGIN
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = np.zeros((len(fonts), len(SYMBOLS), side, side), dtype=np.float32)
    for row, name in zip(images, fonts, strict=True):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 20, layout_engine=ImageFont.Layout.BASIC)
        for picture, symbol in zip(row, SYMBOLS, strict=True):
            canvas = Image.new("L", (side, side))
            ImageDraw.Draw(canvas).text((side // 2, side * 3 // 4), symbol, fill=255, font=font, anchor="ms")
            picture[:] = np.asarray(canvas)
    return torch.from_numpy(images).unsqueeze(2) / 127.5 - 1


def printed(fonts: Tensor, generator: Generator, count: int) -> Batch:
    """Noisy letters [count, 1, SIDE, SIDE], moved by up to MARGIN pixels, and which they are [count]."""
    font, y = (torch.randint(n, (count,), generator=generator) for n in fonts.shape[:2])
    cut = fonts.unfold(3, SIDE, 1).unfold(4, SIDE, 1)  # fonts, symbols, 1, places, places, SIDE, SIDE
    across, down = torch.randint(2 * MARGIN + 1, (2, count), generator=generator)
    x = cut[font, y, :, down, across]
    return x + 0.6 * torch.randn(x.shape, generator=generator), y


class MixerBlock(nn.Module):
    """Tolstikhin et al. 2021, "MLP-Mixer": a network across patches, then one across channels, [B, patches, width]."""

    def __init__(self, patches: int, width: int, across: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # No bias for a patch: it would be the same for all channels, to which every norm that follows is blind.
        self.patches = nn.Sequential(nn.Linear(patches, across), nn.GELU(), nn.Linear(across, patches, bias=False))
        self.channels = dense([width, hidden, width], nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm1(x).transpose(-2, -1)).transpose(-2, -1)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Images [B, 1, SIDE, SIDE] -> classes, by `MixerBlock`s on patches of `patch` pixels."""

    def __init__(self, classes: int, *, patch: int, width: int, across: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, patch)
        patches = (SIDE // patch) ** 2
        self.blocks = nn.Sequential(*(MixerBlock(patches, width, across, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.embed(x).flatten(-2).transpose(-2, -1))
        return self.head(self.norm(h).mean(-2))


def mixer_letters() -> Problem:
    """Which letter or digit; four fonts are held out."""
    fonts, held = letters(FONTS), letters(HELD_OUT_FONTS)
    return Problem(
        "mixer-letters",
        lambda: Mixer(len(SYMBOLS), patch=4, width=116, across=58, hidden=300, depth=4),
        functools.partial(printed, fonts),
        lambda model, x, y: cross_entropy(model(x), y),
        batch_size=32,
        steps=700,
        held_out=lambda: printed(held, Generator().manual_seed(0), 496),
        ceiling=math.log(len(SYMBOLS)),
        eval_size=256,
    )


# --------------------------------------------------------------------------------------- mountains

PATCH = 16
NOISE = (-1.2, 1.2)  # mean and standard deviation of the log of the noise (Karras et al. 2022, table 1)


@functools.cache
def mountains() -> Tensor:
    """Heights of a mountain range [344, 403], from matplotlib's sample data; patches have variance 1 in the mean."""
    with np.load(Path(matplotlib.get_data_path()) / "sample_data" / "jacksboro_fault_dem.npz") as file:
        heights = torch.tensor(file["elevation"].astype(np.float32))
    patches = heights.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
    return heights / patches.var((-2, -1)).mean().sqrt()


def noisy_patches(heights: Tensor, generator: Generator, count: int) -> Batch:
    """What a denoiser is given and must give, for patches of mean zero with noise of random size s.

    x [count, 2, PATCH, PATCH]: the noisy patch over sqrt(1 + s^2), and log(s) / 4 everywhere. y [count, 1, PATCH,
    PATCH]: sqrt(1 + s^2) / s times the patch, less what the noisy one says of it, x / (1 + s^2) (Karras et al. 2022,
    "Elucidating the Design Space of Diffusion-Based Generative Models", equation 8).
    """
    row, column = (torch.randint(n - PATCH + 1, (count,), generator=generator) for n in heights.shape)
    clean = heights.unfold(0, PATCH, 1).unfold(1, PATCH, 1)[row, column].unsqueeze(1)
    clean = clean - clean.mean((-2, -1), keepdim=True)
    turned = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    clean = torch.where(turned, clean.transpose(-2, -1), clean)
    s = torch.exp(NOISE[0] + NOISE[1] * torch.randn(count, 1, 1, 1, generator=generator))
    noisy = clean + s * torch.randn(clean.shape, generator=generator)
    size = (1 + s.square()).sqrt()
    return torch.cat([noisy / size, s.log().expand_as(noisy) / 4], 1), size / s * (clean - noisy / size.square())


class TimedBlock(nn.Module):
    """h + conv(silu(norm(conv(silu(norm(h)))) * (1 + a) + b)), with a and b from the embedding of the noise's size."""

    def __init__(self, fan_in: int, fan_out: int, embedding: int, groups: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, fan_in), nn.GroupNorm(groups, fan_out)
        self.conv1, self.conv2 = nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * fan_out)
        self.skip = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        a, b = self.film(embedding).unsqueeze(-1).unsqueeze(-1).chunk(2, -3)
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h) * (1 + a) + b))
        return self.skip(x) + h


class TimedUNet(nn.Module):
    """Ronneberger et al. 2015, "U-Net", a denoiser of three resolutions: [B, 2, side, side] -> [B, 1, side, side]."""

    def __init__(self, widths: tuple[int, int, int], embedding: int) -> None:
        super().__init__()
        a, b, c = widths
        self.embed = nn.Sequential(dense([8, embedding, embedding], nn.SiLU), nn.SiLU())
        self.first = nn.Conv2d(1, a, 3, padding=1)
        self.down = nn.ModuleList([TimedBlock(a, a, embedding), TimedBlock(a, b, embedding)])
        self.middle = TimedBlock(b, c, embedding)
        self.up = nn.ModuleList([TimedBlock(c + b, b, embedding), TimedBlock(b + a, a, embedding)])
        self.last = nn.Sequential(nn.GroupNorm(4, a), nn.SiLU(), nn.Conv2d(a, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        noisy, size = x[:, :1], x[:, 1, 0, :1]
        waves = size * 2.0 ** torch.arange(4).to(size)
        embedding = self.embed(torch.cat([torch.sin(waves), torch.cos(waves)], -1))
        h, kept = self.first(noisy), []
        for block in self.down:
            h = block(h, embedding)
            kept.append(h)
            h = functional.avg_pool2d(h, 2)
        h = self.middle(h, embedding)
        for block in self.up:
            h = functional.interpolate(h, scale_factor=2.0, mode="nearest")
            h = block(torch.cat([h, kept.pop()], 1), embedding)
        return self.last(h)


def unet_mountains() -> Problem:
    """The score of patches of a mountain range at all sizes of noise; the range's eastern fifth is held out."""
    heights = mountains()
    east = heights.shape[1] * 4 // 5
    return Problem(
        "unet-mountains",
        lambda: TimedUNet((28, 60, 92), 60),
        functools.partial(noisy_patches, heights[:, :east]),
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=16,
        steps=800,
        held_out=lambda: noisy_patches(heights[:, east:], Generator().manual_seed(0), 256),
        eval_size=256,
    )


# ------------------------------------------------------------------------------------------ fields

CELLS, SCREENING, CUBIC = 16, 10.0, 40.0


def fields(generator: Generator, count: int) -> Batch:
    """Sources f and solutions u [count, 1, CELLS, CELLS] of -laplace u + SCREENING u + CUBIC u^3 = f on a torus.

    u is drawn, a random field whose waves fall off with their number, and f computed from it, over a fixed size.
    """
    wave = 2 * math.pi * torch.fft.fftfreq(CELLS, 1 / CELLS)
    square = wave.square().unsqueeze(1) + wave.square()
    white = torch.fft.fft2(torch.randn(count, 1, CELLS, CELLS, generator=generator))
    spectrum = 9 * white * (1 + square / 60).pow(-1.25)
    u = torch.fft.ifft2(spectrum).real
    f = torch.fft.ifft2(square * spectrum).real + SCREENING * u + CUBIC * u.pow(3)
    return f / 300, u


class DepthwiseBlock(nn.Module):
    """Liu et al. 2022, "A ConvNet for the 2020s": a convolution of each channel alone, then a network of each pixel."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding="same", padding_mode="circular", groups=width)
        self.norm, self.mix = nn.LayerNorm(width), dense([width, 4 * width, width], nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.norm(self.conv(x).movedim(-3, -1)))
        return x + h.movedim(-1, -3)


def depthwise_network(width: int, kernel: int, depth: int) -> nn.Sequential:
    """Fields [B, 1, n, n] -> [B, 1, n, n], periodic."""
    blocks = (DepthwiseBlock(width, kernel) for _ in range(depth))
    return shrunk(nn.Sequential(nn.Conv2d(1, width, 1), *blocks, nn.Conv2d(width, 1, 1)), 0.3)


def convnext_field() -> Problem:
    """The solution of an elliptic equation from its source."""
    return Problem(
        "stream-convnext-field",
        lambda: depthwise_network(36, 5, 3),
        fields,
        lambda model, x, y: mean_squared_error(model(x), y),
        batch_size=16,
        steps=800,
        eval_size=128,
    )
