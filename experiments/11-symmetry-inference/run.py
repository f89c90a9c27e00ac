"""Time of inference beside that of ``torch.export``, and of the check.

    python experiments/11-symmetry-inference/run.py

Processor time of one thread, which other jobs on the machine disturb less than the clock on the wall. Every model is
exported once before it is timed (a process's first export imports a lot). Names of models as arguments: only those.
"""

import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from learned_opt import infer_symmetry
from tasks.transformer import Transformer


def gpt(depth: int) -> nn.Module:
    """A character transformer of the given depth, 256 wide."""
    return Transformer(
        nn.Embedding(64, 256), 32, 64, width=256, heads=8, depth=depth, hidden=1024, causal=True, activation="gelu"
    )


IMAGE, IDS = torch.randn(2, 3, 224, 224), torch.randint(0, 64, (2, 32))
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "resnet18": (torchvision.models.resnet18, IMAGE[..., :64, :64]),
    "resnet50": (torchvision.models.resnet50, IMAGE[..., :64, :64]),
    "convnext_tiny": (torchvision.models.convnext_tiny, IMAGE[..., :64, :64]),
    "swin_t": (torchvision.models.swin_t, IMAGE[..., :64, :64]),
    "vit_b_16": (torchvision.models.vit_b_16, IMAGE),
    "GPT, 48 layers": (lambda: gpt(48), IDS),
}


def seconds(f: Callable[..., object], *args: object, repeat: int = 3, **kwargs: object) -> float:
    """Least processor time of some calls."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        f(*args, **kwargs)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print(f"{'model':16s} {'export':>8s} {'inference':>10s} {'ratio':>6s} {'with check':>11s}")
    for name, (build, x) in MODELS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        model = build().eval()
        torch.export.export(model, (x,), strict=False)
        export = seconds(torch.export.export, model, (x,), strict=False)
        infer = seconds(infer_symmetry, model, x, verify=False)
        both = seconds(infer_symmetry, model, x, verify=True, repeat=1)
        print(f"{name:16s} {export:7.2f}s {infer:9.2f}s {infer / export:6.2f} {both:10.2f}s", flush=True)


if __name__ == "__main__":
    main()
