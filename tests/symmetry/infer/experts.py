"""What an expert writes for the models of ``architectures.py``, in the notation of ``expert_notation.py``.

The tables come from reasoning about each architecture, never from the engine that they judge; the test of the tables
confirms them numerically. What they use throughout:

* a layer's units scale by what the activation lets through: ReLU a size, tanh and sin a sign, GELU and SiLU nothing;
* LayerNorm ends every scale of its input, so a residual stream before one only permutes; its gain and bias start a
  scale that the layers after it read. RMSNorm does the same but lets a sign of the whole stream through;
* the inner axis of query and key (and of value and output) permutes and scales separately in every head, heads move
  as wholes. Rotary positions keep only the scale, one for each frequency of each key head;
* a head tied to the embedding reads the stream as the embedding writes it, which leaves no scale for the last norm.
"""

from collections.abc import Callable
from functools import partial

from learned_opt.symmetry import Kind
from tests.symmetry.infer.expert_notation import Table
from tests.symmetry.infer.transformer_experts import (
    _BY_HAND,
    _HF_LAYERS,
    _HF_LLAMA,
    bert,
    encoder,
    gpt,
    gpt2,
    llama,
    mamba,
    own_transformer,
    swin,
    t5,
    vit,
)


# ------------------------------------------------------------------------------------------------- MLPs
def mlp(kind: Kind | None) -> Table:
    t = Table()
    w1, r1 = t.units("h1", kind)
    w2, r2 = t.units("h2", kind)
    t.affine("0", w1, ".")
    t.affine("2", w2, r1)
    t.affine("4", ".", r2)
    return t


def mlp_normed(norm: str) -> Table:
    """Layers 0, norm 1, ReLU, 3, ReLU, 5: the units after the norm scale through its gain and bias."""
    t = Table()
    _, r1 = t.units("h1", "positive")
    w2, r2 = t.units("h2", "positive")
    if norm == "layer":
        t.affine("0", "h1", ".")
        t.put("1.weight", "h1^h1")
        t.put("1.bias", "h1^h1")
    else:
        t.batch_norm("0", "1", "h1", ".", "^h1", bias=True, train=norm == "train")
    t.affine("3", w2, r1)
    t.affine("5", ".", r2)
    return t


def shared_layer() -> Table:
    """What the shared layer writes it also reads, so all three uses have one scale."""
    t = Table()
    written, read = t.units("h", "positive")
    t.affine("first", written, ".")
    t.affine("shared", written, read)
    t.affine("last", ".", read)
    return t


def mlp_flatten() -> Table:
    t = Table()
    written, read = t.units("h", "positive")
    t.affine("1", written, ".")
    t.affine("3", ".", read)
    return t


def mean_embedding() -> Table:
    """The mean is linear, so the embedding scales against the hidden layer; tanh lets the sign through."""
    t = Table()
    (embedded, e), (hidden, h) = t.units("e", "real"), t.units("h", "sign")
    t.put("embed.weight", ".", embedded)
    t.affine("hidden", hidden, e)
    t.affine("head", ".", h)
    return t


# -------------------------------------------------------------------------------------------- recurrent
GATES = {"lstm": ("h", "h", "h^h", "h"), "gru": ("h", "h", "h^h"), "rnn": ("h^h",)}  # as stored: ifgo, rzn


def recurrent(cell: str, layers: int, directions: int = 1) -> Table:
    """Gates permute with the units they gate; only what goes through tanh, hence the state, has a sign."""
    t = Table()
    read = "."
    for layer in range(layers):
        ends = [f"_l{layer}", f"_l{layer}_reverse"][:directions]
        for end in ends:
            h = f"h{end}"
            t.kinds[h] = "sign"
            gates = " | ".join(GATES[cell]).replace("h", h)
            t.put(f"cell.weight_ih{end}", gates, read)
            t.put(f"cell.weight_hh{end}", gates, f"{h}:6/{h}")
            t.put(f"cell.bias_ih{end}", gates)
            t.put(f"cell.bias_hh{end}", gates)
        read = " | ".join(f"h{end}:6/h{end}" for end in ends)
    t.affine("head", ".", read)
    return t


