"""Predicting the test accuracy of small CNNs from their weights, also after hidden units were rescaled or flipped.

The generalisation experiments of Zhou et al. 2023 (NP, HNP), Tran et al. 2024 (Monomial-NFN) and Vo et al. 2024
(MAGEP-NFN) on a Small CNN Zoo of our own. An augmented dataset holds every network and one copy of it, moved by a
random element of its symmetry group, in every split: the function is the same, the weights are not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from learned_opt import Symmetry, infer_symmetry
from learned_opt.nfn import Chain, Fit, WeightSpacePredictor
from meta_train.bench.output import show
from meta_train.errors import at_least_one
from meta_train.weights.runs import (
    Grid,
    Job,
    Measures,
    Published,
    Run,
    Store,
    cells,
    draw,
    run_grid,
    write_results,
    zoo_digest,
)
from tasks.zoo import augment, chunks
from tasks.zoo import cnn as zoos
from tasks.zoo.zoo import Zoo, ZooError

Flat = tyro.conf.arg(name="")  # the fields are options themselves
SCALES = (1, 10, 100, 1000, 10000)
# name -> activation, highest scale of the copies (None: no copies; for tanh a copy has random signs)
DATASETS: dict[str, tuple[zoos.Activation, float | None]] = {
    "relu": ("relu", None),
    **{f"relu-{high}": ("relu", float(high)) for high in SCALES},
    "tanh": ("tanh", None),
    "tanh-signs": ("tanh", 1.0),
}
TITLES = {f"relu-{high}": f"ReLU, U[1, {high}]" for high in SCALES} | {
    "relu": "ReLU, original",
    "tanh": "tanh, original",
    "tanh-signs": "tanh, signs",
}


@dataclass(frozen=True)
class Method:
    """A predictor: the layers, their size, and the learning rate (chosen on validation)."""

    kind: str
    lr: float
    options: Mapping[str, Any]


# sizes are smaller than the papers', so that a grid takes one core half an hour
# (and learning rates, and norm where it helps, were chosen on validation, on the original ReLU networks)
_MONOMIAL = {"channels": (8, 8, 5), "head_width": 200, "norm": True}
METHODS = {
    "StatNN": Method("stat", 3e-3, {"head_width": 256, "norm": True}),
    "NP": Method("np", 1e-2, {"channels": (4, 4, 4), "head_width": 200, "norm": True}),
    "HNP": Method("hnp", 1e-2, {"channels": (4, 4, 4), "head_width": 200, "norm": True}),
    "Monomial": Method("monomial", 3e-3, {**_MONOMIAL, "pool": "units"}),
    "Monomial (official pool)": Method("monomial", 3e-3, _MONOMIAL),
    "MAGEP": Method("magep", 3e-3, {"channels": (8,), "head_width": 200, "norm": True, "pool": "units"}),
    "MAGEP (official pool)": Method("magep", 1e-2, {"channels": (16, 16), "head_width": 200}),
    "MLP": Method("mlp", 1e-3, {"head_width": 200}),
}


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides method, dataset and seed.

    Attributes:
        passes: networks that are seen in training, counted with repetition.
        batch: of training.
        checkpoints: all three of a network, or the last alone (as published); a network is in one split only.
        count: networks of a zoo.
        largest: networks with larger weights are left out.
    """

    passes: int = 8_000
    batch: int = 32
    checkpoints: Literal["all", "last"] = "all"
    count: int = 1000
    largest: float = 100.0  # those that trained are below 25

    def __post_init__(self) -> None:
        at_least_one(passes=self.passes, batch=self.batch, count=self.count)


DEFAULTS = Settings()


# ------------------------------------------------------------------------------------------ data
def whole_zoo(folder: Path, activation: zoos.Activation, count: int, data: Path | None = None) -> Zoo:
    """All checkpoints of the first ``count`` networks of a zoo of CNNs; makes what is missing or damaged.

    A finished zoo is not made larger.

    Raises:
        ZooError: the folder holds a zoo of other networks, or a finished one of another number of networks.
    """
    settings, chunk = recipe(folder, activation)
    zoo = chunks.load(folder, count, chunk)
    if zoo is None:
        there = chunks.made(folder)
        if (folder / "zoo.safetensors").is_file() and there not in (0, count):
            raise ZooError(
                f"{folder} holds a finished zoo of {there} networks, not of {count}. Give --count {there}, or another "
                "folder for a zoo of another size."
            )
        if not (folder / "zoo.safetensors").is_file():
            zoos.make(settings, folder, count, data, chunk)
        zoo = zoos.every_checkpoint(settings, folder, count, data, chunk)
    found = set(zoo.columns.get("config.activation", ["no"]))
    if found != {activation}:
        raise ZooError(f"{folder} holds a zoo of {', '.join(sorted(found))} CNNs, not of {activation}. Name another.")
    return zoo


