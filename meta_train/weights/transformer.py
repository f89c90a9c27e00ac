"""Predicting the test accuracy of small transformers from their weights.

The generalisation experiment of Tran et al. 2024 (Transformer-NFN) on Small Transformer Zoos of our own, MNIST and AG
News, with networks below an accuracy left out. Ours differs from the published protocol in this:

* All checkpoints of a network are rows (published: one); a network's are in one split only, and every seed has another
  split.
* Transformer-NFN (:class:`InformedTransformerNFN`) has fewer channels, reads the classifier by its symmetry, and hears
  fixed invariants (statistics, spectra, products along the network) besides those that its layers learn;
  Transformer-NFN-published is the published model (on whole zoos only).
* Boosting is scikit-learn's histogram gradient boosting (published: XGBoost and LightGBM). Both tree methods get
  flattened weights, as published, and in a second row the statistics that StatNN gets.
* Every method is fitted to the rank of an accuracy among those of the training rows, which is what tau asks for: many
  accuracies are close to chance or to the best. Statistics and invariants enter MLPs as ranks, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from learned_opt.nfn import Fit, TransformerNFN, WeightSpacePredictor, statistics
from learned_opt.nfn.fit.scores import Loss
from learned_opt.nfn.models import head
from learned_opt.nfn.transformer_invariants import transformer_invariants
from learned_opt.nfn.transformer_space import TransformerSpec, zoo_spec
from meta_train.bench.output import show
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
from tasks.zoo import transformer as zoos
from tasks.zoo.sources import ag_news_file
from tasks.zoo.zoo import Zoo, ZooError

Flat = tyro.conf.arg(name="")  # the fields are options themselves
Features = Mapping[str, Tensor]
Table = dict[str, Tensor]  # {name: [networks, *shape]}
TASKS: tuple[zoos.Task, ...] = ("mnist", "ag_news")
CUT_OFFS = (0, 20, 40, 60, 80)  # percent
# name -> task, least accuracy
DATASETS = {t if not c else f"{t}-{c}": (t, c / 100) for t in TASKS for c in CUT_OFFS}
# what a task's networks may be trained on -> its title
EXAMPLES = {"mnist": {"mnist": "MNIST", "digits": "digits"}, "ag_news": {"ag_news": "AG News"}}
LEAST_TEST_ROWS = 8  # fewer say nothing about an order


# ------------------------------------------------------------------------------------ modules
class Ranks(nn.Module):
    """Every number as its place among those of the training rows, from -1 to 1, linear between two of them.

    Heavy tails cannot matter then.
    """

    known: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("known", rows.T.sort(1).values.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, n]`` -> the same shape."""
        x, last = x.T.contiguous(), self.known.shape[1] - 1
        above = torch.searchsorted(self.known, x).clamp(1, last)
        low, high = self.known.gather(1, above - 1), self.known.gather(1, above)
        part = ((x - low) / (high - low).clamp_min(1e-30)).clamp(0, 1)
        return (2 * (above - 1 + part) / last - 1).T


class Informed(nn.Module):
    """An MLP on numbers that were computed beforehand: entry ``key`` of the features, ``[batch, 1, n]``."""

    def __init__(self, key: str, rows: Tensor, width: int, dropout: float) -> None:
        super().__init__()
        self.key, self.ranks = key, Ranks(rows)
        self.head = head(rows.shape[1], width, 1, dropout)

    def forward(self, features: Features) -> Tensor:
        """Features -> ``[batch, 1]``."""
        return self.head(self.ranks(features[self.key].squeeze(1)))


class InformedTransformerNFN(nn.Module):
    """Transformer-NFN plus an MLP on fixed invariants, both logits added; invariant to the whole group.

    The learned part begins with the logit 0, and its rate is lower: it has a thousand weights to every training row.

    Args:
        spec: of the transformers.
        rows: ``[networks, n]``: :func:`transformer_invariants` of the training networks, to rank others among.
        channels: of the equivariant layers.
        width: of the MLP on invariants.
        dropout: in it.
    """

    def __init__(
        self, spec: TransformerSpec, rows: Tensor, *, channels: Sequence[int], width: int, dropout: float
    ) -> None:
        super().__init__()
        self.spec = spec
        self.learned = TransformerNFN(spec, channels=channels, classifier="invariant", sigmoid=False)
        nn.init.zeros_(self.learned.head.weight)
        self.fixed = Informed("invariants", rows, width, dropout)

    def forward(self, features: Features) -> Tensor:
        """``{name: [batch, 1, *shape]}`` with the entry "invariants" -> logits ``[batch, 1]``."""
        return self.learned(self.spec.pack(features)) + self.fixed(features)