# ----------------------------------------------------------------------------------------- convolutional
def cnn_bn(train: bool) -> Table:
    t = Table()
    t.kinds |= {"a": "positive", "b": "positive"}
    t.batch_norm("0", "1", "c1", ".", "^a", bias=True, train=train)
    t.batch_norm("4", "5", "c2", "c1/a", "^b", train=train)
    t.affine("9", ".", "c2/b*4*4")
    return t


def cnn_plain() -> Table:
    t = Table()
    (w1, r1), (w2, r2) = t.units("c1", "positive"), t.units("c2", "positive")
    t.affine("0", w1, ".")
    t.affine("2", w2, r1)
    t.affine("6", ".", f"{r2}*4")
    return t


def vgg(channels: list[int | str]) -> Table:
    """Convolution, batch-norm, ReLU at positions i, i + 1, i + 2; "M" pools. Flattened over 7 x 7 positions."""
    t = Table()
    read, at = ".", 0
    for c in channels:
        if c == "M":
            at += 1
            continue
        label = f"c{at}"
        t.kinds[label] = "positive"
        t.batch_norm(f"features.{at}", f"features.{at + 1}", label, read, f"^{label}", bias=True)
        read, at = f"{label}/{label}", at + 3
    (w1, r1), (w2, r2) = t.units("f1", "positive"), t.units("f2", "positive")
    t.affine("classifier.0", w1, f"{read}*49")
    t.affine("classifier.3", w2, r1)
    t.affine("classifier.6", ".", r2)
    return t


VGG11: list[int | str] = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]


def resnet(blocks: tuple[int, ...], convolutions: int, train: bool = False) -> Table:
    """One stream per stage, tied by the shortcuts and (between ReLUs) of one size; the rest is inner."""
    t = Table()
    stream = "stem"
    t.kinds[stream] = "positive"
    t.batch_norm("conv1", "bn1", stream, ".", f"^{stream}", train=train)
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            at, read = f"layer{stage}.{block}", f"{stream}/{stream}"
            if block == 0 and (stage > 1 or convolutions == 3):
                stream = f"stage{stage}"
                t.kinds[stream] = "positive"
                t.batch_norm(f"{at}.downsample.0", f"{at}.downsample.1", stream, read, f"^{stream}", train=train)
            for i in range(1, convolutions + 1):
                label = stream if i == convolutions else f"{at}.{i}"
                t.kinds[label] = "positive"
                t.batch_norm(f"{at}.conv{i}", f"{at}.bn{i}", label, read, f"^{label}", train=train)
                read = f"{label}/{label}"
    t.affine("fc", ".", f"{stream}/{stream}")
    return t


MOBILENET = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


def mobilenet_v2() -> Table:
    """Stages (expansion, channels, blocks). ReLU6 ends scales; bottlenecks are linear, so streams have a real one."""
    t = Table()
    t.batch_norm("features.0.0", "features.0.1", "stem", ".")
    hidden, read, index = "stem", "stem", 1
    for expansion, channels, count in MOBILENET:
        stream = f"s{channels}"
        t.kinds[stream] = "real"
        for _ in range(count):
            at = f"features.{index}.conv"
            layer = 0
            if expansion > 1:
                hidden = f"{at}.hidden"
                t.batch_norm(f"{at}.0.0", f"{at}.0.1", hidden, read)
                layer = 1
            t.batch_norm(f"{at}.{layer}.0", f"{at}.{layer}.1", hidden, ".")  # depthwise: on the same units
            t.batch_norm(f"{at}.{layer + 1}", f"{at}.{layer + 2}", stream, hidden, f"^{stream}")
            read, index = f"{stream}/{stream}", index + 1
    t.batch_norm(f"features.{index}.0", f"features.{index}.1", "last", read)
    t.affine("classifier.1", ".", "last")
    return t


