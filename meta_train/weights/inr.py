"""Sine networks of images: which digit is it, and edit the image by editing the weights.

The experiments of Zhou et al. 2023 (NP, HNP), Tran et al. 2024 (Monomial-NFN) and Vo et al. 2024 (MAGEP-NFN) on
networks of our own, each fitted from initial weights of its own. Two inputs are compared: the weights as they are, and
messages through the sines (:mod:`learned_opt.nfn.sine`) with the papers' layers on their features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file, save
from torch import Generator, Tensor, nn
from torch.nn import functional

from learned_opt.checkpoint import write_atomically
from learned_opt.nfn import (
    Chain,
    Features,
    Fit,
    HNPLinear,
    MAGEPLinear,
    MonomialLinear,
    NPLinear,
    SineCanonical,
    SineEditor,
    SineNFN,
    WeightSpaceEditor,
    WeightSpacePredictor,
    pointwise,
)
from learned_opt.nfn.fit.builders import make_editor, make_predictor
from meta_train.bench.jobs import short_hash
from meta_train.bench.output import new_figure, show, write_figure
from meta_train.errors import at_least_one
from meta_train.weights.runs import (
    Grid,
    Job,
    Measures,
    Published,
    Run,
    cells,
    draw,
    run_grid,
    write_results,
    zoo_digest,
)
from tasks.zoo import inr as zoos
from tasks.zoo.sources import images
from tasks.zoo.zoo import Zoo, ZooError

Flat = tyro.conf.arg(name="")  # the fields are options themselves
TITLES = {"weights": "weights", "canonical": "canonical weights", "messages": "weights and messages"}


# ------------------------------------------------------------------------------------------ data
@lru_cache(maxsize=1)
def zoo_of(folder: Path, count: int, data: Path | None = None) -> tuple[Chain, Zoo]:
    """The chain of its sine networks, and the zoo (split by image), generated where it is missing.

    Raises:
        ZooError: it is a zoo of other networks.
    """
    path = folder / "zoo.safetensors"
    zoo = Zoo.load(path) if path.is_file() else zoos.make(zoos.Settings(), folder, count, data)
    if zoo.about.get("kind") != "inr":
        raise ZooError(f"{folder} holds a zoo of {zoo.about.get('kind')} networks, not of sine networks (inr).")
    return Chain.from_state_dict(zoo.state_dict(0), "sign"), zoo


def part(zoo: Zoo, split: str) -> tuple[dict[str, Tensor], Tensor]:
    """Weights ``{name: [networks, *shape]}`` and the rows of a split."""
    rows = zoo.splits[split]
    return {n: x[rows] for n, x in zoo.weights.items()}, rows


def moved(
    features: Features, generator: Generator, turn: float = 0.2, scale: float = 0.12, shift: float = 0.12
) -> Features:
    """The networks of turned, stretched and shifted images: exact, by an affine map of the coordinates.

    ``f(A x + d)`` has the first weight ``W A`` and the first bias ``b + W d``.

    Args:
        features: of sine networks of images, ``[B, 1, *shape]``.
        generator: draws one map per network, uniform in all ranges.
        turn: largest angle in radians.
        scale: largest relative change of the size of an axis.
        shift: largest shift; the image is 2 wide.
    """
    weight, bias = features[zoos.NAMES[0]], features[zoos.NAMES[1]]
    t, sx, sy, dx, dy = 2 * torch.rand(5, len(weight), generator=generator).to(weight) - 1
    cos, sin = (turn * t).cos(), (turn * t).sin()
    turned = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    matrix = turned * (1 + scale * torch.stack([sx, sy], -1)).unsqueeze(1)
    offset = shift * torch.stack([dx, dy], -1).unsqueeze(-1)
    first = {
        zoos.NAMES[0]: weight @ matrix.unsqueeze(1),
        zoos.NAMES[1]: bias + (weight @ offset.unsqueeze(1)).squeeze(-1),
    }
    return {**features, **first}


# ------------------------------------------------------------------------------------------ classification
@dataclass(frozen=True)
class Method:
    """A classifier or editor.

    Attributes:
        kind: its layers.
        lr: learning rate (chosen on validation).
        options: of the layers.
        front: options of the messages in front; empty where there are none.
        seeds: at most so many runs (rows that are slow and there to compare).
    """

    kind: str
    lr: float
    options: Mapping[str, Any]
    front: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 10


FRONT = {"channels": 256, "in_channels": 4}
SMALL: dict[str, Any] = {"channels": (8,), "head_width": 128}
WIDE: dict[str, Any] = {"channels": (16, 16), "head_width": 256}
CLASSIFIERS = {
    ("MLP", "weights"): Method("mlp", 1e-3, {"head_width": 500}),
    ("NP", "weights"): Method("np", 3e-3, WIDE, seeds=1),
    ("HNP", "weights"): Method("hnp", 3e-3, WIDE, seeds=1),
    ("Monomial", "weights"): Method("hnp", 3e-3, {**WIDE, "front": 16}, seeds=1),
    ("MAGEP", "weights"): Method("magep", 3e-3, {**WIDE, "activation": "sin"}, seeds=1),
    ("HNP", "canonical"): Method("hnp", 3e-3, WIDE, seeds=1),
    ("MAGEP", "canonical"): Method("magep", 3e-3, {**WIDE, "activation": "sin"}, seeds=1),
    ("NP", "messages"): Method("np", 6e-3, SMALL, FRONT),
    ("HNP", "messages"): Method("hnp", 6e-3, SMALL, FRONT),
    ("Monomial", "messages"): Method("monomial", 6e-3, SMALL, FRONT),
    ("MAGEP", "messages"): Method("magep", 6e-3, SMALL, FRONT),
    ("head", "messages"): Method("sine", 6e-3, {}, {"channels": 256}),
    ("head on values at learned points", "messages"): Method("sine", 3e-3, {}, {"channels": 128, "mixing": "none"}),
}


@dataclass(frozen=True)
class Classification:
    """What a run depends on besides method, input and seed.

    Attributes:
        passes: networks seen in training, counted with repetition.
        batch: of training.
    """

    passes: int = 37_500
    batch: int = 64

    def __post_init__(self) -> None:
        at_least_one(passes=self.passes, batch=self.batch)


def classifier(chain: Chain, method: Method, seed: int, inputs: str) -> WeightSpacePredictor:
    """The predictor of a method on its inputs, with initial weights of this seed."""
    if inputs == "weights":
        options = {"standardise": True, "seed": seed, **method.options}
        return WeightSpacePredictor(chain, kind=method.kind, outputs=10, loss="cross_entropy", **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if inputs == "canonical":
            body = make_predictor(chain, 10, method.kind, method.options)
            module: nn.Module = nn.Sequential(SineCanonical(chain), body)
        elif method.kind == "sine":
            module = SineNFN(chain, 10, **method.front)
        else:
            options = {"in_channels": method.front["in_channels"], **method.options}
            body = make_predictor(chain, 64, method.kind, options)
            module = SineNFN(chain, 10, body=body, width=64, **method.front)
    return WeightSpacePredictor(chain, module=module, outputs=10, loss="cross_entropy")


def classify(job: Job, folder: Path, count: int, device: str = "cpu") -> Measures:
    """Fit one classifier; its accuracy on the test images' networks, on validation and at the end of training."""
    method, settings = CLASSIFIERS[job.method, job.dataset], job.settings
    chain, zoo = zoo_of(folder, count)
    train, val, test = ((x, zoo.targets[rows]) for x, rows in (part(zoo, s) for s in ("train", "val", "test")))
    epochs = max(1, round(settings["passes"] / len(train[1])))
    predictor = classifier(chain, method, job.seed, job.dataset)
    fit = Fit(epochs=epochs, batch=settings["batch"], lr=method.lr, seed=job.seed)
    predictor.fit(*train, validation=val, settings=fit, augment=moved, device=device, progress=False)
    return {
        "accuracy": 100 * predictor.score(*test)["accuracy"],
        "val_accuracy": 100 * predictor.score(*val)["accuracy"],
        "train_loss": predictor.history[-1]["train_loss"],
        "parameters": float(sum(p.numel() for p in predictor.module.parameters())),
    }


