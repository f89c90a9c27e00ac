"""The command line: ``python -m meta_train {train,adapt,evaluate,report,bench,throughput,demo}``.

Heavy imports are inside the commands, so that ``--help`` is quick.
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

PROG = "python -m meta_train"
EXTRAS = ("tyro", "rich", "scipy", "sklearn", "matplotlib")  # what the extra [meta] installs
DEMO_TASKS = ("mlp-digits-relu", "cnn-digits-relu", "char")  # of VALID
DEMO_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend is one line that says how."""
    try:
        _main(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, RuntimeError) as error:
        from learned_opt.checkpoint import CheckpointError
        from meta_train.errors import UsageError
        from tasks.task import TaskError

        if not isinstance(error, (UsageError, CheckpointError, TaskError)):
            raise
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        _fail(f"{error.name} is not installed. Run: pip install 'learned-opt[meta]'")


def _main(argv: list[str]) -> None:
    import tyro

    # The options of `train` include the fields of the recipe, so the recipe's name is read first.
    if argv[:1] == ["train"] and len(argv) > 1 and not argv[1].startswith("-"):
        command = _train_with_fields(recipe_named(argv[1]))
        tyro.cli(command, prog=f"{PROG} train", args=argv[1:])
        return
    commands: dict[str, Callable[..., Any]] = {
        "train": train,
        "adapt": adapt,
        "evaluate": evaluate,
        "report": report,
        "bench": bench,
        "throughput": throughput,
        "demo": demo,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog=PROG,
        description="Meta-train a learned optimizer, and measure it against tuned baselines.",
        args=argv,
    )


def _fail(message: str) -> None:
    raise SystemExit(f"error: {message}")


# ------------------------------------------------------------------------------------ the commands


def train(recipe: str, /, out: Path | None = None, resume: Literal["auto", "never"] = "auto") -> None:
    """Meta-train by a recipe: demo, tiny, tbptt, hybrid, pes, es, general, finetune, or one of your own.

    'train RECIPE --help' also lists the recipe's fields, all options.

    Args:
        recipe: name of a recipe, or path of a .py file that defines recipe().
        out: folder for checkpoints and logs; runs/RECIPE if not given.
        resume: go on from the checkpoint in the folder if there is one, or start anew.
    """
    _train(recipe, recipe_named(recipe), out, resume)


def adapt(file: str, /, minutes: float = 20.0, workers: int = 1, out: Path | None = None, seed: int = 0) -> None:
    """Learn on your own tasks, and say whether it paid on tasks that were not learned from.

    Begins at NFNOpt's default. Writes theta.safetensors, for NFNOpt(..., rule=PATH), and verdict.json. Ctrl-C at any
    time; the same command goes on.

    Args:
        file: path of a .py file that defines families, a dict of functions that draw tasks (docs/meta_training.md).
        minutes: about how long it may take.
        workers: processes, of one thread each.
        out: folder of the run; runs/adapt-FILE if not given.
        seed: of everything.
    """
    if not Path(file).is_file():
        _fail(f"there is no file {file}.")
    out = Path("runs") / f"adapt-{Path(file).stem}" if out is None else out
    _folder(out)
    from meta_train.adapt import adapt
    from meta_train.search import Search

    try:
        adapt(Path(file), out, minutes, Search(seed=seed), workers)
    except KeyboardInterrupt:
        _fail(f"interrupted. The same command goes on with what is in {out}.")


