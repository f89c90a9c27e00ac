"""Symmetries of known architectures: what an expert writes down, and nothing finer holds."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from learned_opt.architectures import from_model, sequential, transformer
from learned_opt.symmetry import Axis, Leaf, Prod, Scale, Spec, Sum, Symmetry, SymmetryError
from tasks.mlp import Sin
from tasks.transformer import Transformer

torch.set_num_threads(1)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def kinds(symmetry: Symmetry) -> dict[str, str]:
    return {name: scale.kind for name, scale in symmetry.scales.items()}


def labels(symmetry: Symmetry) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {name: (label.size, label.over) for name, label in symmetry.labels.items()}


# -------------------------------------------------------------------------------- the architectures
def mlp(*activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), *activation, nn.Linear(8, 6), *activation, nn.Linear(6, 3))


def cnn(activation: nn.Module, pool: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), activation, pool, nn.Conv2d(6, 5, 3), activation,
        nn.Flatten(), nn.Linear(5 * 2 * 2, 7), activation, nn.Linear(7, 3),
    )  # fmt: skip


def norm_cnn(**options: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, **options),
        nn.ReLU(), nn.AvgPool2d(2),
        nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, **options), nn.Tanh()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def char_lm(activation: str = "gelu", *, fused: bool = True, bias: bool = True, depth: int = 2) -> Transformer:
    model = Transformer(
        nn.Embedding(11, 12), 5, 11, width=12, heads=3, depth=depth, hidden=10,
        activation=activation, causal=True, fused=fused,
    )  # fmt: skip
    return model if bias else without_bias(model)


def vit(activation: str = "relu", *, fused: bool = False, bias: bool = True) -> Transformer:
    model = Transformer(
        nn.Linear(6, 12), 5, 4, width=12, heads=3, depth=2, hidden=10,
        activation=activation, causal=False, fused=fused,
    )  # fmt: skip
    return model if bias else without_bias(model)


def without_bias(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias = None
    return model


def tied_lm() -> Transformer:
    model = char_lm(depth=1)
    model.head.weight = model.embed.weight
    return model


IMAGE, VECTOR, TEXT, PATCHES = normal(4, 2, 8, 8), normal(9, 5), tokens(11, 3, 5), normal(4, 5, 6)
depthwise = nn.Sequential(
    nn.Conv2d(2, 6, 1), nn.LeakyReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 3, 1)
)
decoder = nn.Sequential(nn.ConvTranspose2d(2, 6, 2, stride=2), nn.Tanh(), nn.ConvTranspose2d(6, 1, 2, stride=2))
conv1d = nn.Sequential(
    nn.Conv1d(5, 6, 2),
    nn.BatchNorm1d(6),
    nn.Softplus(),
    nn.MaxPool1d(2),
    nn.Flatten(),
    nn.Linear(24, 3),
)
norm_mlp = nn.Sequential(
    nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.0),
    nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Identity(), nn.Linear(6, 3), nn.Softmax(-1),
)  # fmt: skip
sequence = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
BLOCK = {"ln1": "real", "qk": "real", "vo": "real", "ln2": "real"}


def of_blocks(count: int, **scales: str) -> dict[str, str]:
    return {f"blocks.{i}.{n}": k for i in range(count) for n, k in {**BLOCK, **scales}.items()}


# name -> (model, input, the permutation labels, the scales' kinds): what an expert writes down
CASES: dict[str, tuple[nn.Module, Tensor, set[str], dict[str, str]]] = {
    "mlp relu": (mlp(nn.ReLU()), VECTOR, {"0", "2"}, {"0": "positive", "2": "positive"}),
    "mlp leaky": (mlp(nn.LeakyReLU(0.1)), VECTOR, {"0", "2"}, {"0": "positive", "2": "positive"}),
    "mlp prelu": (mlp(nn.PReLU()), VECTOR, {"0", "2"}, {"0": "positive", "2": "positive"}),
    "mlp tanh": (mlp(nn.Tanh()), VECTOR, {"0", "2"}, {"0": "sign", "2": "sign"}),
    "mlp sin": (mlp(Sin()), VECTOR, {"0", "2"}, {"0": "sign", "2": "sign"}),
    "mlp hardtanh": (mlp(nn.Hardtanh()), VECTOR, {"0", "2"}, {"0": "sign", "2": "sign"}),
    "mlp relu6": (mlp(nn.ReLU6()), VECTOR, {"0", "2"}, {}),
    "mlp gelu": (mlp(nn.GELU()), VECTOR, {"0", "2"}, {}),
    "mlp softmax": (mlp(nn.Softmax(-1)), VECTOR, {"0", "2"}, {}),
    "mlp linear": (mlp(), VECTOR, {"0", "1"}, {"0": "real", "1": "real"}),
    "mlp tanh relu": (mlp(nn.Tanh(), nn.ReLU()), VECTOR, {"0", "3"}, {}),
    "mlp leaky relu": (
        mlp(nn.LeakyReLU(), nn.ReLU()), VECTOR, {"0", "3"}, {"0": "positive", "3": "positive"},
    ),
    "mlp norms": (norm_mlp, VECTOR, {"0", "4"}, {"1": "positive", "5": "real"}),
    "cnn relu max": (
        cnn(nn.ReLU(), nn.MaxPool2d(2)), IMAGE, {"0", "3", "6"},
        {"0": "positive", "3": "positive", "6": "positive"},
    ),
    "cnn leaky avg": (
        cnn(nn.LeakyReLU(), nn.AvgPool2d(2)), IMAGE, {"0", "3", "6"},
        {"0": "positive", "3": "positive", "6": "positive"},
    ),
    "cnn tanh avg": (
        cnn(nn.Tanh(), nn.AvgPool2d(2)), IMAGE, {"0", "3", "6"},
        {"0": "sign", "3": "sign", "6": "sign"},
    ),
    "cnn tanh max": (
        cnn(nn.Tanh(), nn.MaxPool2d(2)), IMAGE, {"0", "3", "6"}, {"3": "sign", "6": "sign"},
    ),
    "cnn gelu max": (cnn(nn.GELU(), nn.MaxPool2d(2)), IMAGE, {"0", "3", "6"}, {}),
    "cnn batchnorm": (norm_cnn(), IMAGE, {"0", "4.0"}, {"1": "positive", "4.1": "sign"}),
    "cnn batchnorm eval": (
        norm_cnn().eval(), IMAGE, {"0", "4.0"}, {"1": "positive", "4.1": "sign"},
    ),
    "cnn batchnorm without statistics": (
        norm_cnn(track_running_stats=False), IMAGE, {"0", "4.0"}, {"1": "positive", "4.1": "sign"},
    ),
    "cnn batchnorm without affine": (norm_cnn(affine=False).eval(), IMAGE, {"0", "4.0"}, {}),
    "cnn depthwise": (depthwise, IMAGE, {"0"}, {"0": "positive", "2": "positive"}),
    "cnn transposed": (decoder, IMAGE, {"0"}, {"0": "sign"}),
    "cnn 1d": (conv1d, normal(4, 5, 9), {"0"}, {}),
    "positions flattened": (sequence, TEXT, {"0", "1"}, {"0": "real", "1": "sign"}),
    **{
        f"transformer {name}": (
            model, x,
            {"stream", *(f"blocks.{i}.{n}" for i in range(2) for n in ("heads", "qk", "vo", "ff"))},
            {**of_blocks(2, **ff), "ln_f": "real"},
        )
        for name, model, x, ff in (
            ("lm gelu fused", char_lm(), TEXT, {}),
            ("lm relu separate", char_lm("relu", fused=False), TEXT, {"ff": "positive"}),
            ("lm relu fused no bias", char_lm("relu", bias=False), TEXT, {"ff": "positive"}),
            ("vit relu separate", vit(), PATCHES, {"ff": "positive"}),
            ("vit gelu fused", vit("gelu", fused=True), PATCHES, {}),
            ("vit gelu separate no bias", vit("gelu", bias=False), PATCHES, {}),
        )
    },
    "transformer lm tied": (
        tied_lm(), TEXT, {"stream", *(f"blocks.0.{n}" for n in ("heads", "qk", "vo", "ff"))},
        of_blocks(1),
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_labels_and_kinds_are_the_experts(case: str) -> None:
    model, _, expected_labels, expected_kinds = CASES[case]
    symmetry = from_model(model)
    assert set(symmetry.labels) == expected_labels
    assert kinds(symmetry) == expected_kinds


@cases
def test_the_function_does_not_change(case: str) -> None:
    model, x, *_ = CASES[case]
    symmetry = from_model(model)
    assert set(dict(model.named_parameters())) <= set(symmetry.specs)
    assert set(symmetry.specs) <= set(model.state_dict())
    assert symmetry.check(model, x) <= 1e-12


# ---------------------------------------------------------------------- the converse: nothing finer
def mapped(axis: Axis, change) -> Axis:
    """The axis with ``change`` applied to each leaf."""
    if isinstance(axis, Prod):
        return Prod(tuple(mapped(a, change) for a in axis.factors))
    if isinstance(axis, Sum):
        return Sum(tuple(mapped(a, change) for a in axis.parts))
    return change(axis)


def altered(symmetry: Symmetry, change, names: set[str] | None = None, **groups) -> Symmetry:
    """The symmetry with ``change`` applied to each leaf of the named tensors; more groups."""
    specs = dict(symmetry.specs)
    for n in specs if names is None else names:
        axes = tuple(mapped(a, change) for a in specs[n].axes)
        specs[n] = replace(specs[n], axes=axes)
    made = {key: {**getattr(symmetry, key), **groups.get(key, {})} for key in ("labels", "scales")}
    return Symmetry(specs, **made)


def leaves(symmetry: Symmetry, name: str) -> list[Leaf]:
    found: list[Leaf] = []
    for axis in symmetry.specs[name].axes:
        mapped(axis, lambda leaf: found.append(leaf) or leaf)
    return found


BEFORE_BATCHNORM = {
    "cnn batchnorm": "4.0.bias",
    "cnn batchnorm without statistics": "4.0.bias",
    "cnn 1d": "0.bias",
    "mlp norms": "4.bias",
}


def has_no_effect(case: str, model: nn.Module, name: str) -> bool:
    """Tensors that do not matter, so that anything may be done to them.

    A key's bias shifts all scores of a query alike; batch statistics take out a bias and are used
    in place of the running ones.
    """
    unused = model.training and "running" in name
    return unused or name.endswith("attn.k.bias") or BEFORE_BATCHNORM.get(case) == name


@cases
def test_every_permutation_is_needed_everywhere(case: str) -> None:
    """Relabel one tensor alone (its fibres with it): no occurrence of a label is free."""
    model, x, *_ = CASES[case]
    plain = altered(from_model(model), lambda leaf: replace(leaf, scale=()))  # permutations only
    used = {name: {leaf.label for leaf in leaves(plain, name)} for name in plain.specs}
    for name in plain.specs:
        for label in used[name] - {None}:
            if sum(label in u for u in used.values()) == 1:
                continue  # q and k in one tensor without bias: see the test of fused projections
            freed = {n: f"{n}'" for n, g in plain.labels.items() if label in (n, *g.over)}

            def fresh(leaf: Leaf, freed: dict = freed) -> Leaf:
                return replace(leaf, label=freed.get(leaf.label, leaf.label))

            new = {
                freed[n]: replace(g, over=tuple(freed.get(b, b) for b in g.over))
                for n, g in plain.labels.items()
                if n in freed
            }
            error = altered(plain, fresh, {name}, labels=new).check(model, x)
            if has_no_effect(case, model, name):
                assert error < 1e-12
            else:
                assert error > 1e-3, f"{label} of {name} may move alone"


@cases
def test_every_scale_is_needed_everywhere(case: str) -> None:
    """Leave one tensor out of a scale: no occurrence is free."""
    model, x, *_ = CASES[case]
    full = from_model(model)
    for name in full.specs:
        exponents = {s for leaf in leaves(full, name) for s in leaf.scale}
        for scale in {s for s, _ in exponents}:
            if {(scale, 1), (scale, -1)} <= exponents:
                continue  # q and k in one tensor: see the test of fused projections

            def dropped(leaf: Leaf, scale: str = scale) -> Leaf:
                return replace(leaf, scale=tuple(s for s in leaf.scale if s[0] != scale))

            error = altered(full, dropped, {name}).check(model, x)
            if has_no_effect(case, model, name):
                assert error < 1e-12
            else:
                assert error > 1e-3, f"{name} need not scale by {scale}"


@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_keys_of_a_fused_projection_move_together(bias: bool) -> None:
    model = char_lm(depth=1, bias=bias)
    full = transformer(model)
    names = {n for n in full.specs if ".qkv." in n}

    def relabelled(leaf: Leaf) -> Leaf:  # queries have exponent +1, keys -1
        keys = leaf.scale == (("blocks.0.qk", -1),)
        return replace(leaf, label="keys" if keys else leaf.label, scale=())

    def queries_only(leaf: Leaf) -> Leaf:
        return replace(leaf, scale=tuple(s for s in leaf.scale if s != ("blocks.0.qk", -1)))

    labels = {"keys": full.labels["blocks.0.qk"]}
    assert altered(full, relabelled, names, labels=labels).check(model, TEXT) > 1e-3
    assert altered(full, queries_only, names).check(model, TEXT) > 1e-3


@cases
def test_no_scale_is_of_a_larger_kind(case: str) -> None:
    model, x, *_ = CASES[case]
    full = from_model(model)
    for name, scale in full.scales.items():
        if scale.kind != "real":
            larger = altered(full, lambda leaf: leaf, scales={name: replace(scale, kind="real")})
            assert larger.check(model, x) > 1e-3, f"{name} is of kind real"


@pytest.mark.parametrize("kind", ["positive", "sign"])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU6(), nn.Softmax(-1)])
def test_no_scale_where_none_is_claimed(activation: nn.Module, kind: str) -> None:
    model = nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 3))
    symmetry = from_model(model)

    def scaled(exponent: int):
        return lambda leaf: replace(leaf, scale=(("s", exponent),)) if leaf.label == "0" else leaf

    scales = {"s": Scale(kind, 8, "0")}
    claim = altered(symmetry, scaled(1), {"0.weight", "0.bias"}, scales=scales)
    claim = altered(claim, scaled(-1), {"2.weight"})
    assert claim.check(model, 5 * VECTOR) > 1e-3  # beyond the corner of ReLU6


def test_a_tied_head_leaves_the_last_norm_no_scale() -> None:
    model, untied = tied_lm(), char_lm(depth=1)
    symmetry, claim = transformer(model), transformer(untied)
    assert symmetry.specs["embed.weight"].roles == ("lookup", "out")
    assert "head.weight" not in symmetry.specs
    del claim.specs["head.weight"]
    assert claim.check(model, TEXT) > 1e-3


# ---------------------------------------------------------------------------------- the exact specs
def test_specs_of_a_cnn() -> None:
    text = str(sequential(cnn(nn.ReLU(), nn.MaxPool2d(2))))
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "0.weight 6 x 2 x 3 x 3 [0:6+, 2, 3, 3]",
        "0.bias 6 [0:6+]",
        "3.weight 5 x 6 x 3 x 3 [3:5+, 0:6-, 3, 3]",
        "6.weight 7 x 20 [6:7+, (3:5- * 4)]",
        "8.weight 3 x 7 [3, 6:7-]",
        "8.bias 3 [3]",
    } <= rows


def test_specs_of_batchnorm_and_depthwise() -> None:
    symmetry = sequential(norm_cnn())
    unit, gain = Leaf(6, "0"), Leaf(6, "0", (("1", 1),))
    assert symmetry.specs["0.weight"].axes[0] == unit
    assert (symmetry.specs["1.weight"].axes, symmetry.specs["1.weight"].roles) == (
        (gain,),
        ("gain",),
    )
    assert symmetry.specs["1.bias"] == Spec((gain,), ("out",))
    assert symmetry.specs["1.running_var"].axes == (unit,)
    assert symmetry.specs["4.0.weight"].axes[1] == Leaf(6, "0", (("1", -1),))
    weight = sequential(depthwise).specs["2.weight"]
    assert weight.axes[:2] == (Leaf(6, "0", (("2", 1), ("0", -1))), Leaf(1))


def test_specs_of_a_transformer_block() -> None:
    symmetry = transformer(char_lm("relu"))
    assert labels(symmetry)["stream"] == (12, ())
    assert labels(symmetry)["blocks.1.heads"] == (3, ())
    assert labels(symmetry)["blocks.1.qk"] == (4, ("blocks.1.heads",))
    assert labels(symmetry)["blocks.1.ff"] == (10, ())
    text = {" ".join(line.split()) for line in str(symmetry).splitlines()}
    fused = "(heads:3 * qk:4+ | heads:3 * qk:4- | heads:3 * vo:4+)"
    assert {
        "embed.weight 11 x 12 [11, stream:12]",
        "pos 5 x 12 [5, stream:12]",
        "ln1.{weight,bias} 12 [stream:12 ln1+]",
        f"attn.qkv.weight 36 x 12 [{fused}, stream:12 ln1-]",
        f"attn.qkv.bias 36 [{fused}]",
        "attn.proj.weight 12 x 12 [stream:12, (heads:3 * vo:4-)]",
        "attn.proj.bias 12 [stream:12]",
        "fc1.weight 10 x 12 [ff:10+, stream:12 ln2-]",
        "fc2.weight 12 x 10 [stream:12, ff:10-]",
        "head.weight 11 x 12 [11, stream:12 ln_f-]",
        "head.bias 11 [11]",
    } <= text
    assert symmetry.specs["embed.weight"].roles == symmetry.specs["pos"].roles == ("lookup", "out")
    assert transformer(vit()).specs["embed.weight"].roles == ("out", "in")


# ------------------------------------------------------------------------- sound where it is unsure
class Reverse(nn.Module):
    """Unknown, without parameters, and not alike for all units."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