CLASSIFICATION = Classification()
PUBLISHED: Published = {
    ("MLP", "weights"): 10.62,
    ("NP", "weights"): 69.82,
    ("HNP", "weights"): 66.02,
    ("Monomial", "weights"): 68.43,
}
NOTE = (
    "Test accuracy in percent, mean ± standard error over seeds (one seed where there is no error): the digit, from "
    "the weights of a sine network that was fitted to the image from initial weights of its own. All train on "
    "{train:,} networks, as often, with the same exact augmentation (affine maps of the coordinates). *weights*: the "
    "papers' layers, narrow, on the weights. *canonical weights*: half turns and signs of the sines taken out before. "
    "*weights and messages*: the layers read features of messages through the sines, and the head hears layers and "
    "messages; the row *head* has no layers, so that it shows what they add. The last row evaluates the image at "
    "learned points and reads no weights otherwise; it is there to compare. In brackets: published, with 45,000 "
    "networks, 64 to 256 channels and 170 times as much training (Tran et al. 2024)."
)


def classification(
    grid: Annotated[Grid, Flat],
    settings: Annotated[Classification, Flat] = CLASSIFICATION,
    *,
    zoo: Path = Path("runs/zoo/inr"),
    count: int = 10_000,
    data: Path | None = None,
) -> None:
    """Which digit is it? From the weights of sine networks (SIRENs) of images.

    Generates the zoo where it is missing (an hour on one core). Methods: MLP, NP, HNP, Monomial, MAGEP, and what reads
    the messages alone. Datasets are the inputs: weights, messages.

    Args:
        grid: what to run, and where.
        settings: of all runs.
        zoo: folder of the zoo.
        count: images of a zoo that has to be generated.
        data: folder with mnist/ in IDX format, for the generation; default: LEARNED_OPT_DATA, else digits.
    """
    at_least_one(count=count)
    networks = zoo_of(zoo, count, data)[1]
    named = {**asdict(settings), "zoo": zoo_digest(networks)}
    jobs = chosen(grid, {key: asdict(method) for key, method in CLASSIFIERS.items()}, named)
    work = partial(classify, folder=zoo, count=count, device=grid.device)
    runs = run_grid(jobs, work, grid.out / "runs.jsonl", workers=grid.workers)
    about = {"settings": asdict(settings), "methods": {" / ".join(key): asdict(m) for key, m in CLASSIFIERS.items()}}
    title = "Digits from the weights of sine networks"
    note = NOTE.format(train=len(networks.splits["train"]))
    text = write_results(
        grid.out, runs, "accuracy", title=title, note=note, published=PUBLISHED, digits=1, titles=TITLES, about=about
    )
    draw(grid.out / "picture.png", cells(runs, "accuracy"), PUBLISHED, label="test accuracy, %", titles=TITLES)
    show(text)


