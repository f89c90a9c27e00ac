"""Pictures of a zoo: a histogram of its targets, and for sine networks the images that they are."""

from pathlib import Path

import torch

from tasks.zoo import inr
from tasks.zoo.zoo import Zoo, write_atomically


def draw(zoo: Zoo, path: Path) -> None:
    """Write a PNG: renderings of the first 40 networks for INRs, else how many networks have which accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    if zoo.about.get("kind") == "inr":
        size = int(zoo.about.get("size", 28))
        shown = zoo.select(torch.arange(min(40, len(zoo))))
        for i, image in enumerate(inr.render(shown.weights, size)):
            axis = figure.add_subplot(5, 8, i + 1)
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set_axis_off()
    else:
        axis = figure.add_subplot()
        axis.hist(zoo.targets.tolist(), bins=40, range=(0, 1))
        axis.set(xlabel="test accuracy", ylabel="networks", title=f"{len(zoo)} networks")
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)
