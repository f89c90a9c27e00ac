"""The suites: TRAIN to meta-train on, VALID to choose and stop by, HELD_OUT to measure once.

The tasks of VALID and HELD_OUT have shapes that no family of TRAIN samples.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tasks import conv, data, mlp, transformer
from tasks.data import Noisy, digits, photos, tabular, text
from tasks.task import Task, TaskFamily

TRAIN: dict[str, TaskFamily] = {
    "mlp": mlp.sample_classifier,
    "autoencoder": mlp.sample_autoencoder,
    "cnn": conv.sample_classifier,
    "char": transformer.sample_language_model,
    "vit": transformer.sample_vit,
}


def _mlp_digits_relu() -> Task:
    return mlp.classifier("mlp-digits-relu", Noisy(digits(), 0.5), [96, 96], "relu", batch_size=128, steps=600)


def _mlp_photos_tanh() -> Task:
    return mlp.classifier(
        "mlp-photos-tanh",
        Noisy(photos(8, (1, 5)), 0.2),
        [80, 56, 56, 40],
        "tanh",
        batch_size=128,
        steps=800,
    )


def _mlp_photos_gelu() -> Task:
    return mlp.classifier(
        "mlp-photos-gelu",
        Noisy(photos(16, (1, 5)), 0.2),
        [96, 56],
        "gelu",
        batch_size=64,
        steps=600,
    )


def _mlp_digits_sin() -> Task:
    return mlp.classifier("mlp-digits-sin", Noisy(digits(), 0.4), [72, 40], "sin", batch_size=64, steps=400)


def _autoencoder_photos() -> Task:
    return mlp.autoencoder(
        "autoencoder-photos",
        photos(8, (1, 5)),
        [96, 28, 96],
        "relu",
        noise=0.1,
        batch_size=128,
        steps=800,
    )


def _cnn_digits_relu() -> Task:
    return conv.classifier("cnn-digits-relu", Noisy(digits(), 0.5), [10, 20], "relu", batch_size=64, steps=600)


def _cnn_photos_bn() -> Task:
    return conv.classifier(
        "cnn-photos-bn",
        Noisy(photos(8, (1, 5)), 0.2),
        [10, 20, 20],
        "relu",
        norm=True,
        head="average",
        batch_size=64,
        steps=800,
    )


def _cnn_photos_tanh() -> Task:
    return conv.classifier(
        "cnn-photos-tanh",
        Noisy(photos(8, (1, 5)), 0.2),
        [6, 14],
        "tanh",
        pool="avg",
        batch_size=64,
        steps=600,
    )


def _char() -> Task:
    return transformer.language_model(
        "char", text(32), width=40, heads=4, depth=2, hidden=120, batch_size=16, steps=800
    )


def _vit_digits() -> Task:
    return transformer.vit(
        "vit-digits",
        Noisy(digits(), 0.4),
        2,
        width=40,
        heads=2,
        depth=2,
        hidden=80,
        fused=False,
        batch_size=32,
        steps=800,
    )


VALID: dict[str, Callable[[], Task]] = {
    "mlp-digits-relu": _mlp_digits_relu,
    "mlp-photos-tanh": _mlp_photos_tanh,
    "mlp-photos-gelu": _mlp_photos_gelu,
    "mlp-digits-sin": _mlp_digits_sin,
    "autoencoder-photos": _autoencoder_photos,
    "cnn-digits-relu": _cnn_digits_relu,
    "cnn-photos-bn": _cnn_photos_bn,
    "cnn-photos-tanh": _cnn_photos_tanh,
    "char": _char,
    "vit-digits": _vit_digits,
}
"""Adam from the initial weights of seed 1 (loss on `train_eval`), one thread of a CPU:

    task                 params  fwd+bwd  steps  ceiling  lr 1e-3  lr 3e-3
    mlp-digits-relu       16522   0.3 ms    600     2.30    0.360    0.262
    mlp-photos-tanh       25858   0.6 ms    800     2.30    1.212    1.236
    mlp-photos-gelu       79826   0.4 ms    600     2.30    1.134    1.127
    mlp-digits-sin         8010   0.2 ms    400     2.30    0.699    0.295
    autoencoder-photos    42652   0.5 ms    800     1.04    0.034    0.031
    cnn-digits-relu        5130   0.9 ms    600     2.30    0.549    0.279
    cnn-photos-bn          5980   1.5 ms    800     2.30    1.149    1.079
    cnn-photos-tanh        3188   0.7 ms    600     2.30    1.433    1.353
    char                  42177   4.0 ms    800     4.57    2.029    1.906
    vit-digits            27810   2.7 ms    800     2.30    1.288    0.969
