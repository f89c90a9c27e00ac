"""Random small networks of supported operators, for the property that what is inferred is true."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def heads(h: Tensor) -> Tensor:
    """``[B, 12] -> [B, 4, 3]``."""
    return h.view(-1, 4, 3)


def headwise(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of heads as one of units."""
    return lambda h: function(heads(h)).flatten(1)


def headwise_of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of two sets of heads as one of units."""
    return lambda a, b: function(heads(a), heads(b)).flatten(1)


def _half_in_place(h: Tensor) -> Tensor:
    h[:, :6].relu_()
    return h


def _two(h: Tensor) -> tuple[Tensor, ...]:
    return h.view(-1, 2, 6).unbind(1)


def _attention_by_einsum(h: Tensor) -> Tensor:
    p = torch.einsum("bhd,bgd->bhg", heads(h), heads(h).tanh()).softmax(-1)
    return torch.einsum("bhg,bgd->bhd", p, heads(h)).flatten(1)


def _grouped_queries(h: Tensor) -> Tensor:
    q = h.view(-1, 4, 1, 3)
    return F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:].tanh(), enable_gqa=True).flatten(1)


PLACES = torch.tensor([2, 0, 2])  # of 3 rows
UNITS = torch.tensor([3, 3, 1, 0, 2, 11, 5, 6, 7, 8, 9, 10])


def _written(h: Tensor, dim: int) -> Tensor:
    """A part of a tensor of zeros is written."""
    y = torch.zeros_like(h)
    y.narrow(dim, 1, 2).copy_(h.narrow(dim, 0, 2).relu())
    return y + h


def _cdist(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(heads(a), heads(b)).repeat(1, 1, 3)[:, :, :3].flatten(1)


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky": F.leaky_relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "square": torch.square,
    "cube": lambda h: h**3,
    "root": lambda h: h.abs().sqrt(),
    "abs": torch.abs,
    "sign": lambda h: h * h.sign(),
    "gate by own sign": lambda h: h * (h > 0),
    "gate by own size": lambda h: h * (h > 0.3),
    "over own size": lambda h: h / (1 + h.abs()),
    "softplus": F.softplus,
    "clamp": lambda h: torch.clamp(h, min=-1.0),
    "hardtanh": F.hardtanh,
    "threshold": lambda h: F.threshold(h, 0.0, 0.5),
    "masked fill": lambda h: h.masked_fill(h < 0, 0.0),
    "where numbers": lambda h: h * torch.where(h > 0, 1.0, 0.3),
    "relu_": lambda h: h.clone().relu_(),
    "relu_ half": lambda h: _half_in_place(h.clone()),
    "twice minus one": lambda h: 2 * h - 1,
    "rsub": lambda h: torch.rsub(h, 0),
    "lerp": lambda h: torch.lerp(h, h.relu(), 0.3),
    "addcmul": lambda h: torch.addcmul(h, h.tanh(), h.relu()),
    "drawn": lambda h: h + h.relu() * h.new_empty(3, 1).bernoulli_(0.5),
    "dropout": lambda h: F.dropout(h, 0.3),
    "softmax": lambda h: h.softmax(-1),
    "log softmax": lambda h: h.log_softmax(-1),
    "head softmax": headwise(lambda h: h.softmax(1)),
    "zeros added": lambda h: h + torch.zeros(12),
    "zeros broadcast": lambda h: torch.zeros(3, 12) + h.mean(-1, keepdim=True),
    "zeros beside": lambda h: torch.cat([h[:, :6], h.new_zeros(3, 6)], -1),
    "ones beside": lambda h: torch.cat([h[:, :6], h.new_ones(3, 6)], -1),
    "cosine of zero": lambda h: h + torch.cos(h * 0.0),
    "sinc": torch.sinc,
    "rounded": lambda h: torch.round(3 * h) + torch.trunc(h),
    "finite": lambda h: h.nan_to_num() * h.isfinite(),
    "logical": lambda h: h * torch.logical_and(h > 0, h.abs() < 1),
    "floor division": lambda h: torch.div(h, 0.3, rounding_mode="floor"),
    "remainder": lambda h: torch.remainder(h, 0.7),
    "powers": lambda h: h.abs() ** torch.arange(1, 4.0).repeat(4),
    "powers of itself": lambda h: (1 + h.abs()) ** h,
    "filled": lambda h: h + torch.empty_like(h).fill_(0.5) * h.relu(),
    "hypot": lambda h: torch.hypot(h, h.relu()),
    "angle": lambda h: torch.atan2(h, h.abs() + 1),
    "tables": lambda h: h * torch.arange(4.0).repeat_interleave(3),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda h: F.layer_norm(h, (12,)),
    "head layer norm": headwise(lambda h: F.layer_norm(h, (3,))),
    "norm over all": headwise(lambda h: F.layer_norm(h, (4, 3))),
    "rms norm": lambda h: F.rms_norm(h, (12,)),
    "head rms norm": headwise(lambda h: F.rms_norm(h, (3,))),
    "group norm": lambda h: F.group_norm(h, 4),
    "instance norm": headwise(F.instance_norm),
    "batch norm": headwise(lambda h: F.batch_norm(h, None, None, training=True)),
    "swapped batch norm": headwise(lambda h: F.batch_norm(h.mT, None, None, training=True).mT),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "normalize heads": headwise(lambda h: F.normalize(h, dim=1)),
    "times norm": headwise(lambda h: h * h.norm(dim=-1, keepdim=True)),
    "minus mean": lambda h: h - h.mean(-1, keepdim=True),
    "minus mean over batch": lambda h: h - h.mean(0),
    "minus max": headwise(lambda h: h - h.amax(1, keepdim=True)),
    "times max of all": lambda h: h * h.max(),
    "max with index": headwise(lambda h: h * h.max(-1, keepdim=True)[0]),
    "place of max": headwise(lambda h: h * h.max(-1, keepdim=True)[1]),
    "place of max over heads": headwise(lambda h: h - h.max(1, keepdim=True)[1]),
    "place of pooled max": headwise(lambda h: h * F.adaptive_max_pool1d(h, 1, return_indices=True)[1]),
    "gate by sum": lambda h: h * heads(h).sum(-1).repeat_interleave(3, -1),
    "times sum of all": lambda h: h * h.sum(),
    "log of sum": headwise(lambda h: h - h.logsumexp(-1, keepdim=True)),
    "over std": lambda h: h / h.std(0),
    "times std": lambda h: h * h.std(-1, keepdim=True),
    "over variance of heads": headwise(lambda h: h / (0.1 + h.var(1, keepdim=True))),
    "cumsum": lambda h: h.cumsum(-1),
    "cumsum batch": lambda h: h.cumsum(0),
    "logcumsumexp": lambda h: h.logcumsumexp(0),
    "average pool": headwise(lambda h: F.avg_pool1d(h, 3, 1, 1)),
    "max pool": headwise(lambda h: F.max_pool1d(h, 3, 1, 1)),
    "pool over units": lambda h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "adaptive pool": headwise(lambda h: h - F.adaptive_avg_pool1d(h, 1)),
    "adaptive max pool": headwise(lambda h: h - F.adaptive_max_pool1d(h, 1)),
    "any": headwise(lambda h: h * (h > 0).any(-1, keepdim=True)),
    "count": headwise(lambda h: h * (h > 0).sum(1, keepdim=True)),
    "argmax": headwise(lambda h: h * h.argmax(-1, keepdim=True)),
    "argmax over heads": headwise(lambda h: h * h.argmax(1, keepdim=True)),
    "product": headwise(lambda h: h + h.prod(-1, keepdim=True)),
    "median": headwise(lambda h: h - h.median(1, keepdim=True)[0]),
    "var and mean": lambda h: torch.var_mean(h, 0)[1] + h * torch.var_mean(h, 0)[0],
    "extremes": headwise(lambda h: h - h.aminmax(dim=-1, keepdim=True)[0]),
    "largest two": headwise(lambda h: h * h.topk(2, 1)[0].sum(1, keepdim=True)),
    "largest two units": headwise(lambda h: h * h.topk(2, -1)[0].sum(-1, keepdim=True)),
    "gate by rank": lambda h: h * h.argsort(0),
    "linalg norm": headwise(lambda h: h / (torch.linalg.norm(h, dim=(1, 2), keepdim=True) + 0.1)),
    "segments": lambda h: torch.segment_reduce(h, "mean", lengths=torch.tensor([1, 2]), axis=0)[PLACES.clamp(max=1)],
    "spectrum": lambda h: torch.fft.fft(h, dim=0).real,
    "spectrum of units": headwise(lambda h: torch.fft.ifft(torch.fft.fft(h, dim=2) * 2, dim=2).imag + h),
    "spectrum of heads": headwise(lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1), n=4, dim=1)),
    "size of spectrum": headwise(lambda h: torch.fft.rfft(h, dim=1, n=7).abs().tanh()),
    "interpolate": headwise(lambda h: F.interpolate(h, scale_factor=2)[..., :3]),
}
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose batch": lambda h: h.transpose(0, 1).transpose(0, 1),
    "glu": lambda h: torch.cat([F.glu(h), h[:, 6:]], -1),
    "swap halves": lambda h: torch.cat([h[:, 6:], h[:, :6]], -1),
    "uneven": lambda h: torch.cat([a * k for k, a in enumerate(h.split([5, 7], -1), 1)], -1),
    "one unit twice": lambda h: torch.cat([h[:, :1], h[:, :11]], -1),
    "swap heads": headwise(lambda h: h.transpose(1, 2)),
    "other heads": lambda h: h.view(-1, 2, 2, 3).permute(0, 2, 3, 1).flatten(1),
    "other view": lambda h: h.view(-1, 6, 2).softmax(1).flatten(1),
    "merge batch": lambda h: h.view(-1, 3).softmax(0).view(-1, 12),
    "merge all": lambda h: (h.flatten() / h.flatten().norm()).view(-1, 12),
    "select": lambda h: h * h[:, :1] if h.shape[0] else h,
    "select head": headwise(lambda h: h * h[:, 1:2]),
    "select unit": headwise(lambda h: h - h.select(2, 1)[..., None]),
    "expand": headwise(lambda h: h[:, :, :1].expand(-1, 4, 3)),
    "expand head": headwise(lambda h: h[:, :1].expand(-1, 4, 3)),
    "repeat": lambda h: h.view(-1, 2, 6)[:, 0].repeat(1, 2),
    "tile": lambda h: h[:, :6].tile(2),
    "tile heads": headwise(lambda h: h[:, :2].tile(1, 2, 1)),
    "repeat interleave": lambda h: h[:, :6].repeat_interleave(2, -1),
    "thirds": lambda h: torch.cat([a * k for k, a in enumerate(h.chunk(3, -1), 1)], -1),
    "unbind": lambda h: torch.cat([f(a) for f, a in zip((torch.tanh, torch.relu), _two(h), strict=True)], -1),
    "stack again": lambda h: torch.stack([a.relu() for a in heads(h).unbind(1)], 1).flatten(1),
    "stack in another place": lambda h: torch.stack(heads(h).unbind(1), 2).flatten(1),
    "roll as if flat": lambda h: h.roll(1),
    "move to the front": lambda h: torch.cat(list(h.view(-1, 4, 3).movedim(1, 0).tanh()), -1),
    "roll": lambda h: h.roll(1, -1),
    "roll heads": headwise(lambda h: h.roll(1, 1)),
    "flip": lambda h: h.flip(-1),
    "flip heads": headwise(lambda h: h.flip(1)),
    "stride": lambda h: h[:, ::2].repeat(1, 2),
    "stride heads": headwise(lambda h: torch.cat([h[:, ::2], h[:, 1::2]], 1)),
    "windows": lambda h: h.unfold(-1, 3, 3).flatten(1),
    "overlapping windows": lambda h: h.unfold(-1, 6, 6).flatten(1),
    "pad": lambda h: F.pad(h[:, :10], (1, 1)),
    "pad heads by one": headwise(lambda h: F.pad(h[:, :3], (0, 0, 0, 1), value=1.0)),
    "index": lambda h: h.mT[torch.tensor([3, 3, 1, 0, 2, 11, 5, 6, 7, 8, 9, 10])].mT,
    "later index": lambda h: h[:, torch.tensor([3, 3, 1, 0, 2, 11, 5, 6, 7, 8, 9, 10])],
    "index select": headwise(lambda h: h.index_select(1, torch.tensor([0, 0, 3, 2]))),
    "gather": lambda h: h.gather(1, torch.arange(12).flip(0).expand(3, 12)),
    "triangle": lambda h: h.view(-1, 3, 4).triu().flatten(1),
    "pixels": lambda h: F.pixel_shuffle(h.view(-1, 4, 1, 3), 2).flatten(1),
    "shuffle channels": lambda h: torch.channel_shuffle(h[:, :, None, None], 3).flatten(1),
    "sort": lambda h: h.sort(-1)[0],
    "sort rows": lambda h: h.sort(0)[0],
    "index add": lambda h: torch.zeros_like(h).index_add(0, PLACES, h),
    "index add to units": lambda h: torch.zeros_like(h).index_add(1, UNITS, h),
    "index copy": headwise(lambda h: h.index_copy(1, torch.tensor([3, 1]), h[:, :2].tanh())),
    "index maximum": lambda h: torch.zeros_like(h).index_reduce(0, PLACES, h, "amax"),
    "index product": lambda h: torch.ones_like(h).index_reduce(0, PLACES, h, "prod"),
    "index put": lambda h: h.index_put((PLACES,), h.relu(), accumulate=True),
    "index fill": headwise(lambda h: h.index_fill(1, torch.tensor([2]), 0.0)),
    "scatter add": lambda h: torch.zeros_like(h).scatter_add(0, PLACES[:, None].expand(3, 12), h),
    "scatter to units": lambda h: h.scatter(1, UNITS.expand(3, 12), h.tanh()),
    "scatter a number": lambda h: h.scatter(1, UNITS[:3].expand(3, 3), 1.5),
    "scatter mean": headwise(
        lambda h: h.scatter_reduce(1, torch.tensor([1, 1, 3, 0])[None, :, None].expand(3, 4, 3), h.relu(), "mean")
    ),
    "scatter maximum": lambda h: h.scatter_reduce(0, PLACES[:, None].expand(3, 12), h, "amax", include_self=False),
    "scatter along itself": lambda h: h.scatter_add(1, UNITS.expand(3, 12), h),
    "gather rows": lambda h: h.gather(0, PLACES[:, None].expand(3, 12)),
    "gather by rank": lambda h: h.gather(0, h.argsort(0)),
    "middle index": headwise(lambda h: h[:, torch.tensor([0, 0, 3, 2])]),
    "inner index": headwise(lambda h: h[:, :, torch.tensor([0, 0, 2])]),
    "apart indices": headwise(lambda h: h[PLACES, :, torch.tensor([0, 2, 1])][:, :, None].expand(3, 4, 3)),
    "write rows": lambda h: _written(h, 0),
    "write units": lambda h: _written(h, 1),
    "differences": headwise(lambda h: torch.cat([h[:, :1], h.diff(dim=1)], 1)),
    "running maximum": lambda h: h.cummax(0)[0],
    "as complex": headwise(
        lambda h: torch.view_as_real(torch.view_as_complex(h.mT[..., :2].contiguous())).repeat(1, 1, 2).mT
    ),
    "polar": lambda h: torch.polar(h.abs(), h).real,
}
CONTRACTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gram": headwise(lambda q: q @ q.mT @ q),
    "gram of units": headwise(lambda q: q @ (q.mT @ q)),
    "gram of the batch": lambda h: (h @ h.mT).softmax(-1) @ h,
    "attention": headwise(lambda h: F.scaled_dot_product_attention(h, h, h)),
    "causal attention": headwise(lambda h: F.scaled_dot_product_attention(h, h, h.tanh(), is_causal=True)),
    "attention over heads": lambda h: F.scaled_dot_product_attention(*(heads(h).mT.relu(),) * 3).mT.flatten(1),
    "einsum attention": _attention_by_einsum,
    "grouped queries": _grouped_queries,
    "einsum sum": lambda h: torch.einsum("bhd->bd", heads(h)).repeat(1, 4),
    "einsum transpose": lambda h: torch.einsum("bhd->bdh", heads(h)).flatten(1),
    "einsum product": lambda h: torch.einsum("bhd,bhe->bhd", heads(h), heads(h).abs()).flatten(1),
    "einsum with ellipsis": lambda h: torch.einsum("...hd,...hd->...h", heads(h), heads(h)).repeat(1, 3),
    "einsum of four": lambda h: torch.einsum("bhd,bge,bhe,bgd->bhd", *(heads(h),) * 4).flatten(1),
    "einsum to all": lambda h: h * torch.einsum("bi,ci->bc", h, h.relu()).sum(),
    "einsum of three": lambda h: torch.einsum("bhd,bge,bhe->bgd", *(heads(h),) * 3).flatten(1),
    "einsum diagonal": lambda h: torch.einsum("bii->bi", h[:, :, None] * h[:, None]),
    "outer": lambda h: (h[:, :, None] * h[:, None]).tanh().mean(1),
    "outer of two": lambda h: (h[:, :, None] + h[:, None].relu()).relu().amax(2),
    "heads with heads": headwise(lambda h: (h[:, :, None] * h[:, None]).tanh().sum(1)),
}
FUNCTIONS = ELEMENTWISE | REDUCTIONS | SHAPES | CONTRACTIONS
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "over": lambda a, b: a / (1 + b.abs()),
    "over norm": lambda a, b: a / (b.norm(dim=-1, keepdim=True) + 0.1),
    "gate": lambda a, b: a * torch.sigmoid(b),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(b > 0, a, b),
    "matmul": lambda a, b: (heads(a) @ b.view(-1, 3, 4) @ heads(a)).flatten(1),
    "heads matmul": lambda a, b: (heads(a) @ heads(b).mT @ heads(a)).flatten(1),
    "cross attention": lambda a, b: F.scaled_dot_product_attention(heads(a), heads(b), heads(b)).flatten(1),
    "halves": lambda a, b: torch.cat([a[:, :6], b[:, 6:]], -1),
    "lead": lambda a, b: a * heads(b).mean(-1).repeat_interleave(3, -1),
    "glu of both": lambda a, b: F.glu(torch.cat([a, b], -1)),
    "sum of a stack": lambda a, b: torch.stack([a, b], 1).sum(1),
    "maximum of a stack": lambda a, b: torch.stack([a, b], 1).amax(1),
    "softmax of a stack": lambda a, b: torch.stack([a, b], 0).softmax(0)[0],
    "interleaved": lambda a, b: torch.stack([a, b], -1).flatten(1)[:, :12],
    "side by side": lambda a, b: torch.cat([heads(a), heads(b)], -1)[:, :, 1:4].flatten(1),
    "one above the other": lambda a, b: torch.cat([heads(a), heads(b)], 1)[:, 2:6].flatten(1),
    "outer": lambda a, b: (a[:, :, None] * b[:, None]).relu().sum(1),
    "added to an outer product": lambda a, b: (heads(a)[:, :, None] + heads(b)[:, None]).relu().mean(2).flatten(1),
    "batch with batch": lambda a, b: (a @ b.mT) @ b,
    "distances": _cdist,
    "distances of units": lambda a, b: (
        torch.cdist(heads(a).mT, heads(b).mT, p=1.0).repeat(1, 1, 2)[:, :, :4].flatten(1)
    ),
    "logaddexp": torch.logaddexp,
    "power of the other": lambda a, b: (0.1 + a.abs()) ** b,
    "complex": lambda a, b: torch.complex(a, b).abs(),
    "scatter of both": lambda a, b: a.scatter_add(0, PLACES[:, None].expand(3, 12), b),
    "slices of both": headwise_of_two(lambda a, b: torch.slice_scatter(a, b[:, :2], 1, 1, 3)),
    "one of both": headwise_of_two(lambda a, b: torch.select_scatter(a, b[:, 0], 1, 2)),
    "picked by the other": lambda a, b: a.gather(0, b.argsort(0)),
    "addmm": lambda a, b: torch.addmm(a, a @ b.mT, b, alpha=0.5),
}


# ------------------------------------------------------------------------------------------- layers
class Applied(nn.Module):
    """A module inside of a function: ``function(module, h)``."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self.module, h)


