"""The suites: TRAIN to meta-train on, VALID and STREAMING to choose by, SEEN and HELD_OUT to report on.

No matrix of VALID and HELD_OUT has a shape that a family of TRAIN samples. SEEN was held out once, until what it
showed had set questions; HELD_OUT (`tasks.held_out`) has data and networks of its own.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tasks import (
    conv,
    documents,
    experts,
    fields,
    generative,
    graph,
    mlp,
    policy,
    recurrent,
    relations,
    residual,
    sequence,
    stream_tasks,
    transformer,
)
from tasks.data import Noisy, digits, handwriting, photos, text
from tasks.held_out import HELD_OUT
from tasks.task import Task, TaskFamily

TRAIN: dict[str, TaskFamily] = {
    "mlp": mlp.sample_classifier,
    "autoencoder": mlp.sample_autoencoder,
    "cnn": conv.sample_classifier,
    "char": transformer.sample_language_model,
    "vit": transformer.sample_vit,
    "mlp-inputs": mlp.sample_inputs,
    "residual-mlp": residual.sample_mlp,
    "resnet": residual.sample_resnet,
    "rnn": recurrent.sample,
    "experts": experts.sample,
    "stream-mlp": stream_tasks.sample_classifier,
    "stream-regression": stream_tasks.sample_regressor,
    "stream-cnn": stream_tasks.sample_cnn,
    "stream-transformer": stream_tasks.sample_transformer,
    "stream-graph": relations.sample,
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
    "stream-cnn-shapes": stream_tasks.cnn_shapes,
    "stream-transformer-chain": stream_tasks.transformer_chain,
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

The two on streams are in the table of `STREAMING`.
"""


STREAMING: dict[str, Callable[[], Task]] = {
    "stream-mlp-teacher": stream_tasks.mlp_teacher,
    "stream-mlp-spectrum": stream_tasks.mlp_spectrum,
    "stream-regression": stream_tasks.regression,
    "stream-regression-noisy": stream_tasks.regression_noisy,
    "stream-cnn-shapes": stream_tasks.cnn_shapes,
    "stream-transformer-chain": stream_tasks.transformer_chain,
}
"""Data that never repeat. Adam as above, on a machine busy with other work:

    task                         params  fwd+bwd  steps  ceiling  lr 1e-3  lr 3e-3
    stream-mlp-teacher            26122   0.4 ms    200     2.30    1.415    1.415
    stream-mlp-spectrum           25010   1.4 ms   1000     2.30    0.586    0.552
    stream-regression             10246   0.7 ms    600     1.01    0.081    0.045
    stream-regression-noisy       13256   0.7 ms    300     1.21    0.390    0.369
    stream-cnn-shapes              8186   5.4 ms    400     2.30    1.738    1.523
    stream-transformer-chain      29468   5.8 ms    800     3.00    1.466    1.325

Drawing a batch takes 10 to 16 % of the time of a gradient.
"""

STREAMING_LATER: dict[str, Callable[[], Task]] = {
    "stream-residual-mislabelled": stream_tasks.residual_mislabelled,
    "stream-vit-gratings": stream_tasks.vit_gratings,
    "stream-lstm-waves": stream_tasks.lstm_waves,
}
"""Three of other kinds, written after those of `STREAMING`: what is mended on those is checked here.

    task                         params  fwd+bwd  steps  ceiling  lr 1e-3  lr 3e-3
    stream-residual-mislabelled   67460   1.8 ms    500     2.48    1.557    1.559
    stream-vit-gratings           49816   6.9 ms    400     2.08    0.390    0.383
    stream-lstm-waves             11285   7.0 ms    500     1.07    0.079    0.069
"""


# ---------------------------------------------------------------------------------------- seen

Folder = Path | str | None


def _mlp_wide() -> Task:
    """Ten times the widest layer of TRAIN."""
    return mlp.classifier("mlp-wide", Noisy(photos(8, (2, 5)), 0.2), [1280, 100], "relu", batch_size=128, steps=600)


def _mlp_deep() -> Task:
    """Ten hidden layers, at an initial scale that keeps the variance through tanh."""
    return mlp.classifier("mlp-deep", Noisy(digits(), 0.5), 10 * [72], "tanh", batch_size=128, steps=1000, scale=1.7)


def _residual_mlp_deep() -> Task:
    """30 layers: 14 blocks of two, the first and the last."""
    return residual.mlp_classifier(
        "residual-mlp-deep",
        Noisy(photos(8, (2, 5)), 0.2),
        width=56,
        hidden=56,
        depth=14,
        activation="relu",
        batch_size=128,
        steps=800,
    )