def recipe(folder: Path, activation: zoos.Activation) -> tuple[zoos.Settings, int]:
    """How the zoo in a folder was made, or is to be, and its networks to a file.

    Raises:
        ZooError: it is one of other networks.
    """
    made_with = chunks.settings_of(folder)
    if not made_with:
        return zoos.Settings(activation=activation, precision="bfloat16"), zoos.CHUNK
    found = (made_with.get("kind"), made_with.get("activation"))
    if found != ("cnn", activation):
        raise ZooError(f"{folder} holds a zoo of {found}, not of {('cnn', activation)}. Name another folder.")
    known = {f.name: made_with[f.name] for f in fields(zoos.Settings) if f.name in made_with}
    if "checkpoints" in known:
        known["checkpoints"] = tuple(known["checkpoints"])
    return zoos.Settings(**known), made_with["chunk"]


def largest(weights: Mapping[str, Tensor]) -> list[float]:
    """The largest magnitude among the weights of every network."""
    return torch.stack([x.flatten(1).abs().amax(1) for x in weights.values()]).amax(0).tolist()


def by_network(zoo: Zoo, checkpoints: str = "all", limit: float = math.inf) -> Zoo:
    """The zoo split 40 / 10 / 50 % by networks, whose order is random: the second half tests, as published.

    All checkpoints of a network are in one split. Networks that diverged (a weight above ``limit`` in any of their
    checkpoints) are left out, like those whose weights are not finite.
    """
    wild = {name for name, size in zip(zoo.columns["modeldir"], largest(zoo.weights), strict=True) if size > limit}
    count = 1 + max(int(name.rpartition("/")[2]) for name in zoo.columns["modeldir"])
    zoo = zoo.select(torch.tensor([name not in wild for name in zoo.columns["modeldir"]]))
    if checkpoints == "last":
        steps = torch.tensor(zoo.columns["step"])
        zoo = zoo.select(steps == steps.max())
    numbers = torch.tensor([int(name.rpartition("/")[2]) for name in zoo.columns["modeldir"]])
    half = (count + 1) // 2
    order = torch.randperm(half, generator=torch.Generator().manual_seed(0))
    train, val = order[: int(0.8 * half)], order[int(0.8 * half) :]
    masks = {"train": torch.isin(numbers, train), "val": torch.isin(numbers, val), "test": numbers >= half}
    return replace(zoo, splits={name: mask.nonzero().flatten() for name, mask in masks.items()})


def symmetry_of(activation: str) -> Symmetry:
    """The symmetry of one network of the zoo, as inferred."""
    return infer_symmetry(zoos.build(activation), torch.zeros(2, 1, 28, 28))


@lru_cache(maxsize=2)
def dataset_of(folder: Path, name: str, checkpoints: str, count: int, limit: float) -> tuple[Chain, Zoo]:
    """The chain, and the zoo with its splits, augmented as the dataset's name says."""
    activation, high = DATASETS[name]
    symmetry = symmetry_of(activation)
    zoo = by_network(whole_zoo(folder, activation, count), checkpoints, limit)
    if high is not None:
        zoo = augment.augment(zoo, symmetry, high=high)
    return Chain.from_symmetry(symmetry), zoo


