"""Tasks on data that never repeat (`tasks.streams`): families for meta-training, and concrete ones."""

from collections.abc import Sequence
from typing import Any

from torch import Generator, nn

from tasks import conv, mlp, recurrent, residual, streams, transformer
from tasks.task import Supervised, Task, choice, horizon, log_uniform, mean_squared_error

SEEDS = 2**20  # teachers and chains of a family


def regressor(
    name: str, source: streams.TeacherValues, hidden: Sequence[int], activation: str, **settings
) -> Supervised:
    """An MLP with these hidden widths, fitted to the values of `source`; settings of `Supervised`."""
    sizes = [source.inputs, *hidden, source.outputs]
    return Supervised(name, lambda: mlp.mlp(sizes, activation), source, loss=mean_squared_error, **settings)


def forecaster(name: str, source: streams.Waves, *, kind: str, width: int, **settings) -> Supervised:
    """A recurrent network that predicts the next value of a signal from those before; settings of `Supervised`."""

    def build() -> nn.Module:
        return recurrent.Recurrent(nn.Identity(), 1, 1, kind=kind, width=width, depth=1, last=False)

    return Supervised(name, build, source, loss=mean_squared_error, **settings)


# --------------------------------------------------------------------------------------- families


def sample_classifier(generator: Generator) -> Task:
    """An MLP of 1 to 3 hidden layers of 16 to 128 units, and a teacher of at most one: 4 to 16 classes."""
    classes = choice(generator, (4, 8, 10, 16))
    noise = choice(generator, (0.0, log_uniform(generator, 0.05, 1.0)))
    source = streams.TeacherClasses(**_teacher(generator), outputs=classes, noise=noise)
    hidden, activation = _hidden(generator), choice(generator, mlp.COMMON)
    name = f"stream-mlp-{activation}-{'-'.join(map(str, [source.inputs, *hidden, classes]))}"
    return mlp.classifier(name, source, hidden, activation, **_settings(generator))


def sample_regressor(generator: Generator) -> Task:
    """An MLP of 1 to 3 hidden layers of 16 to 128 units, and a teacher of at most one: 1 to 16 values."""
    outputs = choice(generator, (1, 4, 8, 16))
    noise = choice(generator, (0.0, log_uniform(generator, 0.05, 1.0)))
    source = streams.TeacherValues(**_teacher(generator), outputs=outputs, noise=noise)
    hidden, activation = _hidden(generator), choice(generator, mlp.COMMON)
    name = f"stream-regression-{activation}-{'-'.join(map(str, [source.inputs, *hidden, outputs]))}"
    return regressor(name, source, hidden, activation, **_settings(generator))


def sample_cnn(generator: Generator) -> Task:
    """2 or 3 convolutions of 4 to 16 channels on drawn shapes or gratings of 8 to 16 pixels."""
    size, noise = choice(generator, (8, 12, 16)), log_uniform(generator, 0.1, 1.0)
    source: streams.Drawn = choice(generator, (streams.Shapes, streams.Gratings))(size, noise)
    channels = [choice(generator, (4, 8, 12, 16)) for _ in range(choice(generator, (2, 2, 3)))]
    activation, norm = choice(generator, ("relu", "tanh", "gelu")), choice(generator, (False, True))
    return conv.classifier(
        f"stream-cnn-{activation}{'-bn' if norm else ''}-{size}-{'-'.join(map(str, channels))}",
        source,
        channels,
        activation,
        norm=norm,
        pool=choice(generator, ("max", "avg")),
        head=choice(generator, ("flatten", "average")),
        **_settings(generator, batch_sizes=(16, 32, 64)),
    )


def sample_transformer(generator: Generator) -> Task:
    """1 or 2 blocks of width 16 to 32 on 16 or 24 tokens of a random chain, of repeated motifs or of arithmetic."""
    source: streams.Sequences
    length, kind = choice(generator, (16, 24)), choice(generator, ("chain", "chain", "repeats", "arithmetic"))
    if kind == "chain":
        size, branches = choice(generator, (8, 12, 16, 24)), choice(generator, (2, 3, 4))
        restart = log_uniform(generator, 0.01, 0.2)
        source = streams.Chain(length, size, branches, restart, seed=choice(generator, range(SEEDS)))
    elif kind == "repeats":
        noise = choice(generator, (0.0, log_uniform(generator, 0.02, 0.2)))
        source = streams.Repeats(length, choice(generator, (8, 16, 32)), choice(generator, (4, 8)), noise)
    else:
        source = streams.Arithmetic(length, choice(generator, (7, 9, 13)))
    width = choice(generator, (16, 24, 32))
    shape = {"width": width, "heads": choice(generator, (1, 2, 4)), "depth": choice(generator, (1, 2))}
    return transformer.language_model(
        f"stream-{kind}-{source.classes}-{'-'.join(map(str, shape.values()))}",
        source,
        **shape,
        hidden=width * choice(generator, (1, 2, 4)),
        activation=choice(generator, tuple(transformer.ACTIVATIONS)),
        fused=choice(generator, (False, True)),
        embed_std=log_uniform(generator, 0.02, 1.0),
        **_settings(generator, batch_sizes=(8, 16, 32)),
    )


