"""What an update rule is: a pure function of weights, gradients and state, whose parameters are theta."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from learned_opt.across import HERE, Across
from learned_opt.batches import BatchLayout
from learned_opt.symmetry import Symmetry

Weights = dict[str, Tensor]
State = dict[str, dict[str, Tensor]]


class UpdateRule(nn.Module, ABC):
    """``(theta, params, grads, state, symmetry) -> (updates, state)``: pure and out of place.

    The module's own parameters are theta, the meta-learned weights; their shapes never depend on the network
    that is optimised. Runs under ``torch.func.functional_call``, ``vmap`` and ``grad``.
    """

    ends = False  # whether it takes no more steps after ``total_steps``
    sets_rate = False  # whether ``lr`` multiplies a rate of its own, so that 1 is right
    parts: Mapping[str, tuple[tuple[str, int | slice], ...]] = {}
    """The controls of a learned rule: which rows of which parameters each is read off. Where these are zero, it does
    nothing."""
    constants: Mapping[str, tuple[str, tuple[int, ...]]] = {}
    """Numbers of theta that say something by themselves, and have no effect at zero: the parameter and the place."""
    slopes: Mapping[str, tuple[str, tuple[int, ...]]] = {}
    """The same, of how controls depend on what the rule knows and measures."""
    spreads = False  # whether it takes ``across``: each process may hold some of a network's tensors

    @abstractmethod
    def init(self, params: Weights, symmetry: Symmetry) -> State:
        """Fresh state of these tensors: batches of slots."""

    def derive(self, layout: BatchLayout, state: State) -> None:  # noqa: B027
        """Set the slots of a state in batches that follow from others, after these were loaded."""

    @abstractmethod
    def forward(
        self,
        params: Weights,
        grads: Weights,
        state: State,
        symmetry: Symmetry,
        *,
        total_steps: float | Tensor | None = None,
        weight_decay: float | None | Mapping[str, float | None] = None,
        names: tuple[str, ...] | None = None,
        ages: Collection[int] | None = None,
        in_place: bool = False,
        across: Across = HERE,
    ) -> tuple[Weights, State]:
        """Additive updates at unit learning rate, and the next state.

        Args:
            params: every weight of the network, also those that are not trained: they are context.
            grads: gradient per trained weight; the updates have the same names.
            state: as returned by :meth:`init` or by the previous call.
            symmetry: how the axes of ``params`` move together.
            total_steps: the horizon if it is known (sets the schedule), else None.
            weight_decay: decoupled. An update holds ``- rate * weight_decay * w``, where the rule sets ``rate`` (about
                0.01, decaying). One number, or one per name. None: the rule's own decay.
            names: the tensors that the state is of; None: all of ``params``.
            ages: the values of the state's clocks at this step, if they are known (those of all runs of a batch): then
                nothing is computed that is not due.
            in_place: whether the state may be changed where it is.
            across: where the rest of the network is, of which ``params``, ``grads`` and ``state`` are then a part.

        Returns:
            ``(updates, state)``; the new weight is ``params[n] + lr * updates[n]``.
        """
