"""The canonical frame: covariant, balanced, near one at a usual start, and equal to plain loops over units."""

import math

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt, infer_symmetry
from learned_opt.blocks import layout_of
from learned_opt.frame import SWEEPS, potentials, scales
from learned_opt.symmetry import Element, Label, Scale, Spec, Symmetry, independent
from learned_opt.symmetry.axes import Leaf
from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer
from tests.inferred import infer


def transformer(**settings):
    sizes = {"width": 8, "heads": 2, "depth": 2, "hidden": 12, "causal": True, "activation": "relu"}
    return Transformer(nn.Embedding(5, 8), 4, 5, **(sizes | settings))


def depthwise():
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )


MODELS = {
    "mlp": lambda: mlp([4, 6, 5, 7, 3], "relu"),
    "cnn": lambda: cnn((2, 4, 4), (3, 4, 5), 2, "relu", norm=True),
    "cnn without norm": lambda: cnn((2, 4, 4), (3, 4, 5), 2, "relu"),
    "depthwise": depthwise,
    "transformer": transformer,
    "transformer, q k v apart": lambda: transformer(fused=False, depth=1, activation="gelu"),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def make(kind, spread=0.3):
    """A network away from its start, its symmetry and weights in float64."""
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    params = {n: p.detach() + spread * torch.randn_like(p) for n, p in model.named_parameters()}
    return infer(model), params


def flat(symmetry, g):
    """The scales of a group element in the order of the potentials."""
    return torch.cat([g.scales[n].flatten() for n in symmetry.scales])


def moved(symmetry, g, c):
    """Potentials with their units permuted by g."""
    parts = c.split([g.scales[n].numel() for n in symmetry.scales])
    tables = {n: x.reshape(g.scales[n].shape) for n, x in zip(symmetry.scales, parts, strict=True)}
    return torch.cat([symmetry._move_table(g, symmetry.scales[n].label, x).flatten() for n, x in tables.items()])


# ---------------------------------------------------------------------- the frame by plain loops
class Reference:
    """The definition in the architecture document, unit by unit and entry by entry."""

    def __init__(self, symmetry, params):
        self.symmetry, self.params = symmetry, params
        one = symmetry.identity()
        ones = {n: torch.ones_like(p) for n, p in params.items()}
        self.units = [(label, i) for label in symmetry.scales for i in range(one.scales[label].numel())]
        self.exponents = {}  # unit -> {(name, block): [B, R, C]}
        for label, i in self.units:
            table = one.scales[label].clone()
            table.view(-1)[i] = 2.0
            scaled = symmetry.act(Element(one.perms, {**one.scales, label: table}), ones)
            self.exponents[label, i] = {
                (n, b): x.log2() for n in params for b, x in enumerate(symmetry.split(n, scaled[n]))
            }
        self.w = {(n, b): x for n in params for b, x in enumerate(symmetry.split(n, params[n]))}
        self.c = dict.fromkeys(self.units, 1.0)
        self.sizes = {n: x.numel() for n, x in one.scales.items()}

    def leaves(self, key):
        block = self.symmetry.blocks[key[0]][key[1]]
        rows = [s for leaf in block.batch + block.rows for s in leaf.scale]
        return rows, [s for leaf in block.cols for s in leaf.scale]

    def kind(self, key):
        return self.symmetry.blocks[key[0]][key[1]].kind

    def squares(self, key):
        """W^2 of a block in the current frame."""
        s = torch.ones_like(self.w[key])
        for unit in self.units:
            s = s * self.c[unit] ** self.exponents[unit][key]
        return (self.w[key] / s) ** 2

    def norms(self, unit, keys):
        into = out = 0.0
        for key in keys:
            (rows, _), e = self.leaves(key), self.exponents[unit][key]
            x = self.squares(key)
            if unit[0] not in [label for label, _ in rows]:
                x = x * self.sizes[unit[0]] / x.shape[1]
            into += x[e > 0].sum().item()
            out += x[e < 0].sum().item()
        return into, out

    @staticmethod
    def means(label, norms):
        """Of the squared norms of a label's units, in and out."""
        both = [xy for unit, xy in norms.items() if unit[0] == label]
        return [sum(x) / len(both) for x in zip(*both, strict=True)]

    def __call__(self, sweeps):
        free = [n for n, s in self.symmetry.scales.items() if s.kind != "sign"]
        labels = {key: [label for side in self.leaves(key) for label, _ in side] for key in self.w}
        written = {
            key: [label for side in self.leaves(key) for label, e in side if e > 0 and label in free] for key in self.w
        }
        known, waiting = set(self.symmetry.scales) - set(free), list(free)
        while waiting:
            writers = {n: [k for k in self.w if written[k] == [n] and labels[k].count(n) == 1] for n in waiting}
            matrices = {n: [k for k in keys if self.kind(k) != "vector"] for n, keys in writers.items()}
            writers = {n: matrices[n] or keys for n, keys in writers.items()}
            ready = {n: [k for k in keys if set(labels[k]) - {n} <= known] for n, keys in writers.items()}
            some = {n: keys for n, keys in ready.items() if keys}
            reached = {n: keys for n, keys in some.items() if keys == writers[n]} or some
            if not reached:
                break
            into = {u: self.norms(u, reached[u[0]])[0] for u in self.units if u[0] in reached}
            for u, x in into.items():
                self.c[u] *= math.sqrt(x) if x > 0 else 1.0
            known |= set(reached)
            waiting = [n for n in waiting if n not in reached]
        sets = []
        for n in [n for n in free if n not in waiting]:
            near = {m for k in self.w if n in labels[k] for m in labels[k]} - {n}
            home = next((s for s in sets if not near & set(s)), None)
            if home is None:
                sets.append([n])
            else:
                home.append(n)
        for _ in range(sweeps):
            for some in sets:
                both = {u: self.norms(u, [k for k in self.w if u[0] in labels[k]]) for u in self.units if u[0] in some}
                for u, (x, y) in both.items():
                    mean_x, mean_y = self.means(u[0], both)
                    self.c[u] *= ((x + mean_x) / (y + mean_y)) ** 0.25 if x > 0 and y > 0 else 1.0
        return torch.tensor([self.c[u] for u in self.units], dtype=torch.float64)


@every_model
@pytest.mark.parametrize("sweeps", [0, 1, SWEEPS])
def test_potentials_equal_a_loop_over_units(kind, sweeps):
    symmetry, params = make(kind)
    expected = Reference(symmetry, params)(sweeps)
    torch.testing.assert_close(potentials(symmetry, params, sweeps).exp()[:-1], expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------ properties
@every_model
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("biases", ["any", "zero"])
def test_potentials_are_covariant(kind, seed, biases):
    symmetry, params = make(kind)
    if biases == "zero":  # a usual start: then weights alone tell the scale
        params = {n: torch.zeros_like(p) if n.endswith("bias") else p for n, p in params.items()}
    g = symmetry.sample(torch.Generator().manual_seed(seed), scale_range=(1e-2, 1e2))
    before, after = (potentials(symmetry, w).exp() for w in (params, symmetry.act(g, params)))
    expected = flat(symmetry, g).abs() * moved(symmetry, g, before[:-1])
    torch.testing.assert_close(after[:-1], expected, rtol=1e-12, atol=0)
    assert before[-1] == after[-1] == 1


@every_model
def test_many_sweeps_balance_every_unit_up_to_the_mean(kind):
    symmetry, params = make(kind)
    reference = Reference(symmetry, params)
    log_c = potentials(symmetry, params, sweeps=300)
    reference.c = dict(zip(reference.units, log_c.exp()[:-1].tolist(), strict=True))
    start = Reference(symmetry, params)
    units = [u for u in reference.units if symmetry.scales[u[0]].kind != "sign"]
    now, before = ({u: r.norms(u, r.w) for u in units} for r in (reference, start))
    far = 0.0
    for unit, (into, out) in now.items():
        mean_in, mean_out = Reference.means(unit[0], now)
        assert into > 0 and out > 0
        assert into + mean_in == pytest.approx(out + mean_out, rel=1e-6), unit
        far = max(far, abs(math.log(before[unit][0] / before[unit][1])))
    assert far > 0.1, "it was balanced before"


def test_a_unit_that_is_read_by_next_to_nothing_is_not_far_from_the_others():
    """Balanced alone it would have a large potential, steps as large, and written weights that grow without end."""
    torch.manual_seed(0)
    model = mlp([4, 16, 1], "relu")
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        params["2.weight"][0, 3] *= 1e-6
    c = potentials(infer(model), params).exp()[:-1]
    assert c[3] < 4 * c.median()


def test_a_regression_on_one_output_keeps_its_weights():
    """With every unit balanced alone these grow beyond 1e4."""
    torch.manual_seed(0)
    model = mlp([4, 32, 32, 1], "relu")
    optimizer = NFNOpt(model.parameters(), total_steps=300)
    for _ in range(300):
        x = torch.randn(64, 4)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x.square().sum(1, keepdim=True)).backward()
        optimizer.step()
    assert max(float(p.detach().abs().max()) for p in model.parameters()) < 100


@every_model
def test_the_default_sweeps_come_near_balance_whatever_the_scales(kind):
    symmetry, params = make(kind)
    g = symmetry.sample(torch.Generator().manual_seed(0), scale_range=(1e-2, 1e2))
    params = symmetry.act(g, params)
    few, many = potentials(symmetry, params), potentials(symmetry, params, sweeps=300)
    assert (few - many).abs().max() < math.log(4)


@pytest.mark.parametrize(
    "model",
    [
        lambda: mlp([784, 128, 128, 10], "relu"),
        lambda: cnn((1, 28, 28), (16, 32, 32), 10, "relu"),
        lambda: mlp([784, 128, 32, 128, 784], "relu"),
    ],
    ids=["mlp", "cnn", "autoencoder"],
)
def test_potentials_are_near_one_at_the_usual_start(model):
    """A fan-in-scaled start is balanced as it is. The default sweeps stop on the way there."""
    model = model()
    symmetry = infer(model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [s.size for s in symmetry.scales.values()]

    def means(**sweeps):
        c = potentials(symmetry, params, **sweeps).exp()[:-1]
        return torch.stack([x.mean() for x in c.split(sizes)])

    for c, low, high in ((means(), 0.5, 1.3), (means(sweeps=60), 0.9, 1.15)):
        assert low < c.min() and c.max() < high


@every_model
def test_s_is_what_potentials_do_to_weights(kind):
    """``s`` of every entry is the action of the potentials, so ``W / s`` is the balanced network."""
    symmetry, params = make(kind)
    layout = layout_of(symmetry, tuple(params), torch.device("cpu"))
    log_c = potentials(symmetry, params)
    parts = log_c.exp()[:-1].split([x.numel() for x in symmetry.identity().scales.values()])
    one = symmetry.identity()
    tables = {n: x.reshape(one.scales[n].shape) for n, x in zip(symmetry.scales, parts, strict=True)}
    acted = symmetry.act(Element(one.perms, tables), params)
    for stack, w, expected in zip(layout.stacks, layout.gather(params), layout.gather(acted), strict=True):
        s = scales(log_c, stack.row_scales, stack.col_scales)
        if s is not None:
            w = w * s
        torch.testing.assert_close(w, expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------- at the margin
def test_a_silent_unit_keeps_its_potential():
    symmetry, params = make("mlp")
    params["0.weight"][2], params["0.bias"][2], params["2.weight"][:, 2] = 0, 0, 0
    params["4.weight"][:, 3] = 0  # something comes in, nothing goes out
    c = potentials(symmetry, params).exp()
    assert c.isfinite().all() and c[2] == 1
    assert (c[:-1] > 0).all()
    g = symmetry.sample(torch.Generator().manual_seed(0), scale_range=(1e-2, 1e2))
    after = potentials(symmetry, symmetry.act(g, params)).exp()
    expected = flat(symmetry, g) * moved(symmetry, g, c[:-1])
    heard = moved(symmetry, g, torch.arange(len(c) - 1)) != 2
    torch.testing.assert_close(after[:-1][heard], expected[heard], rtol=1e-12, atol=0)
    assert after[:-1][~heard] == 1


def test_a_unit_that_nothing_enters_keeps_its_potential():
    symmetry, params = make("mlp")
    params["0.weight"][2], params["0.bias"][2] = 0, 0
    c = potentials(symmetry, params).exp()
    assert c.isfinite().all() and c[2] == 1 and (c > 0).all()


@pytest.mark.parametrize("absent", ["0.weight", "2.weight", "6.bias"])
def test_where_a_tensor_is_not_given_its_labels_have_potential_one(absent):
    """What is left of such a label's weights would tell another scale: adapters beside frozen weights begin at zero."""
    symmetry, params = make("mlp")
    touched = {"0.weight": (0, 6), "2.weight": (0, 11), "6.bias": (0, 0)}[absent]
    del params[absent]
    log_c = potentials(symmetry, params)
    zero = (log_c[:-1] == 0).nonzero().flatten().tolist()
    assert zero == list(range(*touched))


def test_statistics_and_empty_tensors_need_not_be_given():
    symmetry, params = make("cnn")
    axis = symmetry.specs["1.bias"].axes[0]
    others = {"empty": Spec((axis, Leaf(0)), ("out", "in")), "1.running_var": Spec((axis,), ("out",))}
    wider = Symmetry({**symmetry.specs, **others}, symmetry.labels, symmetry.scales)
    assert torch.equal(potentials(wider, params), potentials(symmetry, params))
    assert potentials(wider, params)[:3].abs().min() > 0


def test_weights_that_are_all_zero_have_potential_one():
    symmetry, params = make("transformer")
    c = potentials(symmetry, {n: torch.zeros_like(p) for n, p in params.items()})
    assert torch.equal(c, torch.zeros_like(c))


@pytest.mark.parametrize("model", [lambda: mlp([4, 6, 3], "tanh"), lambda: mlp([4, 6, 3], "gelu")])
def test_without_positive_scale_there_is_no_frame(model):
    model = model()
    params = {n: p.detach() for n, p in model.named_parameters()}
    assert potentials(infer(model), params) is None
    assert potentials(independent(params), params) is None
    layout = layout_of(infer(model), tuple(params), torch.device("cpu"))
    assert all(scales(None, s.row_scales, s.col_scales) is None for s in layout.stacks)


def test_signs_have_potential_one_beside_scales():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    symmetry = infer(model)
    params = {n: 3 * p.detach() for n, p in model.named_parameters()}
    log_c = potentials(symmetry, params)
    kinds = [s.kind for s in symmetry.scales.values() for _ in range(s.size)]
    assert sorted(set(kinds)) == ["positive", "sign"]
    for x, kind in zip(log_c, kinds, strict=False):
        assert (x == 0) == (kind == "sign")


def recurrent(free=True):
    """A hidden state that writes itself: one label on both sides of one tensor."""
    h = Leaf(4, "h", (("h", 1),))
    back = Leaf(4, "h", (("h", -1),))
    specs = {
        "u": Spec((h, Leaf(3)), ("out", "in")),
        "r": Spec((h, back), ("out", "in")),
        "b": Spec((h,), ("out",)),
        "v": Spec((Leaf(2), back), ("out", "in")),
    }
    return Symmetry(specs if free else {"r": specs["r"]}, {"h": Label(4)}, {"h": Scale("positive", 4, "h")})


def test_a_label_twice_in_one_tensor():
    symmetry, g = recurrent(), torch.Generator().manual_seed(0)
    params = {n: torch.randn(s.shape, generator=g, dtype=torch.float64) for n, s in symmetry.specs.items()}
    e = symmetry.sample(g, scale_range=(1e-2, 1e2))
    before, after = potentials(symmetry, params), potentials(symmetry, symmetry.act(e, params))
    expected = flat(symmetry, e).log() + moved(symmetry, e, before[:-1])
    torch.testing.assert_close(after[:-1], expected, rtol=1e-10, atol=1e-12)
    alone = recurrent(free=False)
    assert potentials(alone, {"r": params["r"]}).isfinite().all()


def test_scales_that_no_weights_tell_are_named(caplog):
    """A gain of a norm, with a scale on each of its axes: together they are known, apart they are not."""
    a, b = (Leaf(n, k, ((k, 1),)) for n, k in ((3, "rows"), (4, "columns")))
    read = Leaf(3, "rows", (("rows", -1),))
    specs = {"gain": Spec((a, b), ("out", "out")), "w": Spec((Leaf(2), read), ("out", "in"))}
    scales = {k: Scale("positive", n, k) for n, k in ((3, "rows"), (4, "columns"))}
    symmetry = Symmetry(specs, {"rows": Label(3), "columns": Label(4)}, scales)
    params = {n: torch.rand(s.shape) for n, s in specs.items()}
    assert not potentials(symmetry, params).any()
    assert "scales of rows, columns are not seen" in caplog.text
    caplog.clear()
    potentials(recurrent(), {n: torch.rand(s.shape) for n, s in recurrent().specs.items()})
    assert not caplog.text


@every_model
@pytest.mark.parametrize("zero", [False, True])
def test_gradients_through_the_potentials_are_finite(kind, zero):
    symmetry, params = make(kind)
    if zero:  # biases at zero and one dead unit
        params = {n: torch.zeros_like(p) if p.ndim == 1 else p for n, p in params.items()}
        name = next(n for n, p in params.items() if p.ndim > 1)
        params[name] = params[name].clone()
        params[name][0] = 0
    params = {n: p.requires_grad_() for n, p in params.items()}
    weight = torch.randn(len(potentials(symmetry, params)), dtype=torch.float64)
    grads = torch.autograd.grad(potentials(symmetry, params) @ weight, list(params.values()), allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)
    if not zero:
        assert any(g.abs().max() > 0 for g in grads if g is not None)


def test_potentials_run_under_vmap():
    symmetry, params = make("transformer")
    both = {n: torch.stack([p, 2 * p.roll(1, 0)]) for n, p in params.items()}
    ours = torch.func.vmap(lambda w: potentials(symmetry, w))(both)
    for i in range(2):
        torch.testing.assert_close(ours[i], potentials(symmetry, {n: p[i] for n, p in both.items()}))


def test_the_frame_does_not_grow_with_the_vocabulary():
    def log_scale(copies):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        model[0].weight = nn.Parameter(model[0].weight.repeat(copies, 1))
        return potentials(infer_symmetry(model, torch.zeros(2, 3, dtype=torch.long)), dict(model.named_parameters()))

    torch.testing.assert_close(log_scale(50), log_scale(1))