def _teacher(generator: Generator) -> dict[str, Any]:
    return {
        "inputs": choice(generator, (24, 32, 48, 64, 128)),
        "hidden": choice(generator, ((), (24,), (48,), (96,))),
        "activation": choice(generator, tuple(streams.TEACHER_ACTIVATIONS)),
        "decay": choice(generator, (0.0, log_uniform(generator, 0.25, 1.5))),
        "seed": choice(generator, range(SEEDS)),
    }


def _hidden(generator: Generator) -> list[int]:
    return [choice(generator, (16, 24, 32, 48, 64, 128)) for _ in range(choice(generator, (1, 2, 3)))]


def _settings(generator: Generator, batch_sizes: Sequence[int] = (32, 64, 128)) -> dict[str, Any]:
    return {
        "batch_size": choice(generator, batch_sizes),
        "steps": horizon(generator, 100, 2000),
        "scale": log_uniform(generator, 0.5, 2.0),
    }


# --------------------------------------------------------------------------------- concrete tasks


def mlp_teacher(steps: int = 200) -> Task:
    """Labels sampled from a random 64-64-10 ReLU network on white inputs; a 64-128-128-10 ReLU student.

    Its first steps are a plateau, so that a rate measured there says little of the rest.
    """
    source = streams.TeacherClasses(64, (64,), 10, noise=0.3)
    return mlp.classifier("stream-mlp-teacher", source, [128, 128], "relu", batch_size=64, steps=steps)


def mlp_spectrum() -> Task:
    """The largest output of a random 96-48-10 tanh network, on inputs of a decaying spectrum."""
    source = streams.TeacherClasses(96, (48,), 10, "tanh", decay=0.75)
    return mlp.classifier("stream-mlp-spectrum", source, [112, 80, 56], "gelu", batch_size=128, steps=1000)


def regression() -> Task:
    """The values of a random 40-64-6 ReLU network, without noise."""
    source = streams.TeacherValues(40, (64,), 6, decay=0.5)
    return regressor("stream-regression", source, [80, 80], "relu", batch_size=128, steps=600)


def regression_noisy() -> Task:
    """The values of a random 32-32-8 network of sines, with noise of half their standard deviation."""
    source = streams.TeacherValues(32, (32,), 8, "sin", decay=0.5, noise=0.5)
    return regressor("stream-regression-noisy", source, [96, 96], "tanh", batch_size=64, steps=300)


def cnn_shapes() -> Task:
    """Disks and flowers, filled or in outline, on 16 x 16 pixels with noise as strong as they are."""
    source = streams.Shapes(16, noise=1.0)
    return conv.classifier("stream-cnn-shapes", source, [14, 28], "relu", pools=2, batch_size=32, steps=400)


def transformer_chain() -> Task:
    """The next token of a random chain of order two, of 20 tokens."""
    return transformer.language_model(
        "stream-transformer-chain",
        streams.Chain(length=32, vocabulary=20, branches=3),
        width=36,
        heads=3,
        depth=2,
        hidden=108,
        batch_size=16,
        steps=800,
    )


def residual_mislabelled() -> Task:
    """A residual MLP; the teacher has three hidden layers, and a fifth of the labels is drawn at random."""
    source = streams.Mislabelled(streams.TeacherClasses(72, (72, 72, 72), 12, "tanh", decay=0.4), 0.2)
    return residual.mlp_classifier(
        "stream-residual-mislabelled",
        source,
        width=72,
        hidden=104,
        depth=4,
        activation="gelu",
        batch_size=64,
        steps=500,
    )


def vit_gratings() -> Task:
    """A transformer of the patches of noisy gratings."""
    source = streams.Gratings(16, noise=0.8)
    return transformer.vit(
        "stream-vit-gratings", source, 4, width=44, heads=4, depth=3, hidden=88, batch_size=32, steps=400
    )


def lstm_waves() -> Task:
    """An LSTM that forecasts noisy sums of two sinusoids."""
    return forecaster(
        "stream-lstm-waves", streams.Waves(32, noise=0.1), kind="lstm", width=52, batch_size=32, steps=500
    )