def evaluate(
    optimizers: tuple[str, ...] = (
        "nfnopt",
        "adam",
        "adamw-cosine",
        "sgdm",
        "sgdm-cosine",
        "muon",
        "muon-cosine",
    ),
    suite: str = "VALID",
    tasks: tuple[str, ...] = (),
    seeds: int = 3,
    tuning_seeds: int = 2,
    out: Path = Path("runs/evaluation"),
    workers: int = 2,
    horizon: tuple[str, ...] = (),
    steps: int = 0,
    data: Path | None = None,
) -> None:
    """Train tasks with optimizers and compare them: runs.jsonl, report.md and pictures in --out.

    Finished runs are kept in runs.jsonl and never repeated: the same command goes on after an
    interruption, and a command with more optimizers, tasks or seeds only runs what is new. At the end all
    optimizers of a task make steps in turns, so that report.md also compares in CPU seconds.

    Args:
        optimizers: what to compare, separated by spaces or commas. nfnopt is NFNOpt, nfn:RULE NFNOpt with
            another rule, by name (whitened_polar ...) or .safetensors file; with @lr=3 at three times its rate,
            with @without-total-steps without these. LABEL=NAME sets the label in tables; NAME@all chooses
            one learning rate for all tasks instead of one per task.
        suite: VALID, STREAMING, STREAMING_LATER, SEEN, HELD_OUT, package.module:DICT or FILE.py:DICT.
        tasks: names of tasks of the suite, separated by spaces or commas; all if not given.
        seeds: runs of every optimizer on every task.
        tuning_seeds: the first so many of these choose the learning rates.
        out: folder of the results.
        workers: processes, each with one thread.
        horizon: also measure horizon speed-ups, each LABEL/OPPONENT, or OPPONENT for that of all over it (about
            3 times the runs).
        steps: steps of every run; the task's own if 0.
        data: folder of optional data (mnist/ in IDX format, ag_news/test.csv), for SEEN.
    """
    _evaluate(
        _split(optimizers),
        out,
        suite=suite,
        tasks=_split(tasks) or None,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        workers=workers,
        horizon=_split(horizon),
        steps=steps or None,
        data=None if data is None else str(data),
    )


def report(folder: Path = Path("runs/evaluation"), /) -> None:
    """Print the tables of an evaluation, finished or not, and write report.md and the pictures; of a meta-training
    draw the curve.

    Args:
        folder: the --out of an evaluation, of a training, or of both.
    """
    from meta_train.bench.output import show
    from meta_train.bench.report import report
    from meta_train.progress import draw_training

    if (folder / "log.jsonl").exists():
        drawn = draw_training(folder)
        print(f"written: {folder / 'training.png'}" if drawn else "no outer step is finished yet: nothing to draw")
        if not (folder / "runs.jsonl").exists():
            return
    show(report(folder))
    written = ("report.md", "curves.png", "speedups.png", "profile.png", "seconds.png")
    print("written: " + ", ".join(str(folder / name) for name in written if (folder / name).exists()))


def bench(
    what: Literal["step"],
    /,
    only: tuple[str, ...] = (),
    optimizers: tuple[str, ...] = ("adamw", "muon", "soap", "nfnopt"),
    steps: int = 50,
    large: bool = False,
    out: Path | None = None,
) -> None:
    """Measure what a step of an optimizer costs: time, operations, memory, beside AdamW, Muon and SOAP.

    On three networks (mlp-small, mlp, gpt), three single tensors (matrix-1024, matrix-4096, embedding) and, on
    demand, gpt-2 (124 million weights) and matrix-8192. All optimizers make their steps in turns, on one thread.

    Args:
        what: step.
        only: names of networks and tensors; all but the large ones if not given.
        optimizers: what to measure, by names as in evaluate.
        steps: how many are timed, a multiple of 50; of the large ones a fifth.
        large: also gpt-2 and matrix-8192.
        out: JSON file of all that was measured.
    """
    from meta_train.bench.step import bench_step

    bench_step(_split(only), _split(optimizers), steps, large, out)


def throughput(recipe: str, /) -> None:
    """Measure how fast this machine meta-trains a recipe.

    Args:
        recipe: name of a recipe, or path of a .py file that defines recipe().
    """
    found = recipe_named(recipe)
    from meta_train.throughput import throughput

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    print(throughput(found, families=_tables(recipe).get("families"), say=say))


