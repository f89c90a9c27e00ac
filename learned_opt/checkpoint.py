"""Learned weights on disk: one safetensors file whose header names the rule and the weights' origin."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "learned-opt theta 1"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; ``path`` and ``reason`` say which one and why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write all of ``content`` or nothing: a temporary file beside ``path``, then a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode hides the file from everyone else
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_weights(
    path: str | Path, rule_name: str, weights: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> None:
    """Write learned weights atomically as safetensors.

    Args:
        path: the file to write, ``*.safetensors``.
        rule_name: the rule's name in ``RULES``.
        weights: the rule's named parameters; all values finite.
        provenance: plain data (JSON) on how they came about.

    Raises:
        CheckpointError: a value is not finite.
    """
    tensors = {n: t.detach().cpu().contiguous() for n, t in weights.items()}
    _assert_finite(path, tensors)
    header = {
        "format": FORMAT,
        "rule": rule_name,
        "sha256": digest(tensors),
        "provenance": json.dumps(dict(provenance), sort_keys=True),
    }
    write_atomically(path, save(tensors, header))


def load_weights(path: str | Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_weights` wrote.

    Returns:
        ``(rule_name, weights, provenance)``.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, altered, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "no such file. Pass the path of a .safetensors file of learned weights.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(path, f"not a whole safetensors file ({error}).") from error
    if header.get("format") != FORMAT:
        reason = f"its format is {header.get('format')!r}, but {FORMAT!r} is needed."
        raise CheckpointError(path, reason)
    if header.get("sha256") != digest(tensors):
        raise CheckpointError(path, "the tensors do not match the recorded sha256: it was altered.")
    _assert_finite(path, tensors)
    try:
        return header["rule"], tensors, json.loads(header["provenance"])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(path, f"its header is damaged ({error}).") from error


def _assert_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise CheckpointError(path, f"non-finite values in {', '.join(bad)}.")