class PublishedTransformerNFN(nn.Module):
    """The published model on features by name."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec, self.model = spec, TransformerNFN(spec, sigmoid=False)

    def forward(self, features: Features) -> Tensor:
        """``{name: [batch, 1, *shape]}`` -> logits ``[batch, 1]``."""
        return self.model(self.spec.pack(features))


class PartsMLP(nn.Module):
    """The published MLP: encoder, classifier and embedding each flattened into two layers, and a linear readout.

    On the MNIST networks of the zoo it has the official 933,251 parameters with ``width`` 50.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], width: int = 50) -> None:
        super().__init__()
        first = [n.split(".")[0] for n in shapes]
        self.names = [[n for n, f in zip(shapes, first, strict=True) if f == part] for part in dict.fromkeys(first)]
        sizes = [sum(shapes[n].numel() for n in names) for names in self.names]
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for n in sizes
        )
        self.readout = nn.Linear(width * len(sizes), 1)

    def forward(self, features: Features) -> Tensor:
        """``{name: [batch, 1, *shape]}`` -> logits ``[batch, 1]``."""
        flat = [torch.cat([features[n].flatten(1) for n in names], 1) for names in self.names]
        return self.readout(torch.cat([f(x) for f, x in zip(self.parts, flat, strict=True)], 1))


# ------------------------------------------------------------------------------------ methods
@dataclass(frozen=True)
class Method:
    """A predictor. ``settings`` of a module go to its constructor, those of trees to scikit-learn."""

    kind: str  # informed, published, stat, mlp, forest, boosting
    inputs: str = "weights"  # what trees read: weights or statistics
    lr: float = 1e-3
    learned_lr: float = 1e-4  # of the learned part of "informed"
    weight_decay: float = 0.01
    settings: Mapping[str, Any] | None = None
    cut_offs: bool = True  # whether it is fitted with networks left out, too


