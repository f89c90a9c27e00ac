"""Parts of the second half of the zoo: networks on graphs, of experts, with memory, spectral ones, and others."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.symmetry.infer.architectures import Inputs, Lambda, floats, generator


class Parts(nn.Module):
    """Named modules (or shapes of parameters), and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, tuple):
                part = nn.Parameter(torch.randn(part) / math.sqrt(part[-1]))
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def of(function: Callable[..., Tensor], **parts: Callable[[], Any] | tuple[int, ...]) -> Callable[[], nn.Module]:
    """A constructor of :class:`Parts`; modules are made when it is called."""
    return lambda: Parts(function, **{n: p if isinstance(p, tuple) else p() for n, p in parts.items()})


def linear(*sizes: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*sizes, bias=bias)


def between(function: Callable[[Tensor], Tensor], read: int = 12) -> Callable[[], nn.Module]:
    """A function of 12 hidden units between two linear layers of 10 inputs and 3 outputs."""
    return lambda: nn.Sequential(nn.Linear(10, 12), Lambda(function), nn.Linear(read, 3))


# ----------------------------------------------------------------------------------------------- graphs
def edges() -> Inputs:
    """7 nodes of 5 features, and 12 edges."""
    g = generator()
    return torch.randn(7, 5, generator=g), torch.randint(7, (12,), generator=g), torch.randint(7, (12,), generator=g)


