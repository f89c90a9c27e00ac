"""Random waves, learned from coordinates by SIRENs. Validation: other waves and widths; and photographs."""

import torch

from tasks.data import Rows
from tasks.fields import picture, pixels
from tasks.task import choice


def waves(generator, side=48):
    """A random picture, a tenth of it held out."""
    line = torch.linspace(-1, 1, side)
    x = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    frequency = 12 * torch.randn(2, 24, generator=generator)
    weight = torch.randn(24, 3, generator=generator) / 24**0.5
    y = torch.sin(x @ frequency + 6 * torch.rand(24, generator=generator)) @ weight
    held = torch.rand(len(x), generator=generator) < 0.1
    return Rows(x[~held], y[~held], x[held], y[held], 0)


def make(source, width, depth, name):
    """A SIREN of a picture."""
    return picture(f"siren-{name}-{width}x{depth}", source, width=width, depth=depth, batch_size=256, steps=400)


families = {
    "siren": lambda generator: make(
        waves(generator), choice(generator, (24, 32, 48)), choice(generator, (2, 3)), "waves"
    )
}
validation = {
    f"siren-waves-{w}x{d}": (lambda w=w, d=d: make(waves(torch.Generator().manual_seed(w)), w, d, "waves"))
    for w, d in ((28, 2), (40, 3), (40, 2))
}
photographs = {
    f"siren-photo-{w}x{d}": (lambda w=w, d=d, side=side: make(pixels(side), w, d, f"photo{side}"))
    for w, d, side in ((40, 2, 48), (40, 3, 64), (28, 2, 36))
}