def chosen(grid: Grid, known: Mapping[tuple[str, str], Any], settings: Mapping[str, Any]) -> list[Job]:
    """The grid's jobs, seed by seed: a method that a dataset does not have is left out."""
    methods, datasets = grid.choose(list(dict.fromkeys(m for m, _ in known)), list(dict.fromkeys(d for _, d in known)))
    pairs = [key for key in known if key[0] in methods and key[1] in datasets]
    return [
        Job(m, d, seed, {**settings, **known[m, d]})
        for seed in range(grid.seeds)
        for m, d in pairs
        if seed < known[m, d]["seeds"]
    ]


# ------------------------------------------------------------------------------------------ editing
def dilate(x: Tensor) -> Tensor:
    """The brightest of 3 x 3 pixels (grey dilation; the border is ignored), images ``[n, 1, h, w]``."""
    return functional.max_pool2d(x, 3, 1, 1)


def contrast(x: Tensor) -> Tensor:
    """Four times the distance from mid-grey, clipped to [-1, 1].

    The papers equalise CIFAR images' histograms in tiles (CLAHE); our images are MNIST's.
    """
    return (4 * x).clamp(-1, 1)


EDITS: dict[str, Callable[[Tensor], Tensor]] = {"dilate": dilate, "contrast": contrast}
STEPS = {"side": 20, "steps": 4}
LAYERED = {"side": 20, "steps": 2, "in_channels": 2}
SLOW: dict[str, Any] = {"seeds": 1}
EDITORS = {
    ("MLP", "dilate"): Method("mlp", 1e-3, {}),
    ("NP", "dilate"): Method("np", 1e-3, {"width": 8, "depth": 2, "fourier": 3.0}, **SLOW),
    ("Monomial", "dilate"): Method("exact", 1e-3, {"width": 16, "depth": 2}, **SLOW),
    ("NP + steps", "dilate"): Method("np", 4e-3, {"width": 4}, LAYERED, **SLOW),
    ("HNP + steps", "dilate"): Method("hnp", 4e-3, {"width": 4}, LAYERED, **SLOW),
    ("Monomial + steps", "dilate"): Method("monomial", 4e-3, {"width": 4}, LAYERED, **SLOW),
    ("MAGEP + steps", "dilate"): Method("magep", 4e-3, {"width": 4}, LAYERED, **SLOW),
    ("steps", "dilate"): Method("sine", 4e-3, {}, STEPS),
    ("MLP", "contrast"): Method("mlp", 1e-3, {}, **SLOW),
    ("steps", "contrast"): Method("sine", 4e-3, {}, STEPS, **SLOW),
}


