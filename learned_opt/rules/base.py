"""What an update rule is: a pure function of weights, gradients and state, whose parameters are theta."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from learned_opt.symmetry import Symmetry

Weights = dict[str, Tensor]
State = dict[str, dict[str, Tensor]]


class UpdateRule(nn.Module, ABC):
    """``(theta, params, grads, state, symmetry) -> (updates, state)``: pure and out of place.

    The module's own parameters are theta, the meta-learned weights; their shapes never depend on the network
    that is optimised. Runs under ``torch.func.functional_call``, ``vmap`` and ``grad``.
    """

    ends = False  # whether it takes no more steps after ``total_steps``

    @abstractmethod
    def init(self, params: Weights) -> State:
        """Fresh state. Slots are float32 (float64 for float64 parameters); ``step`` is a 0-d float tensor."""

    @abstractmethod
    def forward(
        self,
        params: Weights,
        grads: Weights,
        state: State,
        symmetry: Symmetry,
        *,
        total_steps: float | Tensor | None = None,
        weight_decay: float | Mapping[str, float] = 0.0,
    ) -> tuple[Weights, State]:
        """Additive updates at unit learning rate, and the next state.

        Args:
            params: every weight of the network, also those that are not trained: they are context.
            grads: gradient per trained weight; the updates have the same names.
            state: as returned by :meth:`init` or by the previous call.
            symmetry: how the axes of ``params`` move together.
            total_steps: the horizon if it is known (sets the schedule), else None.
            weight_decay: decoupled, per step at unit learning rate; one number, or one per name.

        Returns:
            ``(updates, state)``; the new weight is ``params[n] + lr * updates[n]``.
        """
