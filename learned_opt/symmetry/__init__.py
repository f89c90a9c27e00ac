"""The symmetry of a network as data: labels of axes, their group, the table and the picture of both.

``infer`` finds it for any model; it needs ``torch.export`` and is not imported here.
"""

from learned_opt.symmetry.axes import Axis, Block, Leaf, Prod, Sum
from learned_opt.symmetry.group import Element, Symmetry, independent, randomised
from learned_opt.symmetry.labels import Kind, Label, Role, Scale, Shape, Spec, SymmetryError

__all__ = [
    "Axis",
    "Block",
    "Element",
    "Kind",
    "Label",
    "Leaf",
    "Prod",
    "Role",
    "Scale",
    "Shape",
    "Spec",
    "Sum",
    "Symmetry",
    "SymmetryError",
    "independent",
    "randomised",
]