@dataclass(frozen=True)
class Editing:
    """What a run depends on besides method, edit and seed.

    Attributes:
        passes: networks seen in training, counted with repetition.
        batch: of training.
        pixels: of every image that the training loss sees, drawn anew for every minibatch.
    """

    passes: int = 15_000
    batch: int = 32
    pixels: int = 196

    def __post_init__(self) -> None:
        at_least_one(passes=self.passes, batch=self.batch, pixels=self.pixels)


def editor_layers(chain: Chain, kind: str, n: int, width: int) -> nn.Module | None:
    """Two equivariant layers from n channels to one (MAGEP: its layer between two monomial ones); None for ``sine``."""
    if kind == "sine":
        return None
    if kind in ("np", "hnp"):
        make: Any = NPLinear if kind == "np" else HNPLinear
        return nn.Sequential(make(chain, n, width), pointwise("relu", None), make(chain, width, 1))
    middle = [MAGEPLinear(chain, width, width), pointwise("tanh", "sign")] if kind == "magep" else []
    first, last = MonomialLinear(chain, n, width), MonomialLinear(chain, width, 1)
    return nn.Sequential(first, pointwise("tanh", "sign"), *middle, last)


def editor(chain: Chain, method: Method, pixels: int, size: int, seed: int) -> WeightSpaceEditor:
    """The editor of a method, with initial weights of this seed; its targets are images ``[n, 1, size, size]``."""
    points = zoos.coordinates(size)

    def loss(weights: dict[str, Tensor], wanted: Tensor) -> Tensor:
        """Mean square over pixels: all of them, or in training a few."""
        rows = torch.randperm(len(points))[:pixels] if torch.is_grad_enabled() else torch.arange(len(points))
        rendered = zoos.forward(weights, points[rows].to(wanted))
        return (rendered - wanted.flatten(2).mT[:, rows.to(wanted.device)]).square().mean()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if method.front:
            layers = editor_layers(
                chain, method.kind, method.front.get("in_channels", 1), method.options.get("width", 0)
            )
            module: nn.Module = SineEditor(chain, layers, **method.front)
        else:
            module = make_editor(chain, method.kind, method.options)
    return WeightSpaceEditor(chain, module=module, loss=loss)


def edited_images(name: str, zoo: Zoo, data: Path | None) -> tuple[Tensor, Tensor]:
    """The zoo's images ``[networks, 1, size, size]`` and what the edit makes of them.

    Raises:
        ZooError: the zoo is of other images than the data folder has.
    """
    dataset, x, _ = images(data)
    if zoo.about.get("dataset") != dataset:
        raise ZooError(
            f"the zoo is of {zoo.about.get('dataset')!r} images, but the data folder has {dataset!r}. Pass --data with "
            "the folder that the zoo was made from, or another --zoo."
        )
    x = x[torch.tensor(zoo.columns["image"])]
    return x, EDITS[name](x)


def fit_editor(job: Job, chain: Chain, zoo: Zoo, goals: Tensor, device: str = "cpu") -> WeightSpaceEditor:
    """The fitted editor of a job; goals are the edited images of all the zoo's networks."""
    settings, method = job.settings, EDITORS[job.method, job.dataset]
    fitted = editor(chain, method, settings["pixels"], goals.shape[-1], job.seed)
    train, val = ((x, goals[rows]) for x, rows in (part(zoo, s) for s in ("train", "val")))
    epochs = max(1, round(settings["passes"] / len(train[1])))
    fit = Fit(epochs=epochs, batch=settings["batch"], lr=method.lr, seed=job.seed, evaluate_every=2)
    fitted.fit(*train, validation=val, settings=fit, device=device, progress=False)
    return fitted


def edit(job: Job, folder: Path, count: int, out: Path, data: Path | None = None, device: str = "cpu") -> Measures:
    """Fit one editor; its mean square error on the test images. The first seed leaves some edited images in ``out``."""
    chain, zoo = zoo_of(folder, count)
    x, goals = edited_images(job.dataset, zoo, data)
    fitted = fit_editor(job, chain, zoo, goals, device)
    (test, rows), (val, held) = part(zoo, "test"), part(zoo, "val")
    if job.seed == 0:
        some = {n: w[:EXAMPLES] for n, w in test.items()}
        size = x.shape[-1]
        shown = {"image": x[rows[:EXAMPLES]], "network": zoos.render(some, size), "wanted": goals[rows[:EXAMPLES]]}
        shown["edited"] = zoos.render(fitted.edit_stacked(some), size)
        write_atomically(example_path(out, job), save({n: v.contiguous() for n, v in shown.items()}))
    return {
        "mse": fitted.score(test, goals[rows])["loss"],
        "val_mse": fitted.score(val, goals[held])["loss"],
        "unedited": float((zoos.render(test, x.shape[-1]) - goals[rows]).square().mean()),
        "parameters": float(sum(p.numel() for p in fitted.module.parameters())),
    }


