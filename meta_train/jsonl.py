"""Files of one JSON object a line, only ever appended to, which a crash leaves readable."""

import gzip
import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none if there is none; a line that holds no object, as a crash cut it off, is passed over.

    A path that ends in ``.gz`` is decompressed. To any other belongs the compressed file beside it, ``<path>.gz``,
    whose lines come first.
    """
    parts = [path] if path.suffix == ".gz" else [path.with_name(path.name + ".gz"), path]
    found = []
    for line in (line for part in parts if part.is_file() for line in _text(part).splitlines()):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [x for x in found if isinstance(x, dict)]


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="replace")


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line, after the end of a line that a crash cut off; ValueError for a number that JSON has no word for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    with open(path, "a+b") as file:
        if file.tell() > 0:  # what was cut off must not swallow this line
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line + b"\n")