def _resnet_photos() -> Task:
    return residual.image_classifier(
        "resnet-photos", Noisy(photos(16, (2, 5)), 0.2), channels=[10, 20, 40], blocks=1, batch_size=32, steps=600
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


def _char_transformer() -> Task:
    return transformer.language_model(
        "char-transformer", text(48), width=60, heads=4, depth=3, hidden=240, batch_size=12, steps=1000
    )


def _autoencoder() -> Task:
    return mlp.autoencoder(
        "autoencoder-digits", digits(), [144, 72, 12, 72, 144], "tanh", noise=0.2, batch_size=128, steps=1000
    )


def _lstm() -> Task:
    return recurrent.language_model("lstm-char", text(32), kind="lstm", embed=36, width=108, batch_size=16, steps=800)


def _siren() -> Task:
    return fields.picture("siren-picture", fields.pixels(96), width=80, depth=3, batch_size=1024, steps=800)


def _burgers() -> Task:
    return fields.burgers("pinn-burgers", width=36, depth=4, batch_size=256, steps=1500)


def _n_body() -> Task:
    return graph.n_body("clifford-n-body", width=11, rounds=2, batch_size=32, steps=600)


def _mamba() -> Task:
    return sequence.mamba(
        "mamba-char", text(40), width=44, inner=88, state=6, rank=3, depth=2, batch_size=12, steps=800
    )


def _pendulum() -> Task:
    return policy.pendulum("policy-pendulum", width=40, depth=2, length=40, batch_size=64, steps=600)


def _mlp_handwriting(folder: Folder = None) -> Task:
    return mlp.classifier(
        "mlp-handwriting", Noisy(handwriting(data_dir(folder)), 0.2), [200, 100], "gelu", batch_size=128, steps=800
    )


def _cnn_handwriting(folder: Folder = None) -> Task:
    return conv.classifier(
        "cnn-handwriting",
        Noisy(handwriting(data_dir(folder)), 0.2),
        [9, 18, 36],
        "relu",
        pools=3,
        batch_size=32,
        steps=800,
    )


def _word(folder: Folder = None) -> Task:
    words = documents.word_windows(documents.corpus(data_dir(folder)), length=24, size=1500)
    return transformer.language_model(
        "word-transformer", words, width=60, heads=6, depth=2, hidden=180, activation="relu", batch_size=16, steps=800
    )


def _vae(folder: Folder = None) -> Task:
    return generative.image_vae(
        "vae-handwriting",
        handwriting(data_dir(folder)),
        hidden=140,
        code=10,
        activation="relu",
        batch_size=64,
        steps=1000,
    )


def _topics(folder: Folder = None) -> Task:
    bags = documents.bags(documents.corpus(data_dir(folder)), size=1200, skip=60)
    return generative.topic_model("topic-model", bags, hidden=90, topics=20, batch_size=128, steps=1000)


def _robust(folder: Folder = None) -> Task:
    openings = documents.openings(documents.corpus(data_dir(folder)), length=24, size=1500)
    noisy = documents.Contaminated(openings, 1502, 0.2)
    return sequence.robust_classifier(
        "robust-attention", noisy, 1502, width=52, heads=4, depth=2, hidden=104, batch_size=32, steps=600
    )


_WITH_DATA: dict[str, Callable[[Folder], Task]] = {
    "mlp-handwriting": _mlp_handwriting,
    "cnn-handwriting": _cnn_handwriting,
    "word-transformer": _word,
    "vae-handwriting": _vae,
    "topic-model": _topics,
    "robust-attention": _robust,
}

IMAGES, TEXTS = ("MNIST", "scikit-learn's digits, enlarged"), ("AG News", "Python's help texts")
_SOURCES = {name: IMAGES if name.endswith("handwriting") else TEXTS for name in _WITH_DATA}


def source_of(task: str, folder: Folder = None) -> str:
    """What the data of a task of SEEN are called where they depend on the data folder, else an empty text."""
    return _SOURCES[task][data_dir(folder) is None] if task in _SOURCES else ""


SEEN: dict[str, Callable[[], Task]] = {
    "mlp-wide": _mlp_wide,
    "mlp-deep": _mlp_deep,
    "residual-mlp-deep": _residual_mlp_deep,
    "resnet-photos": _resnet_photos,
    "vit-photos": _vit_photos,
    "char-transformer": _char_transformer,
    "autoencoder-digits": _autoencoder,
    "lstm-char": _lstm,
    "siren-picture": _siren,
    "pinn-burgers": _burgers,
    "clifford-n-body": _n_body,
    "mamba-char": _mamba,
    "policy-pendulum": _pendulum,
    **{name: partial(make, None) for name, make in _WITH_DATA.items()},
}
"""Those of `_WITH_DATA` use MNIST and AG News of the folder LEARNED_OPT_DATA, if it is set; see docs/tasks.md."""


def seen(folder: Folder = None) -> dict[str, Callable[[], Task]]:
    """SEEN with its data from another folder than LEARNED_OPT_DATA; raises as `data_dir`."""
    found = data_dir(folder)
    return SEEN | {name: partial(make, found) for name, make in _WITH_DATA.items()}


SUITES: dict[str, dict[str, Callable[[], Task]]] = {
    "VALID": VALID,
    "STREAMING": STREAMING,
    "STREAMING_LATER": STREAMING_LATER,
    "SEEN": SEEN,
    "HELD_OUT": HELD_OUT,
}
"""Those that `python -m meta_train evaluate --suite` knows by name."""


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