def convnext(depths: tuple[int, ...]) -> Table:
    """The stream of a stage ends in a LayerNorm; each block's last layer scales against its layer scale."""
    t = Table()
    t.affine("features.0.0", "s0", ".")
    t.norm("features.0.1", "s0", blocked=True)
    for stage, depth in enumerate(depths):
        stream = f"s{stage}"
        for b in range(depth):
            at = f"features.{2 * stage + 1}.{b}"
            t.kinds[at] = "real"
            t.affine(f"{at}.block.0", stream, ".")  # depthwise
            t.affine(f"{at}.block.3", f"{at}.hidden", t.norm(f"{at}.block.2", stream))
            t.affine(f"{at}.block.5", f"{stream}^{at}", f"{at}.hidden")
            t.put(f"{at}.layer_scale", f"{stream}/{at}")
        if stage + 1 < len(depths):
            at = f"features.{2 * stage + 2}"
            t.affine(f"{at}.1", f"s{stage + 1}", t.norm(f"{at}.0", stream))
    t.affine("classifier.2", ".", t.norm("classifier.0", stream))
    return t


EXPERTS: dict[str, Callable[[], Table]] = {
    "mlp_relu": partial(mlp, "positive"),
    "mlp_leaky": partial(mlp, "positive"),
    "mlp_tanh": partial(mlp, "sign"),
    "mlp_gelu": partial(mlp, None),
    "mlp_silu": partial(mlp, None),
    "mlp_linear": partial(mlp, "real"),
    "mlp_siren": partial(mlp, "sign"),
    "mlp_bn_train": partial(mlp_normed, "train"),
    "mlp_bn_eval": partial(mlp_normed, "eval"),
    "mlp_layer_norm": partial(mlp_normed, "layer"),
    "mlp_shared": shared_layer,
    "mlp_flatten": mlp_flatten,
    "mean_embedding": mean_embedding,
    "lstm": partial(recurrent, "lstm", 1),
    "lstm_bidirectional": partial(recurrent, "lstm", 2, 2),
    "gru": partial(recurrent, "gru", 2),
    "rnn_tanh": partial(recurrent, "rnn", 2),
    "cnn_bn_train": partial(cnn_bn, True),
    "cnn_bn_eval": partial(cnn_bn, False),
    "cnn_plain": cnn_plain,
    "vgg_small": partial(vgg, [8, "M", 12, "M", 16, 16, "M"]),
    "vgg11_bn": partial(vgg, VGG11),
    "resnet18": partial(resnet, (2, 2, 2, 2), 2),
    "resnet18_train": partial(resnet, (2, 2, 2, 2), 2, True),
    "resnet50": partial(resnet, (3, 4, 6, 3), 3),
    "mobilenet_v2": mobilenet_v2,
    "convnext_small": partial(convnext, (2, 1)),
    "convnext_tiny": partial(convnext, (3, 3, 9, 3)),
    "swin_small": partial(swin, (2, 1), (2, 4), 16),
    "swin_t": partial(swin, (2, 2, 6, 2), (3, 6, 12, 24), 96),
    "vit_small": partial(vit, 2, 4, 6),
    "vit_b_16": partial(vit, 12, 12, 64),
    "encoder_relu_post": partial(encoder, "positive", False),
    "encoder_gelu_pre": partial(encoder, None, True),
    "gpt_split": partial(gpt, "split"),
    "gpt_split_by_hand_tied": partial(gpt, "split", True),
    "gpt_view": partial(gpt, "view"),
    "gpt_neox": partial(gpt, "neox"),
    "own_transformer": own_transformer,
    "llama_by_hand": partial(llama, _BY_HAND, layers=["1", "2"]),
    "hf_gpt2": gpt2,
    "hf_llama": partial(llama, _HF_LLAMA, layers=_HF_LAYERS),
    "hf_qwen2": partial(llama, _HF_LLAMA, layers=_HF_LAYERS, bias=True, tied=True),
    "hf_bert": bert,
    "hf_t5": t5,
    "hf_mamba": partial(mamba, 2, 4, 32),
}
