"""The symmetry of a task's model, inferred once per task."""

import logging
from weakref import WeakKeyDictionary

import torch
from torch import nn

from learned_opt.symmetry import Symmetry, independent
from learned_opt.symmetry.infer import InferenceError, infer_symmetry
from tasks.task import Task

EXAMPLES = 2  # of a batch; one would leave open which axis is the batch's

logger = logging.getLogger(__name__)
_known: WeakKeyDictionary[nn.Module, Symmetry] = WeakKeyDictionary()


def symmetry_of(task: Task) -> Symmetry:
    """As :func:`inferred_symmetry`, from memory where it was asked for before."""
    if task.model not in _known:
        _known[task.model] = inferred_symmetry(task)
    return _known[task.model]


def inferred_symmetry(task: Task) -> Symmetry:
    """What :func:`learned_opt.infer_symmetry` finds for the task's model on two of its examples.

    The numeric check is left out: it costs more than the rest, and the tests make it for the models of ``tasks``.
    A model that cannot be exported gets independent axes, and the log says so.
    """
    x = task.batch(torch.Generator().manual_seed(0))[0][:EXAMPLES]
    try:
        return infer_symmetry(task.model, x, verify=False)
    except InferenceError as error:
        logger.warning("%s: every axis taken as independent, because %s", task.name, error)
        return independent(dict(task.model.named_parameters()))
