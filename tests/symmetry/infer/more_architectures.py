"""More of the zoo: networks on graphs, of experts, with memory, spectral ones, and operators in combination."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.symmetry.infer.architectures import Case, Inputs, Lambda, _generator, floats, tokens

_ROWS, _SEQUENCE, _IMAGES = floats(6, 10), floats(2, 6, 5), floats(2, 3, 8, 8)


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
def _edges() -> Inputs:
    """7 nodes of 5 features, and 12 edges."""
    g = _generator()
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


def _lengths(*lengths: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(3, 6, 5, generator=_generator()), torch.tensor(lengths))


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


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _core() -> nn.Module:
    return nn.Transformer(16, 4, 1, 1, 24, 0.0, batch_first=True)


def _with_mask() -> Inputs:
    return *floats(2, 6, 5)(), torch.full((6, 6), -math.inf).triu(1)


def _with_padding() -> Inputs:
    return *floats(2, 6, 5)(), torch.arange(6)[None] >= torch.tensor([[6], [4]])


def _two() -> Inputs:
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
    q, k, v = (z.transpose(1, 2) for z in m.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2))
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


def _rearranged(m: Any, x: Tensor) -> Tensor:
    """Patches as einops makes them, mixed within and across."""
    p = x.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)
    h = m.a(p).relu()
    return m.c(h.reshape(2, 4, 4, 8).permute(0, 3, 1, 2).flatten(2).mean(-1))


def _vae(m: Any, x: Tensor) -> Tensor:
    mean, log_variance = m.encode(m.a(x).relu()).chunk(2, -1)
    return m.c(m.decode(mean + torch.exp(0.5 * log_variance)).relu())


def _quantised(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    d = (h[:, None] - m.codes).square().sum(-1)
    q = m.codes[d.argmin(-1)]
    return m.c((h + (q - h).detach()).tanh())


def _unet(m: Any, x: Tensor) -> Tensor:
    a = m.a(x).relu()
    b = m.b(F.max_pool2d(a, 2)).relu()
    return m.c(torch.cat([a, F.interpolate(b, scale_factor=2.0)], 1)).mean((2, 3))


def _film(m: Any, x: Tensor) -> Tensor:
    scale, shift = m.condition(x[:, :4]).chunk(2, -1)
    return m.c((m.a(x) * (1 + scale) + shift).relu())


def _dueling(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    value, advantage = m.value(h), m.c(h)
    return value + advantage - advantage.mean(-1, keepdim=True)


def _shared_trunk(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    return torch.cat([m.c(h), m.value(h), torch.log1p(F.softplus(m.value(h)))], -1)


def _both_signs(h: Tensor) -> Tensor:
    return torch.cat([h.relu(), (-h).relu()], -1)


def _kan(m: Any, x: Tensor) -> Tensor:
    """Sums of bumps of each input."""
    bumps = torch.exp(-(x[..., None] - torch.linspace(-1, 1, 4, dtype=x.dtype)).square())
    return m.c(torch.einsum("nik,oik->no", bumps, m.w).sin())


_A, _C = linear(5, 8), linear(8, 3)
_E: Mapping[str, Any] = {
    "a": linear(10, 8), "router": linear(8, 4), "up": (4, 8, 6), "down": (4, 6, 8), "c": linear(8, 3)
}  # fmt: skip

MORE: dict[str, Case] = {
    # graphs
    "graph_index_add": Case(of(index_add, a=_A, b=linear(8, 8), c=_C), _edges),
    "graph_scatter_add": Case(of(scatter_add, a=_A, b=linear(8, 8), c=_C), _edges),
    "graph_scatter_mean": Case(of(scatter_reduced("mean"), a=_A, b=linear(8, 8), c=_C), _edges),
    "graph_scatter_max": Case(of(scatter_reduced("amax"), a=_A, b=linear(8, 8), c=_C), _edges),
    "graph_index_reduce": Case(of(index_reduced, a=_A, b=linear(8, 8), c=_C), _edges),
    "graph_attention": Case(of(graph_attention, a=linear(5, 12), left=(2, 6), right=(2, 6), c=linear(12, 3)), _edges),
    "graph_gated": Case(of(gated_graph, a=_A, b=linear(8, 7), cell=lambda: nn.GRUCell(7, 8), c=_C), _edges),
    "graph_messages": Case(of(message_passing, a=_A, edge=linear(16, 6), c=linear(14, 3)), _edges),
    "graph_degrees": Case(of(degree_scaled, a=_A, c=_C), _edges, covered=0.95),
    "segment_mean": Case(of(segments, a=linear(10, 8), c=_C), _ROWS),
    # experts
    "experts_switch": Case(of(switch, **_E), _ROWS),
    "experts_top_two": Case(of(top_two, **_E), _ROWS),
    "experts_sorted": Case(of(sorted_experts, **{**_E, "down": linear(6, 8)}), _ROWS),
    "experts_dense": Case(
        of(
            dense_mixture, router=linear(10, 3), c=_C,
            experts=lambda: nn.ModuleList(nn.Linear(10, 8) for _ in range(3)),
        ),
        _ROWS, covered=0.85),
    # memory
    "cells_lstm": Case(unrolled(nn.LSTMCell), _SEQUENCE),
    "cells_gru": Case(unrolled(nn.GRUCell), _SEQUENCE),
    "cells_rnn": Case(unrolled(nn.RNNCell), _SEQUENCE, covered=0.95),
    "cells_rnn_relu": Case(unrolled(lambda i, h: nn.RNNCell(i, h, nonlinearity="relu")), _SEQUENCE, covered=0.95),
    "packed_lstm": Case(packed(nn.LSTM, True), _lengths(6, 4, 3)),
    "packed_gru_unsorted": Case(packed(nn.GRU, False, num_layers=2), _lengths(3, 6, 4)),
    "packed_lstm_bidirectional": Case(packed(nn.LSTM, False, bidirectional=True), _lengths(3, 6, 4)),
    "packed_last_state": Case(
        of(last_state, cell=lambda: nn.LSTM(5, 6, batch_first=True), c=linear(6, 3)), _lengths(3, 6, 4)
    ),
    "highway": Case(of(highway, a=linear(10, 8), gate=linear(8, 8), b=linear(8, 8), c=_C), _ROWS),
    "written_step_by_step": Case(of(written_step_by_step, a=_A, b=linear(8, 8), c=_C), _SEQUENCE),
    "state_space": Case(of(state_space, a=_A, log_decay=(8,), c=_C), _SEQUENCE, covered=0.95),
    "lstm_two_layers_dropout": Case(
        of(
            lambda m, x: m.c(m.r(x)[0]),
            r=lambda: nn.LSTM(5, 6, 2, batch_first=True, dropout=0.2).eval(), c=linear(6, 3),
        ),
        _SEQUENCE,
    ),
    # spectra
    "fnet": Case(
        of(fnet, a=_A, norm=lambda: nn.LayerNorm(8), up=linear(8, 12), down=linear(12, 8), c=_C), _SEQUENCE
    ),
    "neural_operator": Case(
        of(neural_operator, a=_A, b=linear(8, 8), weight=(8, 8, 3, 2), c=_C), _SEQUENCE, covered=0.9
    ),
    "global_filter": Case(
        of(global_filter, a=lambda: nn.Conv2d(3, 6, 3, padding=1), real=(6, 8, 5), imaginary=(6, 8, 5), c=linear(6, 3)),
        _IMAGES,
    ),
    # attention
    "masked_encoder": Case(of(masked_encoder, a=linear(5, 16), core=_encoder, c=linear(16, 3)), _SEQUENCE),
    "encoder_with_given_mask": Case(of(given_mask, a=linear(5, 16), core=_encoder, c=linear(16, 3)), _with_mask),
    "padded_encoder": Case(of(padded_encoder, a=linear(5, 16), core=_encoder, c=linear(16, 3)), _with_padding),
    "masked_transformer": Case(
        of(transformer, a=linear(5, 16), b=linear(4, 16), core=_core, c=linear(16, 3)), _two
    ),
    "linear_attention": Case(of(linear_attention, qkv=linear(5, 24), c=_C), _SEQUENCE),
    "attention_by_ellipsis": Case(of(heads_by_einsum, q=_A, k=_A, v=_A, c=_C), _SEQUENCE),
    "relative_positions": Case(
        of(relative_positions, qkv=linear(5, 24), table=lambda: nn.Embedding(11, 2), c=_C), _SEQUENCE
    ),
    "attention_pooling": Case(of(pooled_by_attention, a=_A, query=(8,), v=_A, c=_C), _SEQUENCE),
    "perceiver": Case(of(perceiver, latent=(4, 7), q=linear(7, 8), k=_A, v=_A, c=_C), _SEQUENCE),
    # weights of weights
    "dora": Case(lambda: nn.Sequential(DoRA(10, 12), nn.ReLU(), DoRA(12, 3)), _ROWS),
    "hypernetwork": Case(of(hyper, code=(5,), make=linear(5, 80), c=_C), _ROWS),
    "normalised_weights": Case(of(normalised_weights, w=(8, 10), c=_C), _ROWS),
    "standardised_weights": Case(of(standardised_weights, w=(8, 3, 3, 3), c=_C), _IMAGES),
    "cosine_classifier": Case(of(cosine_classifier, a=linear(10, 8), prototypes=(4, 8)), _ROWS),
    "distances": Case(of(distances, a=linear(10, 8), prototypes=(4, 8)), _ROWS),
    "radial_basis": Case(of(radial, centres=(8, 10), width=(8,), c=_C), _ROWS),
    "product_of_three": Case(of(product_of_sums, a=linear(10, 8), b=linear(10, 8), d=linear(10, 8), c=_C), _ROWS),
    "tucker": Case(of(factorised, left=(5, 4), right=(5, 6), core=(4, 6, 8), c=_C), _ROWS),
    "bilinear": Case(of(lambda m, x: m.c(m.b(x[:, :4], x[:, 4:]).relu()), b=lambda: nn.Bilinear(4, 6, 8), c=_C), _ROWS),
    # others
    "patches": Case(of(_rearranged, a=linear(12, 8), c=_C), _IMAGES),
    "vae": Case(of(_vae, a=linear(10, 8), encode=linear(8, 10), decode=linear(5, 8), c=_C), _ROWS),
    "quantised": Case(of(_quantised, a=linear(10, 8), codes=(4, 8), c=_C), _ROWS),
    "unet": Case(
        of(
            _unet, a=lambda: nn.Conv2d(3, 6, 3, padding=1), b=lambda: nn.Conv2d(6, 5, 3, padding=1),
            c=lambda: nn.Conv2d(11, 3, 1),
        ),
        _IMAGES,
    ),
    "film": Case(of(_film, a=linear(10, 8), condition=linear(4, 16), c=_C), _ROWS),
    "dueling": Case(of(_dueling, a=linear(10, 8), value=linear(8, 1), c=_C), _ROWS, covered=0.95),
    "shared_trunk": Case(of(_shared_trunk, a=linear(10, 8), value=linear(8, 1), c=_C), _ROWS, covered=0.95),
    "kolmogorov_arnold": Case(of(_kan, w=(8, 10, 4), c=_C), _ROWS),
    "bags": Case(
        of(lambda m, ids: m.c(m.bag(ids).relu()), bag=lambda: nn.EmbeddingBag(11, 8), c=_C), tokens(11, 7)
    ),
    "bags_of_maxima": Case(
        of(lambda m, ids: m.c(m.bag(ids).relu()), bag=lambda: nn.EmbeddingBag(11, 8, mode="max"), c=_C), tokens(11, 7)
    ),
    "depthwise_separable": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1), nn.Hardswish()),
            *(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)),
        ),
        _IMAGES,
    ),
    "grouped_transposed": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(6 * 49, 3)),
        ),
        _IMAGES,
    ),
    "glumlp": Case(
        of(lambda m, x: m.c(F.glu(m.a(x))), a=linear(10, 16), c=_C), _ROWS
    ),
    "maxout": Case(of(lambda m, x: m.c(m.a(x).view(-1, 8, 3).amax(-1)), a=linear(10, 24), c=_C), _ROWS),
    "crelu": Case(of(lambda m, x: m.c(_both_signs(m.a(x))), a=linear(10, 8), c=linear(16, 3)), _ROWS),
    "prelu_conv": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 3)), _IMAGES
    ),
    "local_response": Case(between(lambda h: h / (1 + h.square().mean(-1, keepdim=True)).sqrt()), _ROWS),
    "softsign_arctan": Case(between(lambda h: F.softsign(h) + torch.atan(h)), _ROWS),
    "logaddexp": Case(between(lambda h: torch.logaddexp(h, -h)), _ROWS),
    "hypot": Case(between(lambda h: torch.hypot(h, h.relu())), _ROWS),
    "var_mean": Case(between(lambda h: (h - torch.var_mean(h, 0)[1]) / (torch.var_mean(h, 0)[0] + 1)), _ROWS),
    "lp_pool": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LPPool2d(2, 2), nn.Flatten(), nn.Linear(72, 3)), _IMAGES
    ),
    "masked_mean": Case(
        of(
            lambda m, x, mask: m.c((m.a(x).relu() * ~mask[..., None]).sum(1) / (~mask).sum(1, keepdim=True)),
            a=_A, c=_C,
        ),
        _with_padding, covered=0.95),
    "nearest_centre": Case(of(lambda m, x: m.c(m.a(x).relu().sort(0)[0]), a=linear(10, 8), c=_C), _ROWS),
    "top_of_positions": Case(
        of(lambda m, x: m.c(m.a(x).relu().topk(2, 1)[0].mean(1)), a=_A, c=_C), _SEQUENCE, covered=0.95
    ),
}  # fmt: skip
