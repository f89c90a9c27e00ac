"""The command line: ``python -m tasks.zoo {cnn,inr,transformer,describe}``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from tasks.zoo import cnn, inr, transformer
from tasks.zoo.pictures import draw
from tasks.zoo.zoo import Zoo, ZooError

Flat = tyro.conf.arg(name="")  # the recipe's fields are options themselves
CNN, INR, TRANSFORMER = cnn.Settings(), inr.Settings(), transformer.Settings()


def cnn_zoo(
    settings: Annotated[cnn.Settings, Flat] = CNN, *, out: Path, count: int = 1000, data: Path | None = None
) -> None:
    """Train a Small CNN Zoo on MNIST (of the data folder) or scikit-learn's digits.

    Args:
        settings: the recipe.
        out: folder of this zoo; the same command goes on where an interrupted one stopped.
        count: number of networks.
        data: folder with mnist/ in IDX format; default: LEARNED_OPT_DATA.
    """
    _finish(cnn.make(settings, out, count, data), out)


def inr_zoo(
    settings: Annotated[inr.Settings, Flat] = INR,
    *,
    out: Path,
    count: int = 10_000,
    data: Path | None = None,
    published: bool = False,
) -> None:
    """Fit sine networks (SIREN 2-32-32-1) to MNIST (of the data folder) or scikit-learn's digits.

    Args:
        settings: the recipe.
        out: folder of this zoo; the same command goes on where an interrupted one stopped.
        count: number of images, from the first.
        data: folder with mnist/ in IDX format; default: LEARNED_OPT_DATA.
        published: also write one .pth file per image, in the published folders.
    """
    zoo = inr.make(settings, out, count, data)
    if published:
        inr.save_published(zoo, out / "published")
    _finish(zoo, out)


def transformer_zoo(
    settings: Annotated[transformer.Settings, Flat] = TRANSFORMER,
    *,
    out: Path,
    count: int = 300,
    data: Path | None = None,
    published: bool = False,
) -> None:
    """Train a Small Transformer Zoo on MNIST patches (or digits), or on AG News.

    Args:
        settings: the recipe.
        out: folder of this zoo; the same command goes on where an interrupted one stopped.
        count: number of networks.
        data: folder with mnist/ in IDX format and ag_news/test.csv; default: LEARNED_OPT_DATA.
        published: also write one .pt file per network and the table of metadata, as published.
    """
    zoo = transformer.make(settings, out, count, data)
    if published:
        transformer.save_published(zoo, out / "published")
    _finish(zoo, out)


def describe(folder: Path, /) -> None:
    """Print a zoo's hyper-parameters and accuracies, and draw it again.

    Args:
        folder: the --out of a finished generation.
    """
    _finish(Zoo.load(folder / "zoo.safetensors"), folder)


def _finish(zoo: Zoo, out: Path) -> None:
    print(zoo.describe())
    draw(zoo, out / "zoo.png")
    print(f"\nwritten: {out / 'zoo.safetensors'}, {out / 'zoo.png'}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "cnn": cnn_zoo,
    "inr": inr_zoo,
    "transformer": transformer_zoo,
    "describe": describe,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; bad input is one line."""
    torch.set_num_threads(1)  # the tensors are too small to share
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m tasks.zoo", description=__doc__, args=args)
    except (ZooError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last finished chunk.") from None


if __name__ == "__main__":
    main()
