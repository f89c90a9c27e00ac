"""Which symmetry the tensors of an optimizer have, and under which of its names: given, inferred or loaded."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from learned_opt.distributed import agreed
from learned_opt.params import (
    Mode,
    NamedParam,
    ParamMap,
    check_order,
    independent_map,
    infer_or_say,
    rebound,
    say_given,
    warn_of_independence,
)
from learned_opt.recorder import ForwardRecorder
from learned_opt.symmetry import Symmetry


class Binding:
    """The symmetry of an optimizer's tensors, looked for before the first step if it is not given.

    Args:
        given: a symmetry, "infer" or "independent".
        group: ranks that agree on one symmetry, see :func:`learned_opt.distributed.agreed`.
        known: what is known already; None: what is given.

    Attributes:
        given: the same.
        known: the symmetry with the names of the tensors by position; "independent"; "infer": none yet.
        recorder: what sees forward passes, while it does.
    """

    def __init__(
        self, given: Symmetry | Mode, group: "dist.ProcessGroup | None", known: ParamMap | Mode | None = None
    ) -> None:
        self.given = given
        self.known: ParamMap | Mode = known or ("independent" if isinstance(given, Symmetry) else given)
        self._group, self._agreed = group, False  # with other ranks
        self.recorder: ForwardRecorder | None = None
        self._for: Any = None  # what tells the tensors that the next one is for from others
        self._map: ParamMap | None = None
        self._names = WeakIdKeyDictionary()  # of all tensors that were ever bound

    # -- looking for it
    def watch(self, optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module] = ()) -> None:
        """See forward passes of what is trained, if the symmetry is to be inferred from them."""
        if self.known == "infer":
            self.recorder = ForwardRecorder(optimizer, modules)

    def expect(self, modules: Iterable[nn.Module]) -> None:
        """See those of these modules too."""
        if self.recorder is not None:
            self.recorder.expect(modules)

    def stop(self) -> list[Any]:
        """See no more forward passes; what was seen."""
        calls, self.recorder = self.recorder.release() if self.recorder else [], None
        return calls

    def settle(self, entries: list[NamedParam], steps: int) -> None:
        """Before a step: find the symmetry, one for all ranks that train replicas; at the first step only.

        Args:
            entries: the tensors, with gradients.
            steps: how many steps their state has seen.
        """
        if self.recorder is not None and self.known != "infer":  # loaded, for tensors without names
            check_order(self.stop(), entries, self.known)
        if self._agreed:
            return
        if self.known == "infer":
            own, reason = infer_or_say(self.stop(), entries)
        else:
            self.bound(entries)  # the names where the groups have their tensors now
            own, reason = self.known if isinstance(self.known, ParamMap) else independent_map(entries), ""
        given = isinstance(self.given, Symmetry)
        if isinstance(self.given, Symmetry):
            say_given(self.given)
        found = agreed(own, reason, entries, self._group, steps=steps, given=given)
        if self.known == "infer" or found is not own:
            self.load(found or "independent")
        if found is None and reason:
            warn_of_independence(reason)
        self._agreed = True

    # -- what it is
    def load(self, known: ParamMap | Mode) -> None:
        """Go on with this one."""
        self.known, self._for, self._names = known, None, WeakIdKeyDictionary()

    def bound(self, entries: list[NamedParam]) -> tuple[list[NamedParam], Symmetry]:
        """The tensors under the symmetry's names, and the symmetry: checked when they changed.

        Raises:
            SymmetryError: it does not describe them.
        """
        signature = tuple((e.name, e.position, id(e.param), e.param.shape) for e in entries)
        if self._map is None or self._for != signature:
            self.known = rebound(entries, self.given, self.known, self._names)
            self._map = self.known if isinstance(self.known, ParamMap) else independent_map(entries)
            self._for = signature
            self._names.update({e.param: e.name for e in self._map.rename(entries)})
        return self._map.rename(entries), self._map.symmetry

    def __reduce__(self) -> Any:
        """Copies see no forward passes, and agree with no ranks yet."""
        return Binding, (self.given, None, self.known)