twice = nn.Linear(6, 6)
relu = nn.ReLU()
grouped = nn.Conv2d(6, 4, 1, groups=2)
normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))


def chain(*modules: nn.Module | tuple[int, int]) -> nn.Sequential:
    """A chain; pairs are linear maps."""
    return nn.Sequential(*(nn.Linear(*m) if isinstance(m, tuple) else m for m in modules))


# name -> (model, input, the labels that are left)
UNSURE: dict[str, tuple[nn.Module, Tensor, set[str]]] = {
    "unknown": (chain((5, 6), Reverse(), (6, 4), relu, (4, 2)), VECTOR, {"2"}),
    "unknown with parameters": (chain((5, 6), nn.PReLU(6), (6, 2)), VECTOR, set()),
    "residual": (chain((5, 6), Residual(nn.Linear(6, 6), relu), (6, 2)), VECTOR, set()),
    "layer twice": (chain((5, 6), relu, twice, relu, twice, relu, (6, 2)), VECTOR, set()),
    "activation twice": (chain((5, 6), relu, (6, 4), relu, (4, 2)), VECTOR, {"0", "2"}),
    "grouped": (
        chain(nn.Conv2d(2, 6, 1), relu, grouped, relu, nn.Conv2d(4, 3, 1)), IMAGE, set(),
    ),
    "along the width": (chain(nn.Conv2d(2, 8, 1), relu, (8, 4), relu, (4, 2)), IMAGE, {"2"}),
    "pooled features": (chain((6, 8), relu, nn.MaxPool1d(2), (4, 2)), PATCHES, set()),
    "norm after flatten": (
        chain(nn.Conv2d(2, 3, 5), nn.Flatten(), nn.LayerNorm(48), (48, 2)), IMAGE, set(),
    ),
    "group norm": (
        chain(nn.Conv2d(2, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 3, 1)), IMAGE, set(),
    ),
    "partial flatten": (chain(nn.Conv2d(2, 6, 1), nn.Flatten(2), (64, 3)), IMAGE, set()),
    "input norm": (chain(nn.BatchNorm1d(5), (5, 6), relu, (6, 2)), VECTOR, {"1"}),
    "weight norm": (chain(normed, relu, (6, 2)), VECTOR, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSURE)
def test_what_is_not_known_stays_fixed(case: str) -> None:
    model, x, expected = UNSURE[case]
    symmetry = from_model(model)
    assert set(symmetry.labels) == expected
    symmetry.validate(dict(model.named_parameters()))
    assert symmetry.check(model, x) <= 1e-12


def test_constant_positions_fix_the_stream() -> None:
    model = char_lm()
    pos = model.pos.detach() + 1
    del model.pos
    model.register_buffer("pos", pos)
    symmetry = transformer(model)
    assert "stream" not in symmetry.labels and "pos" not in symmetry.specs
    assert kinds(symmetry)["ln_f"] == "real"
    assert symmetry.check(model, TEXT) <= 1e-12


def test_an_unknown_activation_fixes_the_hidden_units() -> None:
    model = char_lm(depth=1)
    model.blocks[0].act = Reverse()
    symmetry = transformer(model)
    assert "blocks.0.ff" not in symmetry.labels
    assert symmetry.check(model, TEXT) <= 1e-12


def test_a_transformer_with_other_parts_is_refused() -> None:
    extra = char_lm()
    extra.blocks[0].attn.q_norm = nn.LayerNorm(4)
    with pytest.raises(SymmetryError, match="blocks.0.attn.q_norm.weight.*no place"):
        transformer(extra)
    rotary = char_lm()
    del rotary.pos
    with pytest.raises(SymmetryError, match="Transformer has no pos"):
        transformer(rotary)
    rms = char_lm()
    rms.blocks[1].ln2 = nn.RMSNorm(12)
    with pytest.raises(SymmetryError, match="blocks.1.ln2 is RMSNorm"):
        transformer(rms)
    grouped = char_lm(fused=False)
    grouped.blocks[0].attn.k = grouped.blocks[0].attn.v = nn.Linear(12, 4)
    with pytest.raises(SymmetryError, match=r"blocks.0.attn: widths \[12, 4, 4\]"):
        transformer(grouped)


# --------------------------------------------------------------------------------------- from_model
class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


@pytest.mark.parametrize(("net", "x"), [(mlp(nn.ReLU()), VECTOR), (vit(), PATCHES)])
def test_a_wrapper_prefixes_the_names(net: nn.Module, x: Tensor) -> None:
    model = Wrapper(Wrapper(net))
    symmetry = from_model(model)
    assert set(symmetry.specs) == set(dict(model.named_parameters()))
    assert kinds(symmetry) == kinds(from_model(net))
    assert symmetry.check(model, x) <= 1e-12


@pytest.mark.parametrize("model", [nn.LSTM(3, 4), Residual(nn.Linear(4, 4)), nn.Bilinear(2, 3, 4)])
def test_other_models_get_independent_axes_and_a_log_line(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="learned_opt.architectures"):
        symmetry = from_model(model)
    assert "independent" in caplog.text and type(model).__name__ in caplog.text
    symmetry.validate(dict(model.named_parameters()))
    axes = [a for s in symmetry.specs.values() for a in s.axes]
    used = [a.label for a in axes if a.label is not None]
    assert len(used) == len(set(used)) > 0


def test_a_refused_transformer_falls_back_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = char_lm()
    model.scale = nn.Parameter(torch.ones(12))
    with caplog.at_level(logging.INFO, logger="learned_opt.architectures"):
        symmetry = from_model(model)
    assert "scale" in caplog.text
    assert "stream" not in symmetry.labels
    symmetry.validate(dict(model.named_parameters()))
