"""Data that never repeat: each source against its definition, and what the tasks on them promise."""

import math

import pytest
import torch
from torch.func import grad
from torch.testing import assert_close

from meta_train.bench.suites import suite_named
from meta_train.symmetries import symmetry_of
from tasks import data, stream_tasks, streams, suites

TASKS = suites.STREAMING | suites.STREAMING_LATER
FAMILIES = {name: family for name, family in suites.TRAIN.items() if name.startswith("stream")}
SOURCES = {
    "linear": streams.TeacherClasses(6, (), 4),
    "classes": streams.TeacherClasses(6, (8, 8), 4, "tanh", decay=1.0, noise=0.2),
    "values": streams.TeacherValues(6, (8,), 3, "sin", decay=0.5, noise=0.2),
    "mislabelled": streams.Mislabelled(streams.TeacherClasses(6, (8,), 4), 0.3),
    "shapes": streams.Shapes(12, noise=0.2),
    "gratings": streams.Gratings(12, noise=0.2),
    "chain": streams.Chain(10, 7, branches=3, restart=0.1),
    "repeats": streams.Repeats(10, 7, longest=4, noise=0.1),
    "arithmetic": streams.Arithmetic(10, 9),
    "waves": streams.Waves(10, noise=0.1),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request):
    return TASKS[request.param]()


@pytest.fixture(params=sorted(SOURCES))
def source(request):
    return SOURCES[request.param]


def rows(x):
    return {tuple(row) for row in x.flatten(1).tolist()}


# ------------------------------------------------------------------------------------- the tasks


def test_batches_never_repeat(task):
    g = seeded(5)
    drawn = torch.cat([task.batch(g)[0], *task.batches(g, 20)[0], task.held_out()[0], task.train_eval()[0]])
    assert len(rows(drawn)) == len(drawn)


def test_the_generator_decides_the_batch_and_the_held_out_batch_is_fixed(task):
    one, same, other = (task.batch(seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    again = TASKS[task.name]()
    for a, b in zip(task.held_out(), again.held_out(), strict=True):
        assert torch.equal(a, b)


def test_the_loss_is_positive_and_its_gradients_are_finite(task):
    weights, g = task.init(seeded(0)), seeded(1)
    for _ in range(3):
        batch = task.batch(g)
        assert float(task.loss(weights, batch)) > 0
        assert all(x.isfinite().all() for x in grad(task.loss)(weights, batch).values())


def test_a_constant_guess_loses_the_ceiling(task):
    _, y = task.held_out()
    if y.is_floating_point():
        guess = (y - y.mean(0)).square().mean()
    else:
        share = torch.bincount(y.flatten()) / y.numel()
        guess = -share.xlogy(share).sum()
    assert 0.8 * task.ceiling < guess < 1.2 * task.ceiling


def test_the_inferred_symmetry_is_exact_and_covers_the_hidden_units(task):
    symmetry = symmetry_of(task)
    assert symmetry.notes == () and symmetry.summary()["covered"] > 0.9
    assert symmetry.check(task.model, task.held_out()[0][:4]) < 1e-12


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_symmetry_of_a_streaming_family_is_exact(name):
    task = FAMILIES[name](seeded(3))
    symmetry = symmetry_of(task)
    assert symmetry.notes == () and symmetry.summary()["covered"] > 0.8
    assert symmetry.check(task.model, task.held_out()[0][:4]) < 1e-12


def test_the_suites_are_there_by_name_and_the_first_task_is_the_one_of_the_fault():
    assert suite_named("tasks.suites:STREAMING") is suites.STREAMING
    assert not set(suites.STREAMING) & set(suites.STREAMING_LATER)
    assert all(make().name == name for name, make in TASKS.items())
    task = suites.STREAMING["stream-mlp-teacher"]()
    assert [tuple(p.shape) for p in task.model.parameters() if p.ndim > 1] == [(128, 64), (128, 128), (10, 128)]
    assert (task.batch_size, task.steps, stream_tasks.mlp_teacher(1000).steps) == (64, 200, 1000)


# ----------------------------------------------------------------------------------- the sources


def test_held_out_is_another_draw_of_the_same_distribution(source):
    x, y = source.sample(seeded(0), 4000)
    held_x, held_y = source.held_out()
    assert x.shape[1:] == held_x.shape[1:] == source.shape and len(held_x) <= data.HELD_OUT
    assert x.dtype == held_x.dtype and y.dtype == held_y.dtype and y.shape[1:] == held_y.shape[1:]
    assert abs(x.double().mean() - held_x.double().mean()) < 0.1 * x.double().std()
    assert 0.9 < held_x.double().std() / x.double().std() < 1.1
    if not y.is_floating_point():
        assert set(y.unique().tolist()) == set(range(source.classes)) == set(held_y.unique().tolist())


def test_a_source_is_a_function_of_its_fields_and_the_generator(source):
    twin = type(source)(**{name: getattr(source, name) for name in source.__dataclass_fields__})
    torch.manual_seed(1)
    one = source.sample(seeded(3), 5)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, twin.sample(seeded(3), 5), strict=True))