METHODS = {
    "Transformer-NFN": Method(
        "informed", lr=2e-3, weight_decay=0.1, settings={"channels": (2,), "width": 128, "dropout": 0.3}
    ),
    "Transformer-NFN-published": Method("published", cut_offs=False),  # slow
    "MLP": Method("mlp"),
    "StatNN": Method("stat", settings={"width": 256, "dropout": 0.0}),
    "forest": Method("forest"),
    "forest-statistics": Method("forest", "statistics"),
    "boosting": Method("boosting", cut_offs=False),  # slow on 18,506 inputs
    "boosting-statistics": Method("boosting", "statistics"),
}


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides method, dataset and seed.

    Attributes:
        passes: rows that are seen in training, counted with repetition (not by trees).
        batch: of training.
        count: networks of a zoo that has to be generated.
    """

    passes: int = 8_000
    batch: int = 32
    count: int = 300

    def __post_init__(self) -> None:
        at_least_one(passes=self.passes, batch=self.batch, count=self.count)


DEFAULTS = Settings()


def network(method: Method, train: Table, spec: TransformerSpec, seed: int) -> nn.Module:
    """The module of a method that is no tree."""
    options = dict(method.settings or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if method.kind == "informed":
            return InformedTransformerNFN(spec, train["invariants"], **options)
        if method.kind == "published":
            return PublishedTransformerNFN(spec)
        if method.kind == "stat":
            return Informed("statistics", train["statistics"], **options)
        return PartsMLP({n: x.shape[1:] for n, x in train.items() if n not in ("statistics", "invariants")})


def optimizer(method: Method, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW at the method's rates."""
    slow = [*module.learned.parameters()] if isinstance(module, InformedTransformerNFN) else []
    others = [p for p in module.parameters() if all(p is not q for q in slow)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": slow, "lr": method.learned_lr}]
    return torch.optim.AdamW(groups[: 1 + bool(slow)], method.lr, weight_decay=method.weight_decay)


def tree(method: Method, train: Table, targets: Tensor, seed: int) -> Any:
    """A fitted forest or boosting of scikit-learn."""
    from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor

    x = rows(method, train)
    share = 1 / 3 if method.inputs == "statistics" else 0.02  # of the inputs that a split chooses from
    if method.kind == "forest":
        model = RandomForestRegressor(max_features=share, random_state=seed)
    else:
        model = HistGradientBoostingRegressor(max_features=share, random_state=seed)
    return model.fit(x, targets.numpy())


def rows(method: Method, table: Table) -> Any:
    """What trees read: ``[networks, n]``."""
    if method.inputs == "statistics":
        return table["statistics"].numpy()
    return torch.cat([x.flatten(1) for n, x in table.items() if n not in ("statistics", "invariants")], 1).numpy()


# ------------------------------------------------------------------------------------ data
def whole_zoo(folder: Path, task: zoos.Task, count: int, data: Path | None = None) -> Zoo:
    """All checkpoints of a zoo of transformers, generated where it is not there yet.

    Raises:
        ZooError: it is another zoo.
    """
    if not (folder / "zoo.safetensors").is_file():
        return zoos.make(zoos.Settings(task=task), folder, count, data)
    zoo = Zoo.load(folder / "zoo.safetensors")
    kind, dataset = zoo.about.get("kind"), zoo.about.get("dataset")
    if kind != "transformer" or dataset not in EXAMPLES[task]:
        known = " or ".join(EXAMPLES[task])
        raise ZooError(f"{folder} holds a zoo of {kind} networks on {dataset}, not of transformers on {known}.")
    return zoo


def check(folder: Path, task: zoos.Task, count: int, data: Path | None) -> None:
    """Raise what :func:`whole_zoo` would raise at once, so that no other zoo is generated before."""
    if (folder / "zoo.safetensors").is_file():
        whole_zoo(folder, task, count)
    elif task == "ag_news":
        ag_news_file(data)


@lru_cache(maxsize=2)
def prepared(folder: Path, task: zoos.Task, count: int) -> tuple[TransformerSpec, Zoo]:
    """The spec, and the zoo with two more entries of every network: its statistics and its invariants."""
    zoo = whole_zoo(folder, task, count)
    spec = zoo_spec(zoo.state_dict(0))
    features = {n: x.unsqueeze(1) for n, x in zoo.weights.items()}
    more = {
        "statistics": statistics(features).flatten(1),
        "invariants": transformer_invariants(spec, spec.pack(features)),
    }
    return spec, Zoo({**zoo.weights, **more}, zoo.targets, zoo.columns, {}, zoo.about)


def splits(zoo: Zoo, cut_off: float, seed: int) -> dict[str, tuple[Table, Tensor]]:
    """Rows of at least this accuracy by split, 70 / 15 / 15 % of the networks, with their places in 0..1 as targets.

    Raises:
        ZooError: too few rows are left to test an order.
    """
    zoo = zoos.split_by_run(zoo.select(zoo.targets >= cut_off), seed=seed)
    if min(len(index) for index in zoo.splits.values()) < LEAST_TEST_ROWS:
        sizes = {name: len(index) for name, index in zoo.splits.items()}
        raise ZooError(f"with an accuracy of {cut_off} or more there are {sizes} rows. Generate more networks.")
    ranks = Ranks(zoo.targets[zoo.splits["train"]].unsqueeze(1))
    places = ranks(zoo.targets.unsqueeze(1)).squeeze(1) / 2 + 0.5
    return {name: ({n: x[i] for n, x in zoo.weights.items()}, places[i]) for name, i in zoo.splits.items()}


# ------------------------------------------------------------------------------------ runs
def run_job(job: Job, folders: Mapping[str, Path], device: str = "cpu") -> Measures:
    """Fit one method on one dataset and measure it: Kendall's tau on test rows, and on validation."""
    method, settings = METHODS[job.method], job.settings
    task, cut_off = DATASETS[job.dataset]
    spec, zoo = prepared(folders[task], task, settings["count"])
    parts = splits(zoo, cut_off, job.seed)
    sizes = {f"{name}_rows": float(len(y)) for name, (_, y) in parts.items()}
    if method.kind in ("forest", "boosting"):
        fitted, score = tree(method, *parts["train"], job.seed), Loss.of("mse")
        predicted = {n: torch.tensor(fitted.predict(rows(method, x))) for n, (x, _) in parts.items()}
        found = {n: score.measures(predicted[n].unsqueeze(1), y.double().unsqueeze(1)) for n, (_, y) in parts.items()}
    else:
        predictor = WeightSpacePredictor(module=network(method, parts["train"][0], spec, job.seed))
        fit = Fit(
            epochs=max(1, round(settings["passes"] / len(parts["train"][1]))),
            batch=settings["batch"],
            lr=method.lr,
            weight_decay=method.weight_decay,
            seed=job.seed,
        )
        predictor.fit(
            *parts["train"],
            validation=parts["val"],
            settings=fit,
            optimizer=lambda _: optimizer(method, predictor.module),
            device=device,
            progress=False,
        )
        found = {n: predictor.score(*part) for n, part in parts.items()}
    return {"tau": found["test"]["tau"], "val_tau": found["val"]["tau"], "r2": found["test"]["r2"], **sizes}


# ------------------------------------------------------------------------------------ the command
PUBLISHED: Published = {("Transformer-NFN", "mnist"): 0.905, ("Transformer-NFN", "ag_news"): 0.910}
NOTE = (
    "Kendall's tau between predicted and true test accuracies of test networks, mean ± standard error over seeds, each "
    "with another split by networks. In brackets: published, on 100 times as many rows (Tran et al. 2024)."
)


def generalisation(
    grid: Annotated[Grid, Flat],
    settings: Annotated[Settings, Flat] = DEFAULTS,
    *,
    zoo_mnist: Path = Path("runs/zoo/transformer-mnist"),
    zoo_ag_news: Path = Path("runs/zoo/transformer-ag_news"),
    data: Path | None = None,
) -> None:
    """Predict the test accuracy of small transformers from their weights.

    Generates the zoos where they are missing (half an hour on one core each). Datasets: mnist and ag_news, and with a
    least accuracy in percent mnist-20 .. mnist-80, ag_news-20 .. ag_news-80; those with too few networks are left out.

    Args:
        grid: what to run, and where.
        settings: of all runs.
        zoo_mnist: folder of the zoo of MNIST transformers.
        zoo_ag_news: folder of the zoo of AG News transformers.
        data: folder with mnist/ in IDX format and ag_news/test.csv, for the generation; default: LEARNED_OPT_DATA.
    """
    methods, datasets = grid.choose(list(METHODS), list(DATASETS))
    folders = {"mnist": zoo_mnist, "ag_news": zoo_ag_news}
    tasks = list(dict.fromkeys(DATASETS[d][0] for d in datasets))
    for task in tasks:
        check(folders[task], task, settings.count, data)
    found = {task: whole_zoo(folders[task], task, settings.count, data) for task in tasks}
    named = {task: {"zoo": zoo_digest(zoo), "examples": zoo.about["dataset"]} for task, zoo in found.items()}
    jobs = []
    for d in datasets:
        task, cut_off = DATASETS[d]
        zoo = found[task]
        try:
            if cut_off and float(zoo.targets.min()) >= cut_off:
                raise ZooError(f"no accuracy is below {cut_off}, so it is the whole zoo.")
            for seed in range(grid.seeds):
                splits(zoo, cut_off, seed)
        except ZooError as error:
            print(f"{d} is left out: {error}")
            continue
        about = {**asdict(settings), **named[task]}
        fitted = [m for m in methods if METHODS[m].cut_offs or not cut_off]
        jobs += [Job(m, d, seed, {**about, **asdict(METHODS[m])}) for seed in range(grid.seeds) for m in fitted]
    work = partial(run_job, folders=folders, device=grid.device)
    runs = run_grid(sorted(jobs, key=_cut_off), work, grid.out / "runs.jsonl", workers=grid.workers)
    report(grid.out, sorted(runs, key=lambda run: list(DATASETS).index(run.job.dataset)), settings)


def _cut_off(job: Job) -> float:
    """Whole zoos come first."""
    return DATASETS[job.dataset][1]


def title_of(run: Run) -> str:
    """What the networks of a run were trained on, and their least accuracy."""
    task, cut_off = DATASETS[run.job.dataset]
    name = EXAMPLES[task][run.job.settings["examples"]]
    return name if not cut_off else f"{name} ≥ {cut_off:.0%}"


def report(out: Path, runs: Sequence[Run], settings: Settings) -> None:
    """Write table.md, table.json and picture.png."""
    about = {"settings": asdict(settings), "methods": {name: asdict(m) for name, m in METHODS.items()}}
    title = "Generalisation of small transformers"
    titles = {run.job.dataset: title_of(run) for run in runs}
    sizes = {title_of(run): [int(run.measures[f"{n}_rows"]) for n in ("train", "val", "test")] for run in runs}
    rows_text = ", ".join(f"{name} {a} / {b} / {c}" for name, (a, b, c) in sizes.items())
    note = f"{NOTE} Rows to train, validate and test in the last split: {rows_text}."
    text = write_results(out, runs, "tau", title=title, note=note, published=PUBLISHED, titles=titles, about=about)
    draw(out / "picture.png", cells(runs, "tau"), PUBLISHED, label="Kendall's tau", titles=titles)
    show(text)