"""


def _wine_tanh() -> Task:
    return mlp.classifier("wine-tanh", Noisy(tabular("wine"), 0.5), [50, 50], "tanh", batch_size=32, steps=300)


def _breast_cancer_relu() -> Task:
    return mlp.classifier(
        "breast-cancer-relu",
        Noisy(tabular("breast_cancer"), 0.5),
        [100, 20],
        "relu",
        batch_size=64,
        steps=400,
    )


def _mlp_wide_relu() -> Task:
    return mlp.classifier(
        "mlp-wide-relu",
        Noisy(photos(16, (2, 5)), 0.2),
        [256, 128],
        "relu",
        batch_size=128,
        steps=1000,
    )


def _mlp_deep_gelu() -> Task:
    return mlp.classifier(
        "mlp-deep-gelu",
        Noisy(digits(), 0.5),
        [100, 100, 100, 50, 50],
        "gelu",
        batch_size=128,
        steps=800,
    )


def _autoencoder_digits() -> Task:
    return mlp.autoencoder(
        "autoencoder-digits",
        digits(),
        [144, 72, 12, 72, 144],
        "tanh",
        noise=0.2,
        batch_size=128,
        steps=1000,
    )


def _cnn_deep_bn() -> Task:
    return conv.classifier(
        "cnn-deep-bn",
        Noisy(photos(16, (2, 5)), 0.2),
        [18, 18, 36, 36],
        "relu",
        norm=True,
        pools=2,
        head="average",
        batch_size=32,
        steps=800,
    )


def _char_larger() -> Task:
    return transformer.language_model(
        "char-larger", text(48), width=60, heads=4, depth=3, hidden=240, batch_size=12, steps=1000
    )


def _vit_photos() -> Task:
    return transformer.vit(
        "vit-photos",
        Noisy(photos(16, (2, 5)), 0.2),
        4,
        width=54,
        heads=3,
        depth=3,
        hidden=216,
        batch_size=32,
        steps=800,
    )


HELD_OUT: dict[str, Callable[[], Task]] = {
    "wine-tanh": _wine_tanh,
    "breast-cancer-relu": _breast_cancer_relu,
    "mlp-wide-relu": _mlp_wide_relu,
    "mlp-deep-gelu": _mlp_deep_gelu,
    "autoencoder-digits": _autoencoder_digits,
    "cnn-deep-bn": _cnn_deep_bn,
    "char-larger": _char_larger,
    "vit-photos": _vit_photos,
}
"""Needs no file. See `held_out` for the tasks on data in a folder."""


def mnist_mlp(folder: Path | str | None = None, *, download: bool = False) -> Task:
    """A ReLU MLP on MNIST from the data folder; raises as `require_data_dir` and `data.images`."""
    source = data.images("MNIST", require_data_dir(folder), download=download)
    return mlp.classifier("mnist-mlp", Noisy(source, 0.2), [120, 60], "relu", batch_size=128, steps=1000)


def mnist_cnn(folder: Path | str | None = None, *, download: bool = False) -> Task:
    """A CNN of three convolutions on MNIST from the data folder; raises as `mnist_mlp`."""
    source = data.images("MNIST", require_data_dir(folder), download=download)
    return conv.classifier("mnist-cnn", Noisy(source, 0.2), [8, 16, 32], "relu", pools=3, batch_size=32, steps=800)


def held_out(folder: Path | str | None = None) -> dict[str, Callable[[], Task]]:
    """HELD_OUT, and the MNIST tasks if the data folder has MNIST in IDX format."""
    found = data_dir(folder)
    if found is None or not data.has_idx("MNIST", found):
        return dict(HELD_OUT)
    return HELD_OUT | {
        "mnist-mlp": partial(mnist_mlp, found),
        "mnist-cnn": partial(mnist_cnn, found),
    }


def data_dir(folder: Path | str | None = None) -> Path | None:
    """The folder of optional data: `folder`, else the environment's LEARNED_OPT_DATA, else None.

    Raises:
        FileNotFoundError: a folder is named but does not exist.
    """
    named = folder or os.environ.get("LEARNED_OPT_DATA")
    if not named:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"the data folder {path} does not exist. Correct the data option or LEARNED_OPT_DATA, or leave both out."
        )
    return path


def require_data_dir(folder: Path | str | None = None) -> Path:
    """`data_dir`, for tasks that cannot do without.

    Raises:
        FileNotFoundError: no folder is named, or it does not exist.
    """
    found = data_dir(folder)
    if found is None:
        raise FileNotFoundError(
            "this task needs a data folder, and none is named. Pass one, or set LEARNED_OPT_DATA "
            "to a folder with mnist/ in IDX format."
        )
    return found
