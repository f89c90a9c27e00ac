"""Time and memory of the chain layers on the zoo CNN, on one thread.

    python experiments/12-weight-space-layer-time/run.py

Batch 32, 16 to 16 channels, single precision, median processor time of interleaved repeats. "layer": forward and
backward from given gradients of the outputs, laid out like the outputs, as in a stack of layers. "with loss": of the
sum of the outputs' mean squares, as in the published figures, taken as squares of norms: the gradient of a norm is
laid out like the outputs, that of a mean anew, which costs the layers that write in another order two copies. "kept"
is what autograd holds for the backward pass with that loss, beyond inputs and parameters.

Ratios are to an NP layer in the form in which it was published (a 1x1 convolution over entries, one over rows, one
over columns, copies to fold kernels into channels), timed in the same run. The published monomial layer has 0.60 of
its time and 0.89 of its kept memory; the bar is 0.7 of that: 0.42 and 0.62.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from learned_opt import infer_symmetry
from learned_opt.nfn import Chain, Features, HNPLinear, MAGEPLinear, MonomialLinear, MonomialSignLinear, NPLinear
from meta_train.weights.efficiency import kept_bytes, timed

BATCH, CHANNELS, REPEATS = 32, 16, 31


class UnfusedNP(nn.Module):
    """NPLinear as it was published, layer by layer; the parameters have the same number and meaning."""

    def __init__(self, chain: Chain, n: int, m: int) -> None:
        super().__init__()
        self.chain = chain
        f = [layer.filters for layer in chain.layers]
        network = n * (sum(f) + chain.depth)
        self.parts = nn.ModuleList()
        for i in range(chain.depth):
            read = n * (f[i] + (f[i - 1] + 1 if i else 0))
            written = n * (f[i] + 1 + (f[i + 1] if i < chain.depth - 1 else 0))
            parts = [nn.Conv2d(n * f[i], m * f[i], 1), nn.Linear(network, m * f[i]), nn.Conv1d(read, m * f[i], 1)]
            parts += [nn.Conv1d(written, m * f[i], 1), nn.Conv1d(written, m, 1), nn.Linear(network, m)]
            self.parts.append(nn.ModuleList(parts))

    def forward(self, features: Features) -> Features:
        """Features to features."""
        weights = [_fold(features[layer.weight]) for layer in self.chain.layers]
        biases = [features[layer.bias or ""] for layer in self.chain.layers]
        rows, cols = [w.mean(-2) for w in weights], [w.mean(-1) for w in weights]
        network = torch.cat([w.mean((-1, -2)) for w in weights] + [b.mean(-1) for b in biases], -1)
        out = {}
        for i, (layer, parts) in enumerate(zip(self.chain.layers, self.parts, strict=True)):
            own, whole, by_read, by_written, bias, bias_whole = list(parts.children())
            read = torch.cat([rows[i], *([cols[i - 1], biases[i - 1]] if i else [])], 1)
            written = torch.cat([cols[i], biases[i], *rows[i + 1 : i + 2]], 1)
            y = own(weights[i]) + whole(network)[..., None, None]
            y = y + by_read(read).unsqueeze(-2) + by_written(written).unsqueeze(-1)
            out[layer.weight] = _unfold(y, layer.kernel)
            out[layer.bias or ""] = bias(written) + bias_whole(network).unsqueeze(-1)
        return out


def _fold(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x.permute(0, 1, 4, 5, 2, 3).reshape(len(x), -1, *x.shape[2:4])


def _unfold(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    return x.unflatten(1, (-1, *kernel)).permute(0, 1, 4, 5, 2, 3).contiguous() if kernel else x


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    convolutions = [m for i in (1, 16, 16) for m in (nn.Conv2d(i, 16, 3, 2), nn.ReLU())]
    cnn = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    chain = Chain.from_symmetry(infer_symmetry(cnn, torch.randn(2, 1, 28, 28)))
    plain, signs = chain.without_kernels(), Chain(chain.layers, "sign")
    layers: dict[str, nn.Module] = {
        "NP, published form": UnfusedNP(chain, CHANNELS, CHANNELS),
        "NP": NPLinear(chain, CHANNELS, CHANNELS),
        "HNP": HNPLinear(chain, CHANNELS, CHANNELS),
        "monomial": MonomialLinear(chain, CHANNELS, CHANNELS),
        "monomial, signs": MonomialSignLinear(signs, CHANNELS, CHANNELS),
        "monomial, no kernels": MonomialLinear(plain, CHANNELS, CHANNELS),
        "MAGEP, no kernels": MAGEPLinear(plain, CHANNELS, CHANNELS),
    }
    inputs: dict[str, dict[str, Features]] = {"as layers write": {}, "contiguous": {}}
    for name, layer in layers.items():
        shapes = (plain if "no kernels" in name else chain).shapes
        features = {n: torch.randn(BATCH, CHANNELS, *s) for n, s in shapes.items()}
        inputs["contiguous"][name] = features
        with torch.no_grad():
            inputs["as layers write"][name] = layer(features)
    for layout, given in inputs.items():
        times: dict[str, list[float]] = {f"{name}/{what}": [] for name in layers for what in ("layer", "with loss")}
        for repeat in range(REPEATS + 5):
            for name, layer in layers.items():
                gradients = given_gradients(layer, given[name])
                steps: dict[str, Callable[[], None]] = {
                    "layer": lambda layer=layer, x=given[name], g=gradients: torch.autograd.backward(
                        [*layer(x).values()], g
                    ),
                    "with loss": lambda layer=layer, x=given[name]: loss(layer(x)).backward(),
                }
                for what, step in steps.items():
                    seconds = timed(step)
                    layer.zero_grad(set_to_none=True)
                    if repeat >= 5:
                        times[f"{name}/{what}"].append(seconds)
        report(layout, layers, times, {n: kept(layer, given[n]) for n, layer in layers.items()})


def loss(features: Features) -> Tensor:
    """Sum of the mean squares of all tensors."""
    return torch.stack([torch.linalg.vector_norm(x).square() / x.numel() for x in features.values()]).sum()


def kept(layer: nn.Module, features: Features) -> int:
    """Bytes that autograd keeps with the loss, beyond inputs and parameters."""
    return kept_bytes(lambda: loss(layer(features)), [*features.values(), *layer.parameters(), *layer.buffers()])


@torch.no_grad()
def given_gradients(layer: nn.Module, features: Features) -> list[Tensor]:
    """Ones in the layout of the layer's outputs."""
    return [torch.ones_like(x) for x in layer(features).values()]


def report(layout: str, layers: dict[str, nn.Module], times: dict[str, list[float]], kept: dict[str, int]) -> None:
    """One row per layer."""
    medians = {name: statistics.median(t) for name, t in times.items()}
    first = next(iter(layers))
    head = ("layer, ms", "ratio", "with loss", "ratio", "kept, MB", "ratio")
    print(f"\ninputs {layout}\n{'':22s} {'parameters':>10s}" + "".join(f"{x:>10s}" for x in head))
    for name, layer in layers.items():
        row = f"{name:22s} {sum(p.numel() for p in layer.parameters()):10d}"
        for what in ("layer", "with loss"):
            median = medians[f"{name}/{what}"]
            row += f"{1e3 * median:10.1f}{median / medians[f'{first}/{what}']:10.2f}"
        print(f"{row}{kept[name] / 1e6:10.1f}{kept[name] / kept[first]:10.2f}")


if __name__ == "__main__":
    main()
