"""Where the tensors of a network are: all in this process, or spread over several."""

from torch import Tensor


class Across:
    """What a rule asks of the whole network, whose tensors several processes may hold, each some of them.

    In a call of the rule, all of them ask the same in the same order. This one is for a process that holds all.
    """

    def names(self, own: tuple[str, ...]) -> tuple[str, ...]:
        """The tensors of all processes, in one order; ``own``: those of this one."""
        return own

    def ages(self, own: set[int]) -> set[int]:
        """The values of the clocks of all tensors that move; ``own``: of those of this process."""
        return own

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, the same to the bit on all."""
        return x

    def most(self, x: Tensor) -> Tensor:
        """The maximum over the processes."""
        return x


HERE = Across()