def test_inputs_of_a_teacher_have_the_spectrum_and_other_seeds_other_teachers():
    white, coloured = (streams.TeacherClasses(8, (5,), 3, decay=decay) for decay in (0.0, 1.0))
    x, _ = coloured.sample(seeded(0), 40_000)
    spectrum = torch.arange(1.0, 9) ** -2
    assert_close(torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0), spectrum / spectrum.mean(), rtol=0.05, atol=0.0)
    assert abs(x[:, :-1].mul(x[:, 1:]).mean()) > 0.02  # the eigenvectors are not the axes
    x, y = white.sample(seeded(0), 2000)
    other = streams.TeacherClasses(8, (5,), 3, seed=1)
    assert 0.1 < (other.answers(x).argmax(1) == y).float().mean() < 0.6
    assert torch.equal(white.answers(x).argmax(1), y)


@pytest.mark.parametrize("activation", sorted(streams.TEACHER_ACTIVATIONS))
def test_a_teacher_is_a_network_with_standardised_outputs(activation):
    source = streams.TeacherValues(5, (7, 6), 4, activation, noise=0.3)
    x, y = source.sample(seeded(0), 20_000)
    clean = source.answers(x)
    assert clean.mean(0).abs().max() < 0.1 and (clean.std(0) - 1).abs().max() < 0.1
    assert_close((y - clean).std(0), torch.full((4,), 0.3), rtol=0.05, atol=0.0)
    with pytest.raises(TypeError, match="mean_squared_error"):
        _ = source.classes


def test_noisy_labels_are_samples_of_the_softmax():
    source = streams.TeacherClasses(4, (6,), 3, noise=0.5)
    x, y = source.sample(seeded(0), 40_000)
    p = (source.answers(x) / 0.5).softmax(1)
    hit = p.gather(1, y.unsqueeze(1)).mean()
    assert abs(hit - p.square().sum(1).mean()) < 0.01  # what it is for y ~ p
    assert abs(p.mean(0) - torch.bincount(y) / len(y)).max() < 0.01


def test_labels_are_replaced_at_the_given_share():
    clean = streams.TeacherClasses(6, (8,), 4)
    x, y = streams.Mislabelled(clean, 0.4).sample(seeded(0), 20_000)
    assert abs((y != clean.answers(x).argmax(1)).float().mean() - 0.4 * 3 / 4) < 0.015


@pytest.mark.parametrize("kind", [streams.Shapes, streams.Gratings])
def test_drawn_images_are_standardised_and_noise_is_added(kind):
    x, _ = kind(16).sample(seeded(0), 4000)
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    noisy, _ = kind(16, noise=0.5).sample(seeded(0), 4000)
    assert_close((noisy - x).std(), torch.tensor(0.5), rtol=0.02, atol=0.0)


def test_a_figure_has_its_lobes_and_an_outline_is_hollow():
    images, kinds = streams.Shapes(65).sample(seeded(1), 100)
    yy, xx = torch.meshgrid(torch.arange(65.0), torch.arange(65.0), indexing="ij")
    angle, outlined_disk, seen = torch.linspace(0, 2 * math.pi, 121)[:-1], len(streams.LOBES), set()
    for x, kind in zip(images[:, 0], kinds.tolist(), strict=True):
        light = x > (x.max() + x.min()) / 2
        if kind > outlined_disk or torch.cat([light[0], light[-1], light[:, 0], light[:, -1]]).any():
            continue  # cut by the border
        down, across = yy[light].mean(), xx[light].mean()
        assert light[int(down.round()), int(across.round())] == (kind != outlined_disk)
        if 0 < kind < outlined_disk:  # on a circle between the depth and the tip of the lobes
            radius = torch.hypot(yy - down, xx - across)[light].square().mean().sqrt() * 1.35
            at = torch.stack([down + radius * angle.sin(), across + radius * angle.cos()]).round().long()
            waves = torch.fft.rfft(light[*at.clamp(0, 64)].float()).abs()
            assert int(waves[1:].argmax()) + 1 == streams.LOBES[kind]
        seen.add(kind)
    assert seen == {0, 1, 2, 3, 4, 5}