class Held(nn.Module):
    """A constant, and a buffer that every call writes."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.register_buffer("seen", torch.rand(4).repeat_interleave(3))

    def forward(self, h: Tensor) -> Tensor:
        if self.written:
            self.seen.mul_(0.9).add_(h.mean(0))
        return h * self.seen


class LowRank(nn.Module):
    """A matrix and a product of two."""

    def __init__(self) -> None:
        super().__init__()
        shapes = (12, 12), (12, 2), (2, 12)
        self.w, self.a, self.b = (nn.Parameter(torch.randn(s)) for s in shapes)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w + self.a @ self.b)


class Tables(nn.Module):
    """Rows of a table, not all of them, and positions, some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.positions = nn.Embedding(7, 12), nn.Parameter(torch.randn(5, 12))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.rows(torch.tensor([4, 1, 4])) + self.positions[:3]


class Experts(nn.Module):
    """A matrix for each row, by the largest of four logits."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.w = nn.Linear(12, 4), nn.Parameter(torch.randn(4, 12, 12))

    def forward(self, h: Tensor) -> Tensor:
        gate, best = self.router(h).softmax(-1).max(-1)
        return torch.einsum("bi,bij->bj", h, self.w[best]) * gate[:, None]


def _tied(layer: nn.Module, h: Tensor) -> Tensor:
    return F.linear(F.linear(h, layer.weight).relu(), layer.weight.mT)


def _self_attention(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h[None], h[None], h[None], need_weights=False)[0][0]


Made = Callable[["RandomNet"], nn.Module]
LAYERS: dict[str, Made] = {
    "linear": lambda net: nn.Linear(12, 12),
    "shared": lambda net: net.shared,
    "tied": lambda net: Applied(net.shared, _tied),
    "norm": lambda net: nn.LayerNorm(12),
    "gain": lambda net: nn.BatchNorm1d(12).eval(),
    "batch norm": lambda net: nn.BatchNorm1d(12).train(),
    "rms": lambda net: nn.RMSNorm(12),
    "group norm": lambda net: nn.GroupNorm(4, 12),
    "conv": lambda net: Applied(nn.Conv1d(4, 4, 3, padding=1), lambda m, h: m(heads(h)).flatten(1)),
    "conv in groups": lambda net: Applied(nn.Conv1d(12, 12, 1, groups=4), lambda m, h: m(h[:, :, None])[..., 0]),
    "conv of few groups": lambda net: Applied(
        nn.Conv2d(4, 4, 3, padding=1, groups=2), lambda m, h: m(heads(h)[..., None]).flatten(1)
    ),
    "depthwise": lambda net: Applied(
        nn.Conv1d(4, 4, 3, padding=1, groups=4), lambda m, h: m(heads(h)).flatten(1)
    ),
    "transposed conv": lambda net: Applied(
        nn.ConvTranspose1d(4, 4, 3, padding=1), lambda m, h: m(heads(h)).flatten(1)
    ),
    "lstm": lambda net: Applied(nn.LSTM(3, 3, batch_first=True), lambda m, h: m(heads(h))[0].flatten(1)),
    "two-way gru": lambda net: Applied(
        nn.GRU(12, 6, 2, batch_first=True, bidirectional=True), lambda m, h: m(h[None])[0][0]
    ),
    "rnn": lambda net: Applied(nn.RNN(3, 3, nonlinearity="relu"), lambda m, h: m(heads(h))[0].flatten(1)),
    "last state": lambda net: Applied(
        nn.LSTM(3, 12, batch_first=True), lambda m, h: m(heads(h))[1][0][0]
    ),
    "self-attention": lambda net: Applied(nn.MultiheadAttention(12, 4, batch_first=True), _self_attention),
    "slope": lambda net: nn.PReLU(12),
    "bilinear": lambda net: Applied(nn.Bilinear(12, 4, 12), lambda m, h: m(h, h[:, 2:6])),
    "weight norm": lambda net: nn.utils.parametrizations.weight_norm(nn.Linear(12, 12)),
    "head-wise": lambda net: Applied(nn.Linear(3, 3), lambda m, h: m(heads(h)).flatten(1)),
    "across heads": lambda net: Applied(nn.Linear(4, 4), lambda m, h: m(heads(h).mT).mT.flatten(1)),
    "low rank": lambda net: LowRank(),
    "lstm cell": lambda net: Applied(nn.LSTMCell(12, 12), lambda m, h: m(h, m(h.relu()))[0]),
    "gru cell": lambda net: Applied(nn.GRUCell(12, 12), lambda m, h: m(h.relu(), m(h))),
    "gru cell of units": lambda net: Applied(nn.GRUCell(12, 12), lambda m, h: m(h, h)),
    "rnn cell": lambda net: Applied(nn.RNNCell(12, 12, nonlinearity="relu"), lambda m, h: m(h)),
    "transposed conv in groups": lambda net: Applied(
        nn.ConvTranspose1d(4, 4, 3, padding=1, groups=2), lambda m, h: m(heads(h)).flatten(1)
    ),
    "bag": lambda net: Applied(
        nn.EmbeddingBag(7, 12, mode="max"), lambda m, h: h * m(torch.tensor([[4, 1], [0, 0], [2, 4]]))
    ),
    "experts": lambda net: Experts(),
    "masked encoder": lambda net: Applied(
        nn.TransformerEncoderLayer(12, 4, 12, 0.0, batch_first=True),
        lambda m, h: m(h[None], torch.ones(3, 3).triu(1) * -1e4)[0],
    ),
    "tables": lambda net: Tables(),
    "held": lambda net: Held(False),
    "written": lambda net: Held(True),
}  # fmt: skip


class RandomNet(nn.Module):
    """Units of width 12; every step reads one or two of the values before it.

    Args:
        steps: ``(operation, first, second)``: the values read, counted back from the last. "output" makes the mean of
            what it reads an output of the network as well.
    """

    def __init__(self, steps: Sequence[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.first, self.last, self.shared = nn.Linear(4, 12), nn.Linear(12, 3), nn.Linear(12, 12)
        self.layers = nn.ModuleDict({str(i): LAYERS[s[0]](self) for i, s in enumerate(self.steps) if s[0] in LAYERS})

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """``[3, 4] -> [3, 3]``, and ``[3]`` for every further output."""
        values, outputs = [self.first(x)], []
        for i, (name, a, b) in enumerate(self.steps):
            one, other = values[-1 - a % len(values)], values[-1 - b % len(values)]
            if name == "output":
                outputs.append(one.mean(-1))
                continue
            if name in LAYERS:
                values.append(self.layers[str(i)](one))
            else:
                values.append(JOINS[name](one, other) if name in JOINS else FUNCTIONS[name](one))
        result = self.last(values[-1])
        return [result, *outputs] if outputs else result