# ------------------------------------------------------------------------------------------ runs
def run_job(job: Job, folders: Mapping[str, Path], device: str = "cpu") -> Measures:
    """Fit one method on one dataset and measure it: Kendall's tau on the test networks, and on validation."""
    method, settings = METHODS[job.method], job.settings
    activation = DATASETS[job.dataset][0]
    how = (settings[key] for key in ("checkpoints", "count", "largest"))
    chain, zoo = dataset_of(folders[activation], job.dataset, *how)
    train, val, test = (_part(zoo, split) for split in ("train", "val", "test"))
    epochs = max(1, round(settings["passes"] / len(train[1])))
    predictor = WeightSpacePredictor(chain, kind=method.kind, seed=job.seed, **method.options)
    every = max(1, epochs // 4)
    fit = Fit(epochs=epochs, batch=settings["batch"], lr=method.lr, seed=job.seed, evaluate_every=every)
    predictor.fit(*train, validation=val, settings=fit, device=device, progress=False)
    predictor.module.double()  # MAGEP's polynomials of a test network's larger weights may overflow float32
    found = predictor.score(*test)
    return {"tau": found["tau"], "val_tau": predictor.score(*val)["tau"], "r2": found["r2"], "epochs": float(epochs)}


def _part(zoo: Zoo, split: str) -> tuple[dict[str, Tensor], Tensor]:
    rows = zoo.splits[split]
    return {n: x[rows] for n, x in zoo.weights.items()}, zoo.targets[rows]


# ------------------------------------------------------------------------------------------ the command
# Published numbers, CIFAR-10-GS. Zhou et al. 2023 and Tran et al. 2024 train on the last checkpoints of 30,000 runs;
# those here are for orientation only.
_MONOMIAL_PUBLISHED = {"relu": 0.922, "relu-10": 0.920, "relu-1000": 0.920}
PUBLISHED: Published = {
    ("HNP", "relu"): 0.926,
    ("HNP", "relu-10"): 0.913,
    ("HNP", "relu-1000"): 0.891,
    **{("Monomial", dataset): tau for dataset, tau in _MONOMIAL_PUBLISHED.items()},
    **{("Monomial (official pool)", dataset): tau for dataset, tau in _MONOMIAL_PUBLISHED.items()},
}
NOTE = (
    "Kendall's tau between predicted and true test accuracies of test networks, mean ± standard error over seeds. In "
    "brackets: published, on CIFAR-10-GS with 15 times as many networks and larger models (Tran et al. 2024); their "
    "Monomial has the official pool."
)


def generalisation(
    grid: Annotated[Grid, Flat],
    settings: Annotated[Settings, Flat] = DEFAULTS,
    *,
    zoo_relu: Path = Path("runs/zoo/cnn-relu"),
    zoo_tanh: Path = Path("runs/zoo/cnn-tanh"),
    data: Path | None = None,
    report_only: bool = False,
) -> None:
    """Predict the test accuracy of small CNNs from their weights, on original and on moved networks.

    Generates the zoos where they are missing (an hour on one core each). Methods: StatNN, NP, HNP, Monomial and MAGEP
    (also as they were published: "Monomial (official pool)", "MAGEP (official pool)"), MLP. Datasets: relu, relu-1 ..
    relu-10000 (with copies scaled by U[1, 1] .. U[1, 10000]), tanh, tanh-signs.

    Args:
        grid: what to run, and where.
        settings: of all runs.
        zoo_relu: folder of the zoo of ReLU networks.
        zoo_tanh: folder of the zoo of tanh networks.
        data: folder with mnist/ in IDX format, for the generation; default: LEARNED_OPT_DATA, else digits.
        report_only: run nothing; write the table and the picture of the runs that are there.
    """
    methods, datasets = grid.choose(list(METHODS), list(DATASETS))
    folders = {"relu": zoo_relu, "tanh": zoo_tanh}
    jobs = [
        Job(m, d, seed, {**asdict(settings), **asdict(METHODS[m])})
        for seed in range(grid.seeds)
        for d in datasets
        for m in methods
    ]
    if report_only:
        report(grid.out, stored(Store(grid.out / "runs.jsonl").runs.values(), jobs), settings)
        return
    activations = list(dict.fromkeys(DATASETS[d][0] for d in datasets))
    for activation in activations:  # a wrong folder is named before another zoo is generated
        recipe(folders[activation], activation)
        if (folders[activation] / "zoo.safetensors").is_file():
            whole_zoo(folders[activation], activation, settings.count, data)
    digests = {a: zoo_digest(whole_zoo(folders[a], a, settings.count, data)) for a in activations}
    jobs = [replace(job, settings={**job.settings, "zoo": digests[DATASETS[job.dataset][0]]}) for job in jobs]
    work = partial(run_job, folders=folders, device=grid.device)
    report(grid.out, run_grid(jobs, work, grid.out / "runs.jsonl", workers=grid.workers), settings)


def stored(done: Iterable[Run], jobs: Sequence[Job]) -> list[Run]:
    """The finished runs of jobs that do not name their zoo, in order; where there are several zoos, of the last.

    Runs from before jobs named their zoo are of one.
    """
    wanted = {job.key for job in jobs}
    found: dict[str, dict[str, dict[str, Run]]] = {"relu": {}, "tanh": {}}  # activation -> zoo -> key -> run
    for run in done:
        settings = dict(run.job.settings)
        zoo = settings.pop("zoo", "without a name")
        key = replace(run.job, settings=settings).key
        if key in wanted:
            zoos_ = found[DATASETS[run.job.dataset][0]]
            zoos_[zoo] = {**zoos_.pop(zoo, {}), key: run}
    runs: dict[str, Run] = {}
    for activation, by_zoo in found.items():
        if len(by_zoo) > 1:
            print(f"there are runs of {len(by_zoo)} {activation} zoos, {', '.join(by_zoo)}; the table is of the last.")
        runs |= list(by_zoo.values())[-1] if by_zoo else {}
    return [runs[job.key] for job in jobs if job.key in runs]


def report(out: Path, runs: Sequence[Run], settings: Settings) -> None:
    """Write table.md, table.json, relu.png and tanh.png."""
    about = {"settings": asdict(settings), "methods": {name: asdict(m) for name, m in METHODS.items()}}
    title = "Generalisation of small CNNs"
    text = write_results(out, runs, "tau", title=title, note=NOTE, published=PUBLISHED, titles=TITLES, about=about)
    found = cells(runs, "tau")
    for activation in ("relu", "tanh"):
        part = {key: cell for key, cell in found.items() if DATASETS[key[1]][0] == activation}
        if part:
            path, lines = out / f"{activation}.png", activation == "relu"
            draw(path, part, PUBLISHED, label="Kendall's tau", lines=lines, titles=TITLES)
    show(text)
