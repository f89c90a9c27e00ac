"""The paced rule: the nominal step at a rate that the first steps measure, and with a momentum that later ones do.

Where the last step still points down the gradient of the next batch, a longer step would have gained more; where it
points up, a shorter one. The slope is unbiased, as the batch is a new one (a hypergradient: Baydin et al. 2018,
arXiv:1703.04782, of the logarithm of the rate, normalised). With ``d`` the last step and ``g`` the gradient at its end,

    c_t = - sum <g_t, d_t> / sum |g_t| |d_t|                  over all matrices and vectors, in the frame
    rho <- rho + 0.3 / (1 + t / 50) (tanh(mean c / 0.03) - rho)

from ``rho = -1``, for an eighth of the run, 10 to 50 steps; the rate is multiplied by ``e^rho``. So rho is an average
of the evidence for longer steps, in [-1, 1], and begins as a warm-up. Later slopes say little about the rate: steps
then end on rising ground at any rate (measured, experiments, 20).

How steeply the ground rises tells something else: a cosine of 0 to 0.05 where the gradient is mostly noise, of 0.2 to
0.4 where it is mostly an oscillation across a valley. There a longer memory averages the oscillation out, elsewhere it
only lags (experiments, 26 and 28). So after the first 50 steps the momentum's decay rate is

    0.9 + 0.07 min(1, max(0, - mean c / 0.28)).

How long the momentum m is beside the gradients that it averages says what ends a run. With its decay rate b,

    a = (1 + b) / (1 - b) |m|^2 / mean |g|^2

is 1 where gradients are independent of each other and of the steps: steps are a random walk, which a lower rate alone
calms. It is far below 1 where every step undoes part of the last, which costs little and goes away as the rate falls,
and above where gradients agree, and the way is long. A mean of a over as many steps as the beginning has, from twice
its length on, multiplies the rate of the rest of the run by

    (1/2)^q,    q = min(1, max(0, 2 - 5 |a - 1|)).

So it is halved within 0.2 of 1, and as measured outside of 0.4 (experiments, 49): in MLPs that come to fit
every example, for which the slopes of the beginning, all of which still descend, ask too much.

The bias correction of Adam's direction stays that of 0.9: right by then, but a vector that joins later may begin with
steps of half their size.
"""

import torch
from torch import Tensor

from learned_opt.features import MOMENTUM, SQUARE
from learned_opt.rules.base import State, Weights
from learned_opt.rules.nominal import LONGEST, RATE, Nominal, View, age, beginning, decay, schedule

START = -1.0  # rho at the first step; the state holds what it has gained since
GAIN = 0.3  # of a step's evidence in rho
FADE = 50.0  # steps after which the gain is half
EVIDENCE = 0.03  # size of a cosine that counts
MEMORY = 0.8  # decay of the average of the cosines
OSCILLATION = 0.28  # a slope that rises so much asks for the longest memory
LONGER = 0.07  # of the momentum's decay rate, at most
AFTER = 1.2  # multiple of the measured rate that the rest of the run takes
CALM = 0.5  # times the rate where gradients are independent
SAME, OTHER = 0.2, 0.4  # distances of the agreement from 1 within which they are, and beyond which they are not


class Paced(Nominal):
    """The nominal rule, its rate corrected by what its own first steps say."""

    remembers = ("moved",)  # the last update
    shared = ("slope", "gained", "agreed")  # what all tensors say: means of c, rho less its start, mean of a

    def init(self, params: Weights) -> State:
        state = super().init(params)
        return {
            n: {**s, "moved": torch.zeros_like(s["m"]), **{k: torch.zeros_like(s["step"]) for k in self.shared}}
            for n, s in state.items()
        }

    def remember(self, updates: Weights, state: State) -> State:
        """The last update, zero for a tensor that sat out."""
        moved = {n: updates[n] if n in updates else torch.zeros_like(s["moved"]) for n, s in state.items()}
        return {n: {**s, "moved": moved[n]} for n, s in state.items()}

    def memory(self, state: State) -> Tensor:
        """Decay rate of the momentum at the next step (0-d)."""
        clock = age(state)
        rising = (-_of_the_oldest(state, "slope") / OSCILLATION).clamp(0.0, 1.0)
        return MOMENTUM + LONGER * rising * (clock >= LONGEST)

    def rate(
        self, views: list[View], state: State, clock: Tensor, total_steps: float | Tensor | None
    ) -> tuple[Tensor, State]:
        """What the directions are multiplied by at a step (0-d), and the next state."""
        end = beginning(total_steps)
        slope, gained, agreed = (_of_the_oldest(state, key) for key in self.shared)
        slope = torch.lerp(slope, cosine(views), 1 - MEMORY)
        mean = slope / (1 - MEMORY ** (clock - 1).clamp(min=1))  # the first cosine is of no step: zero
        gain = GAIN / (1 + clock / FADE) * ((clock > 1) & (clock <= end))
        gained = gained + gain * (torch.tanh(mean / EVIDENCE) - (START + gained))
        share = ((clock > 2 * end) & (clock <= 3 * end)) / (clock - 2 * end).clamp(min=1.0)
        agreed = torch.lerp(agreed, agreement(views, self.memory(state)), share)
        now = torch.where(clock > end, AFTER * schedule(clock, total_steps), decay(clock, total_steps))
        rate = RATE * torch.exp(START + gained) * now * torch.where(clock > 3 * end, calm(agreed), 1)
        told = dict(zip(self.shared, (slope, gained, agreed), strict=True))
        return rate, {n: s | told for n, s in state.items()}


def agreement(views: list[View], memory: float | Tensor) -> Tensor:
    """``(1 + b) / (1 - b) sum |m|^2 / sum v_hat``: 1 for independent gradients, 0 if squares leave the dtype (0-d)."""
    m = torch.cat([torch.linalg.vector_norm(v.m, dim=(-2, -1)) for v in views]).square()
    v = torch.cat([v.v.sum((-2, -1)) for v in views]) / (1 - SQUARE ** torch.cat([v.step.flatten() for v in views]))
    return ((1 + memory) / (1 - memory) * m.sum() / v.sum()).nan_to_num(0.0, posinf=0.0)


def calm(agreed: Tensor) -> Tensor:
    """What the rate is multiplied by, where gradients agree so far (0-d)."""
    return CALM ** ((OTHER - (agreed - 1).abs()) / (OTHER - SAME)).clamp(0.0, 1.0)


def cosine(views: list[View]) -> Tensor:
    """How far the last step points down the new gradient: ``- sum <g, d> / sum |g| |d|``, in [-1, 1], 0-d."""
    gs, ds = [v.g for v in views], [v.moved for v in views]
    up = torch.stack([(g * d).sum() for g, d in zip(gs, ds, strict=True)]).sum()
    sizes = [torch.cat([torch.linalg.vector_norm(x, dim=(-2, -1)) for x in of]) for of in (gs, ds)]
    most = (sizes[0] * sizes[1]).sum()
    return -up / torch.where(most > 0, most, 1)


def _of_the_oldest(state: State, key: str) -> Tensor:
    """A number that all tensors share, but those that joined later and have not yet taken it (0-d)."""
    clocks, values = (torch.stack([s[k] for s in state.values()]) for k in ("clock", key))
    return torch.where(clocks == clocks.amax(), values, -torch.inf).amax()
