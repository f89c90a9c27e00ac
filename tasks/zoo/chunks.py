"""Generation that can be interrupted: chunks written whole, in files that the next run does not make again."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.zoo.zoo import Zoo, ZooError, write_atomically


def generate(out: Path, count: int, chunk: int, settings: Mapping[str, Any], make: Callable[[range], Zoo]) -> Zoo:
    """Networks 0..count-1 as one zoo, made chunk by chunk into `out`/chunks.

    A chunk takes its name when it is whole, so what is there after Ctrl-C or a crash is finished and is not made
    again; a file that has been cut short or damaged since is said to be so, and made again. More networks than in an
    earlier run (a larger `count`) add chunks.

    Args:
        out: folder of this zoo alone.
        count: how many networks.
        chunk: how many to a file.
        settings: all that the result depends on, as plain data; kept in `out`/settings.json.
        make: range of networks -> their zoo (it may hold fewer: those that diverged are left out, or several
            checkpoints each), depending on the range and `settings` alone.

    Returns:
        All chunks joined; `about` holds `settings` and the processor time in seconds.

    Raises:
        ZooError: the folder holds a zoo with other settings, or the count is none.
    """
    if count < 1:
        raise ZooError(f"count must be 1 or more, not {count}.")
    _same_settings(out, {**settings, "chunk": chunk})
    parts = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("networks", total=count)
        for rows, path in _files(out, count, chunk):
            parts.append(_chunk(path, rows, make, progress))
            progress.advance(task, len(rows))
    seconds = sum(part.about["seconds"] for part in parts)
    return replace(Zoo.join(parts), about={**settings, "seconds": round(seconds, 1)})


def load(out: Path, count: int, chunk: int) -> Zoo | None:
    """Networks 0..count-1 where all of their chunks are there and whole, else None; other files are not looked at."""
    try:
        return Zoo.join([Zoo.load(path) for _, path in _files(out, count, chunk)])
    except (FileNotFoundError, ZooError):
        return None


def made(out: Path) -> int:
    """How many networks, from the first, the files in `out` are of."""
    return max((int(path.stem.partition("-")[2]) for path in (out / "chunks").glob("*-*.safetensors")), default=0)


def settings_of(out: Path) -> dict[str, Any]:
    """The settings that `generate` kept in `out`; none where it has not begun.

    Raises:
        ZooError: the file is damaged.
    """
    path = out / "settings.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ZooError(f"{path} is damaged ({error}). Delete the folder {path.parent}, or name another.") from error


def _files(out: Path, count: int, chunk: int) -> list[tuple[range, Path]]:
    """The networks of every chunk, and its file."""
    found = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    return [(rows, out / "chunks" / f"{rows.start:06d}-{rows.stop:06d}.safetensors") for rows in found]


def _chunk(path: Path, rows: range, make: Callable[[range], Zoo], progress: Progress) -> Zoo:
    if path.is_file():
        try:
            return Zoo.load(path)
        except ZooError as error:
            progress.console.print(f"{error}\nIt is made again.")
    began, processor = time.perf_counter(), time.process_time()
    zoo = make(rows)
    used = time.process_time() - processor
    zoo = replace(zoo, about={**zoo.about, "seconds": used})
    zoo.save(path)
    wall = time.perf_counter() - began
    progress.console.print(f"{path.stem}: {len(zoo)} rows, processor {used:.1f} s, wall {wall:.1f} s")
    return zoo


def _same_settings(out: Path, settings: Mapping[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    before = settings_of(out)
    if before:
        differing = {
            k: (before.get(k), settings.get(k)) for k in {*before, *settings} if before.get(k) != settings.get(k)
        }
        if differing:
            raise ZooError(
                f"{out} holds a zoo made with other settings (before, now): {differing}. "
                "Give the same ones to go on with it, or another --out."
            )
        return
    with write_atomically(out / "settings.json") as file:
        file.write(json.dumps(settings, indent=2).encode())
