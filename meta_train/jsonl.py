"""Files of one JSON object a line, only ever appended to, which a crash leaves readable."""

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, none if it is not there; a line that holds none, as a crash cut it off, is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [x for x in found if isinstance(x, dict)]


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
