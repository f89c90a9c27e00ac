"""The state of a run on disk: written atomically, verified when read, the last two kept."""

import hashlib
import io
import subprocess
from pathlib import Path
from typing import Any

import torch

from learned_opt.checkpoint import CheckpointError, write_atomically

MAGIC = b"learned-opt meta-training 1\n"
KEPT = 2


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of an outer step is."""
    return folder / f"step-{step:08d}.ckpt"


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` (nested dicts and lists of tensors and plain data)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path = path_of(folder, step)
    write_atomically(path, MAGIC + hashlib.sha256(payload).digest() + payload)
    for old in list_all(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain data only, no code is run.

    Raises:
        CheckpointError: it is missing, truncated, altered, or no checkpoint of ours.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"it cannot be read ({error.strerror}).") from error
    if not content.startswith(MAGIC):
        raise CheckpointError(path, "not a checkpoint of a meta-training run.")
    start = len(MAGIC) + hashlib.sha256().digest_size
    recorded, payload = content[len(MAGIC) : start], content[start:]
    if hashlib.sha256(payload).digest() != recorded:
        raise CheckpointError(path, "its sha256 does not match: truncated or altered.")
    try:
        return torch.load(io.BytesIO(payload), weights_only=True)
    except Exception as error:  # whatever the unpickler of another torch version raises
        raise CheckpointError(path, f"torch.load failed ({error}).") from error


def load_latest(folder: Path, say: Any = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with a message for each newer one that is not.

    Returns:
        ``(path, state)``, or None if the folder has no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    paths = list_all(folder)
    for path in reversed(paths):
        try:
            return path, load(path)
        except CheckpointError as error:
            say(f"Cannot use {error} Falling back to the one before.")
    if paths:
        raise CheckpointError(folder, f"none of its {len(paths)} checkpoints is whole. Start again in another folder.")
    return None


def list_all(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def git_commit() -> str | None:
    """HEAD of the checkout that this code is in, marked if files differ; None outside of one."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + (" with changes" if dirty.returncode else "")