def index_add(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(h + m.b(torch.zeros_like(h).index_add(0, target, h[source])).relu())


def scatter_add(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    h = m.a(x).relu()
    spread = target[:, None].expand(-1, h.shape[1])
    return m.c(m.b(h.new_zeros(7, h.shape[1]).scatter_add_(0, spread, h[source])).tanh())


def scatter_reduced(how: str) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        h = m.a(x).relu()
        spread = target[:, None].expand_as(h[source])
        return m.c(m.b(torch.zeros_like(h).scatter_reduce(0, spread, h[source], how, include_self=False)).relu())

    return forward


def index_reduced(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(m.b(torch.zeros_like(h).index_reduce(0, target, h.index_select(0, source), "amax")).relu())


def graph_attention(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """GAT: a softmax over the edges into each node, by heads."""
    h = m.a(x).view(-1, 2, 6)
    e = F.leaky_relu((h * m.left).sum(-1)[source] + (h * m.right).sum(-1)[target]).exp()
    total = e.new_zeros(7, 2).index_add(0, target, e)
    messages = (e / total[target])[..., None] * h[source]
    return m.c(torch.zeros_like(h).index_add(0, target, messages).flatten(1).relu())


def gated_graph(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    h = m.a(x).tanh()
    for _ in range(2):
        e = m.b(h)
        h = m.cell(torch.zeros_like(e).index_add(0, target, e[source]), h)
    return m.c(h)


def message_passing(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Edges see both of their ends."""
    h = m.a(x)
    e = m.edge(torch.cat([h[source], h[target]], -1)).relu()
    return m.c(torch.cat([h, torch.zeros_like(e[:7]).index_add(0, target, e)], -1).relu())


def degree_scaled(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """GCN: degrees from the edges."""
    one = torch.ones_like(target, dtype=x.dtype)
    degree = torch.zeros(7, dtype=x.dtype).index_add(0, target, one).clamp(min=1).rsqrt()
    h = m.a(x) * degree[:, None]
    return m.c((torch.zeros_like(h).index_add(0, target, h[source]) * degree[:, None]).relu())


def segments(m: Any, x: Tensor) -> Tensor:
    lengths = torch.tensor([2, 3, 1])
    return m.c(torch.segment_reduce(m.a(x).relu(), "mean", lengths=lengths, axis=0).relu())


# ---------------------------------------------------------------------------------------------- experts
def switch(m: Any, x: Tensor) -> Tensor:
    """Each row goes to its best expert, all of which are computed."""
    h = m.a(x)
    weight, best = m.router(h).softmax(-1).max(-1)
    y = torch.einsum("nd,edf->nef", h, m.up).relu()
    y = torch.einsum("nef,efd->ned", y, m.down)
    picked = y.gather(1, best[:, None, None].expand(-1, 1, y.shape[-1]))[:, 0]
    return m.c(h + weight[:, None] * picked)


def top_two(m: Any, x: Tensor) -> Tensor:
    """Gated by what is among the two best; weights by index."""
    h = m.a(x)
    values, places = m.router(h).softmax(-1).topk(2, -1)
    up, down = m.up[places], m.down[places]
    y = torch.einsum("nd,nkdf->nkf", h, up).relu()
    return m.c(h + torch.einsum("nkf,nkfd,nk->nd", y, down, values))


def sorted_experts(m: Any, x: Tensor) -> Tensor:
    """Rows sorted by expert, products in groups, rows put back."""
    h = m.a(x)
    weight, best = m.router(h).softmax(-1).max(-1)
    order = best.argsort()
    counts = F.one_hot(best, 4).sum(0)
    y = torch.stack([F.linear(h[order], w.T) for w in m.up], 1).relu()
    y = y.gather(1, best[order][:, None, None].expand(-1, 1, y.shape[-1]))[:, 0]
    back = torch.zeros_like(y).index_copy(0, order, y)
    return m.c(m.down(back) * weight[:, None]) + 0 * counts.sum()


def dense_mixture(m: Any, x: Tensor) -> Tensor:
    gate = m.router(x).softmax(-1)
    y = torch.stack([e(x).tanh() for e in m.experts], -1)
    return m.c((y * gate[:, None]).sum(-1))


# ------------------------------------------------------------------------------------------------ cells
def unrolled(cell: Callable[..., nn.Module], steps: int = 4) -> Callable[[], nn.Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 6)
        carried = (state, state) if isinstance(m.cell, nn.LSTMCell) else state
        outputs = []
        for k in range(steps):
            carried = m.cell(x[:, k], carried)
            outputs.append(carried[0] if isinstance(carried, tuple) else carried)
        return m.c(torch.stack(outputs, 1))

    return of(forward, cell=lambda: cell(5, 6), c=linear(6, 3))


def packed(cell: Callable[..., nn.Module], sort: bool, **settings: Any) -> Callable[[], nn.Module]:
    """A recurrent layer on sequences of several lengths, and a head on all of its outputs."""

    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = m.cell(pack_padded_sequence(m.a(x).tanh(), lengths, batch_first=True, enforce_sorted=sort))
        return m.c(pad_packed_sequence(y, batch_first=True)[0])

    width = 12 if settings.get("bidirectional") else 6
    made = lambda: cell(8, 6, batch_first=True, **settings)  # noqa: E731
    return of(forward, a=linear(5, 8), cell=made, c=linear(width, 3))


def last_state(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """What a classifier of texts reads: the last state of each sequence."""
    _, (h, _) = m.cell(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return m.c(h[-1])


def with_lengths(*lengths: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(3, 6, 5, generator=generator()), torch.tensor(lengths))


def highway(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    gate = m.gate(h).sigmoid()
    return m.c(gate * m.b(h).tanh() + (1 - gate) * h)


def written_step_by_step(m: Any, x: Tensor) -> Tensor:
    """The outputs of a recurrence, written into a tensor that is there."""
    h, y = x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 4, 8)
    for k in range(4):
        h = (m.a(x[:, k]) + m.b(h)).tanh()
        y[:, k] = h
    return m.c(y)


def state_space(m: Any, x: Tensor) -> Tensor:
    """A diagonal linear recurrence, by powers."""
    decay = torch.sigmoid(m.log_decay)
    powers = decay[:, None] ** torch.arange(6.0).to(x.dtype)
    h = m.a(x)
    kernel = torch.stack([F.pad(powers.flip(-1), (0, k))[..., k : k + 6] for k in range(1)], 0)[0]
    return m.c((h * kernel.mT).cumsum(1).tanh())


# --------------------------------------------------------------------------------------------- spectral
def fnet(m: Any, x: Tensor) -> Tensor:
    """Positions mixed by a Fourier transform."""
    h = m.a(x)
    h = m.norm(h + torch.fft.fft(h, dim=1).real)
    return m.c(h + m.down(m.up(h).relu()))


def neural_operator(m: Any, x: Tensor) -> Tensor:
    """A spectral convolution of channels on the lowest modes, with weights of two real parts."""
    h = m.a(x)
    modes = torch.fft.rfft(h, dim=1)
    low = torch.einsum("bki,iok->bko", modes[:, :3], torch.view_as_complex(m.weight))
    out = torch.zeros(2, 4, 8, dtype=low.dtype)
    out[:, :3] = low
    return m.c((torch.fft.irfft(out, n=6, dim=1) + m.b(h)).relu())


def global_filter(m: Any, x: Tensor) -> Tensor:
    modes = torch.fft.rfft2(m.a(x).relu(), norm="ortho")
    y = torch.fft.irfft2(modes * torch.complex(m.real, m.imaginary), s=(8, 8), norm="ortho")
    return m.c(y.tanh().mean((2, 3)))


# -------------------------------------------------------------------------------------------- attention
def masked_encoder(m: Any, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return m.c(m.core(m.a(x), mask))


def given_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.c(m.core(m.a(x), mask))


def padded_encoder(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return m.c(m.core(m.a(x), src_key_padding_mask=padding))


def transformer(m: Any, x: Tensor, y: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=y.dtype)
    return m.c(m.core(m.a(x), m.b(y), tgt_mask=mask))


def encoder_core() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def transformer_core() -> nn.Module:
    return nn.Transformer(16, 4, 1, 1, 24, 0.0, batch_first=True)


def with_mask() -> Inputs:
    return *floats(2, 6, 5)(), torch.full((6, 6), -math.inf).triu(1)


def with_padding() -> Inputs:
    return *floats(2, 6, 5)(), torch.arange(6)[None] >= torch.tensor([[6], [4]])


def two_sequences() -> Inputs:
    return floats(2, 6, 5)() + floats(2, 4, 4)()


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("btd,bte->bde", k, v)
    total = torch.einsum("btd,bd->bt", q, k.sum(1))
    return m.c(torch.einsum("btd,bde->bte", q, state) / total[..., None])


def heads_by_einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (w(x).unflatten(-1, (2, 4)) for w in (m.q, m.k, m.v))
    p = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
    return m.c(torch.einsum("...hqk,...khd->...qhd", p, v).flatten(-2))


def relative_positions(m: Any, x: Tensor) -> Tensor:
    """A bias per head from a table of distances."""
    q, k, v = (z.transpose(1, 2) for z in m.qkv(x).unflatten(-1, (3, 4, 2)).unbind(2))
    distance = torch.arange(6)[:, None] - torch.arange(6)[None] + 5
    bias = m.table(distance).permute(2, 0, 1)
    return m.c(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(-2))


def pooled_by_attention(m: Any, x: Tensor) -> Tensor:
    p = (m.a(x).tanh() @ m.query).softmax(1)
    return m.c((p[..., None] * m.v(x)).sum(1))


def perceiver(m: Any, x: Tensor) -> Tensor:
    latent = m.latent.expand(x.shape[0], -1, -1)
    h = F.scaled_dot_product_attention(m.q(latent), m.k(x), m.v(x))
    return m.c(h.relu())


# --------------------------------------------------------------------------------------- weights of weights
class DoRA(nn.Module):
    """A frozen matrix, a low-rank update, and a size for each row."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.base, self.a, self.b = (
            nn.Linear(width, out),
            nn.Linear(width, 3, bias=False),
            nn.Linear(3, out, bias=False),
        )
        self.size = nn.Parameter(torch.rand(out) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.base.weight + 2.0 * (self.b.weight @ self.a.weight)
        norm = torch.linalg.norm(w, dim=1).detach()
        return F.linear(x, (self.size / norm)[:, None] * w, self.base.bias)


def hyper(m: Any, x: Tensor) -> Tensor:
    """A network that makes the weights of a layer from a code."""
    w = m.make(m.code.tanh()).view(8, 10)
    return m.c(F.linear(x, w).relu())


def normalised_weights(m: Any, x: Tensor) -> Tensor:
    return m.c(F.linear(x, F.normalize(m.w, dim=1)).relu())


def standardised_weights(m: Any, x: Tensor) -> Tensor:
    w = m.w - m.w.mean((1, 2, 3), keepdim=True)
    w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return m.c(F.conv2d(x, w).relu().mean((2, 3)))


def cosine_classifier(m: Any, x: Tensor) -> Tensor:
    return F.cosine_similarity(m.a(x).relu()[:, None], m.prototypes[None], dim=-1)


def distances(m: Any, x: Tensor) -> Tensor:
    return -torch.cdist(m.a(x).relu(), m.prototypes)


def radial(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.exp(-(x[:, None] - m.centres).square().sum(-1) * m.width.exp()))


def product_of_sums(m: Any, x: Tensor) -> Tensor:
    a, b, c = m.a(x), m.b(x), m.d(x)
    return m.c(torch.einsum("nh,nh,nh->nh", a, b.relu(), c))


def factorised(m: Any, x: Tensor) -> Tensor:
    """Tucker: a core between three factors."""
    return m.c(torch.einsum("ni,ia,nj,jb,abh->nh", x[:, :5], m.left, x[:, 5:], m.right, m.core).relu())


def rearranged(m: Any, x: Tensor) -> Tensor:
    """Patches as einops makes them, mixed within and across."""
    p = x.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)
    h = m.a(p).relu()
    return m.c(h.reshape(2, 4, 4, 8).permute(0, 3, 1, 2).flatten(2).mean(-1))


def vae(m: Any, x: Tensor) -> Tensor:
    mean, log_variance = m.encode(m.a(x).relu()).chunk(2, -1)
    return m.c(m.decode(mean + torch.exp(0.5 * log_variance)).relu())


def quantised(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    d = (h[:, None] - m.codes).square().sum(-1)
    best = d.argmin(-1)
    q = m.codes[best]
    return m.c((h + (q - h).detach()).tanh()) + m.table[best]


def unet(m: Any, x: Tensor) -> Tensor:
    a = m.a(x).relu()
    b = m.b(F.max_pool2d(a, 2)).relu()
    return m.c(torch.cat([a, F.interpolate(b, scale_factor=2.0)], 1)).mean((2, 3))


def film(m: Any, x: Tensor) -> Tensor:
    scale, shift = m.condition(x[:, :4]).chunk(2, -1)
    return m.c((m.a(x) * (1 + scale) + shift).relu())


def dueling(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    value, advantage = m.value(h), m.c(h)
    return value + advantage - advantage.mean(-1, keepdim=True)


def shared_trunk(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    return torch.cat([m.c(h), m.value(h), torch.log1p(F.softplus(m.value(h)))], -1)


def both_signs(h: Tensor) -> Tensor:
    return torch.cat([h.relu(), (-h).relu()], -1)


def kolmogorov_arnold(m: Any, x: Tensor) -> Tensor:
    """Sums of bumps of each input."""
    bumps = torch.exp(-(x[..., None] - torch.linspace(-1, 1, 4, dtype=x.dtype)).square())
    return m.c(torch.einsum("nik,oik->no", bumps, m.w).sin())