def demo(out: Path = Path("runs/demo"), workers: int = 2, steps: int = 300) -> None:
    """Meta-train for a minute to show the loop, then race NFNOpt against tuned Adam.

    An MLP, a CNN and a transformer, one seed, Adam with the best of five learning rates.

    Args:
        out: folder of the results.
        workers: processes, each with one thread.
        steps: steps of every run of the race.
    """
    from meta_train.errors import at_least_one

    at_least_one(workers=workers, steps=steps)
    print("1. Meta-training a fresh optimizer for about a minute (only to show the loop).", flush=True)
    _train("demo", recipe_named("demo"), out / "train", "never")
    print("2. Training three networks with NFNOpt and with tuned Adam.", flush=True)
    _evaluate(
        ["nfnopt"],
        out,
        tasks=DEMO_TASKS,
        seeds=1,
        workers=workers,
        steps=steps,
        grids={"adam": DEMO_RATES},
    )


# ------------------------------------------------------------------------------------- their parts


def recipe_named(name: str) -> Any:
    """The recipe of that name, or the one that ``recipe()`` in a ``.py`` file returns."""
    if name.endswith(".py"):
        return _made(name)
    from meta_train.recipes import RECIPES

    if name not in RECIPES:
        _fail(
            f"unknown recipe {name!r}. Valid recipes: {', '.join(RECIPES)}, "
            "or the path of a .py file that defines recipe()."
        )
    return RECIPES[name]()


def _made(name: str) -> Any:
    from meta_train.recipes import Recipe

    recipe = _defined(name, "recipe")["recipe"]
    found = recipe() if callable(recipe) else recipe
    if found is recipe or not isinstance(found, Recipe):
        _fail(f"recipe in {name} gives {type(found).__name__}: it must be a function that returns a Recipe.")
    return found


def _tables(name: str) -> dict[str, Any]:
    """The task families and validation tasks that a ``.py`` file adds to the library's."""
    defined = _defined(name, "recipe") if name.endswith(".py") else {}
    from tasks.suites import TRAIN, VALID

    tables: dict[str, Any] = {}
    library: dict[str, dict[str, Any]] = {"families": TRAIN, "validation": VALID}
    for variable, ours in library.items():
        mine = defined.get(variable, {})
        if not (isinstance(mine, dict) and all(callable(v) for v in mine.values())):
            _fail(f"{variable} in {name} must be a dict of functions by name (see docs/meta_training.md).")
        if mine:
            tables[variable] = {**ours, **mine}
    return tables


MUST_BE = {"recipe": "a function that returns a Recipe", "families": "a dict of functions by name"}


@lru_cache
def _defined(name: str, needed: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        _fail(f"there is no file {path}.")
    defined = runpy.run_path(str(path))
    if needed not in defined:
        _fail(f"{path} defines no {needed}: it must be {MUST_BE[needed]} (docs/meta_training.md).")
    return defined


def _train_with_fields(found: Any) -> Callable:
    """``train``, whose options are also the fields of this recipe."""
    import tyro

    def command(recipe, /, out: Path | None = None, resume: Literal["auto", "never"] = "auto", fields=found) -> None:
        _train(recipe, fields, out, resume)

    command.__doc__ = train.__doc__
    command.__annotations__ |= {
        "recipe": str,
        "fields": Annotated[type(found), tyro.conf.arg(name="")],
    }
    return command


def _train(name: str, recipe: Any, out: Path | None, resume: Literal["auto", "never"]) -> None:
    from meta_train.loop import train

    out = Path("runs") / Path(name).stem if out is None else out
    _folder(out)
    train(recipe, out, resume=resume, **_tables(name))


def _evaluate(optimizers: Sequence[str], out: Path, **options: Any) -> None:
    from meta_train.bench.evaluate import evaluate

    _folder(out)
    try:
        evaluate(optimizers, out, **options)
    except KeyboardInterrupt:
        _fail(
            f"interrupted. Finished runs are in {out / 'runs.jsonl'}: the same command goes on "
            f"from there, and '{PROG} report {out}' shows what is there."
        )
    report(out)


def _folder(out: Path) -> None:
    """Fail before the work and not after it."""
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            _fail(f"--out {out}: {path} is a file. Name a folder, which need not exist yet.")


def _split(names: Sequence[str]) -> list[str]:
    return [part for name in names for part in name.split(",") if part]


if __name__ == "__main__":
    main()
