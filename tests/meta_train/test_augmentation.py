"""Reparametrised tasks are the same functions, and what they do to rules with and without symmetry."""

import pytest
import torch

from learned_opt.rules import RULES
from meta_train.augmentation import augmented
from meta_train.recipes import Recipe, RecipeError
from meta_train.symmetries import symmetry_of
from meta_train.unroll import Unroll
from tasks import mlp
from tasks.data import Noisy, digits


@pytest.fixture(scope="module")
def task():
    return mlp.classifier("small", Noisy(digits(), 0.3), [12, 8], "relu", batch_size=16, steps=20)


def double(weights):
    return {n: w.double() for n, w in weights.items()}


@pytest.mark.parametrize("kind", ["units", "global"])
def test_an_augmented_task_is_the_same_function_from_other_weights(task, kind):
    other = augmented(task, kind, 100.0, torch.Generator().manual_seed(3))
    plain, moved = (t.init(torch.Generator().manual_seed(0)) for t in (task, other))
    assert plain.keys() == moved.keys()
    assert not torch.allclose(plain["0.weight"], moved["0.weight"])
    batch = tuple(x.double() if x.is_floating_point() else x for x in task.train_eval())
    torch.testing.assert_close(
        other.loss(double(moved), batch), task.loss(double(plain), batch), rtol=1e-4, atol=0
    )  # the weights were moved in float32


def test_every_run_has_other_units_and_the_seed_decides_which(task):
    other = augmented(task, "units", 10.0, torch.Generator())
    first, again, second = (other.init(torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_moved_units_leave_the_data_as_they_are(task):
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    for t, generator in zip((task, augmented(task, "units", 10.0, torch.Generator())), generators, strict=True):
        t.init(generator)
    assert torch.equal(*(task.batch(generator)[0] for generator in generators))


def test_without_augmentation_the_task_is_itself(task):
    assert augmented(task, "none", 100.0, torch.Generator()) is task


def test_an_equivariant_rule_cannot_tell_moved_units_and_another_can(task):
    """The final losses of a run from moved weights: the same with the frame, others without."""

    def losses(kind, scales=True):
        problem = augmented(task, kind, 30.0, torch.Generator())
        rule = RULES["whitened_polar"]().double()
        symmetry = symmetry_of(task) if scales else symmetry_of(task).without_scales
        unroll = Unroll(problem, rule, symmetry, (20, 20))
        particles = unroll.init(2, torch.Generator().manual_seed(5), common=True)
        plain = [task.init(torch.Generator().manual_seed(k)) for k in (1, 2)]
        start = double({n: torch.stack([w[n] for w in plain]) for n in plain[0]})
        if kind == "units":
            g = symmetry_of(task).sample(torch.Generator().manual_seed(7), scale_range=(1 / 30, 30))
            moved = [symmetry_of(task).act(g, {n: w[i] for n, w in start.items()}) for i in range(2)]
            start = {n: torch.stack([w[n] for w in moved]) for n in start}
        state = {n: {k: s.double() for k, s in slots.items()} for n, slots in particles["state"].items()}
        batches = task.batches(torch.Generator().manual_seed(9), 6)
        found = []
        for x, y in zip(*batches, strict=True):
            batch = (x.double().expand(2, *x.shape), y.expand(2, *y.shape))
            loss, grads = unroll._loss_and_gradient(start, batch, detach=True)
            theta = {n: p.detach() for n, p in rule.named_parameters()}
            with torch.no_grad():
                start, state = unroll._advance(False, False)(theta, start, state, grads, torch.tensor([20, 20]))
            found.append(loss)
        return torch.stack(found)

    torch.testing.assert_close(losses("units"), losses("none"), rtol=1e-8, atol=0)
    assert not torch.allclose(losses("units", scales=False), losses("none", scales=False), rtol=1e-2)


def test_a_recipe_names_its_augmentation():
    assert Recipe.from_dict(Recipe(augmentation="units").to_dict()).augmentation == "units"
    with pytest.raises(RecipeError, match="augmentation 'most' must be one of none, units, global"):
        Recipe(augmentation="most")
    with pytest.raises(RecipeError, match="augmentation_scale"):
        Recipe(augmentation_scale=0.5)