def test_a_grating_has_the_orientation_and_the_wave_number_of_its_kind():
    x, y = streams.Gratings(64).sample(seeded(0), 64)
    x = x[:, 0]
    power = torch.fft.fft2(x - x.mean((1, 2), keepdim=True), s=(512, 512)).abs().square()
    frequency = torch.fft.fftfreq(512) * 2 * math.pi * 63 / 2  # radians per half side
    at = power.flatten(1).argmax(1)
    fy, fx = frequency[at // 512], frequency[at % 512]
    angle = torch.atan2(fy, fx) % math.pi / (math.pi / streams.ORIENTATIONS)
    assert torch.equal(angle.add(0.25).floor().long() % 4, y % 4)
    assert_close(torch.hypot(fy, fx), torch.tensor(streams.WAVE_NUMBERS)[y // 4], rtol=0.25, atol=0.0)


def tokens_of(source, count):
    x, y = source.sample(seeded(0), count)
    assert x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    return torch.cat([x[:, :1], y], 1)


def transitions(source):
    """How often c follows a and b: counts [a, b, c]."""
    tokens, n = tokens_of(source, 4000), source.vocabulary
    at = (tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:])
    return torch.zeros(n, n, n).index_put_(at, torch.ones(()), accumulate=True)


def test_a_chain_has_its_branches_and_restarts():
    counts = transitions(streams.Chain(30, 8, branches=3, restart=0.0))
    visited = counts[counts.sum(-1) > 500]
    assert len(visited) > 20 and (visited > 0).sum(-1).max() == 3
    share = visited.max(-1).values / visited.sum(-1)
    # 4, 2 and 1 of 7, or sums of them where successors are the same token.
    assert (share.unsqueeze(1) - torch.tensor([4, 5, 6, 7]) / 7).abs().amin(1).max() < 0.05
    assert (share - 4 / 7).abs().min() < 0.03
    again = transitions(streams.Chain(30, 8, branches=3, restart=0.3))
    stray = (again * (counts == 0))[counts.sum(-1) > 500].sum(-1)
    spread = (counts == 0)[counts.sum(-1) > 500].sum(-1) / 8  # of a uniform token, how much falls on no successor
    expected = 0.3 * spread * again[counts.sum(-1) > 500].sum(-1)
    assert abs(stray.sum() / expected.sum() - 1) < 0.05
    other = transitions(streams.Chain(30, 8, branches=3, restart=0.0, seed=1))
    assert ((other > 0) != (counts > 0)).float().mean() > 0.2


def test_motifs_repeat():
    tokens = tokens_of(streams.Repeats(20, 50, longest=6), 400)
    periods = [min(p for p in range(1, 22) if torch.equal(row[p:], row[:-p])) for row in tokens]
    assert set(periods) >= {2, 3, 4, 5, 6} and max(periods) == 6
    noisy = tokens_of(streams.Repeats(20, 50, longest=6, noise=0.3), 400)
    assert abs((noisy != tokens).float().mean() - 0.3 * 49 / 50) < 0.03


def test_expressions_are_right():
    tokens = tokens_of(streams.Arithmetic(15, 9), 500)
    a, op, b, c = tokens.view(500, 4, 4).unbind(-1)
    assert set(op.flatten().tolist()) == {7, 8} and a.max() == b.max() == 6
    assert torch.equal(c, torch.where(op == 7, a + b, a - b) % 7)


def test_waves_obey_the_recurrence_of_two_sinusoids():
    """The fourth-order difference equation of two frequencies has a solution for each signal."""
    x, y = streams.Waves(60).sample(seeded(0), 20)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for signal in x.squeeze(-1).double():
        windows = signal.unfold(0, 5, 1)
        sides, middle = windows[:, [0, 4]].sum(1, keepdim=True), windows[:, 1:4]
        basis = torch.stack([middle[:, 0] + middle[:, 2], middle[:, 1]], 1)
        fit = torch.linalg.lstsq(basis, sides).solution
        assert (basis @ fit - sides).abs().max() < 1e-3