EXAMPLES = 8


def example_path(out: Path, job: Job) -> Path:
    """Where the edited images of a job are kept for the picture: another zoo or other settings have other files."""
    name = f"{job.dataset}-{job.method.replace(' + ', '-')}-{short_hash(job.key)}"
    return out / "examples" / f"{name}.safetensors"


def draw_examples(out: Path, dataset: str, runs: Sequence[Run]) -> None:
    """Write ``{dataset}.png``: image, its network, the edited image that is wanted, and the edits of these runs."""
    rows: dict[str, Tensor] = {}
    for job in (run.job for run in runs if run.job.dataset == dataset):
        path = example_path(out, job)
        if path.is_file():
            kept = load_file(path)
            edited = kept.pop("edited")
            rows |= {**kept, job.method: edited} if not rows else {job.method: edited}
    if not rows:
        return
    figure = new_figure(EXAMPLES, 0.95 * len(rows))
    axes = figure.subplots(len(rows), EXAMPLES, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture[0], cmap="gray", vmin=-1, vmax=1)
    write_figure(figure, out / f"{dataset}.png")


EDITING = Editing()
EDIT_PUBLISHED: Published = {("MLP", "dilate"): 0.306, ("NP", "dilate"): 0.068, ("HNP", "dilate"): 0.070}
EDIT_NOTE = (
    "Mean square error between the edited network's rendering and the edited test image, values in [-1, 1], mean ± "
    "standard error over seeds (one seed where there is no error). *MLP*, *NP*, *Monomial* read and change the weights "
    "alone, as in the papers; they are narrow. *steps*: a few learned steps, each along gradients of the network's "
    "values on a grid, whose factors a small convolutional net chooses. *+ steps*: the papers' layers on two such "
    "gradients, two steps. Contrast is four times the distance from mid-grey, not the papers' CLAHE of CIFAR images. "
    "In brackets: published (Zhou et al. 2023), with 45,000 networks, 128 channels and 100 times as much training."
)


def editing(
    grid: Annotated[Grid, Flat],
    settings: Annotated[Editing, Flat] = EDITING,
    *,
    zoo: Path = Path("runs/zoo/inr"),
    count: int = 10_000,
    data: Path | None = None,
) -> None:
    """Edit images by editing the weights of their sine networks: dilate and contrast.

    Generates the zoo where it is missing (an hour on one core). Datasets are the edits.

    Args:
        grid: what to run, and where.
        settings: of all runs.
        zoo: folder of the zoo.
        count: images of a zoo that has to be generated.
        data: folder with mnist/ in IDX format; default: LEARNED_OPT_DATA, else digits.
    """
    at_least_one(count=count)
    networks = zoo_of(zoo, count, data)[1]
    edited_images(next(iter(EDITS)), networks, data)  # says early if they do not belong together
    named = {**asdict(settings), "zoo": zoo_digest(networks)}
    jobs = chosen(grid, {key: asdict(method) for key, method in EDITORS.items()}, named)
    work = partial(edit, folder=zoo, count=count, out=grid.out, data=data, device=grid.device)
    runs = run_grid(jobs, work, grid.out / "runs.jsonl", workers=grid.workers)
    about = {"settings": asdict(settings), "methods": {" / ".join(key): asdict(m) for key, m in EDITORS.items()}}
    about["unedited"] = {run.job.dataset: run.measures["unedited"] for run in runs}
    note = EDIT_NOTE + " Unedited: " + ", ".join(f"{d} {v:.3f}" for d, v in about["unedited"].items()) + "."
    text = write_results(
        grid.out, runs, "mse", title="Editing images by their weights", note=note, published=EDIT_PUBLISHED, about=about
    )
    draw(grid.out / "picture.png", cells(runs, "mse"), EDIT_PUBLISHED, label="mean square error")
    for name in dict.fromkeys(run.job.dataset for run in runs):
        draw_examples(grid.out, name, runs)
    show(text)
