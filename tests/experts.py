"""What an expert writes for the models of ``models.py``, in the notation of ``expert_notation.py``.

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

from expert_notation import Table

from learned_opt.symmetry import Kind


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


# ----------------------------------------------------------------------------------------- transformers
def feed_forward(t: Table, first: str, second: str, stream: str, read: str, kind: Kind | None = None) -> None:
    written, inner = t.units(f"{first}.ff", kind)
    t.affine(first, written, read)
    t.affine(second, stream, inner)


def swin(depths: tuple[int, ...], heads: tuple[int, ...], width: int) -> Table:
    """Merging concatenates four neighbours: each quarter of its norm's gain and bias scales on its own."""
    t = Table()
    stream = "s0"
    t.affine("features.0.0", stream, ".")
    t.norm("features.0.2", stream, blocked=True)
    for stage, (depth, h) in enumerate(zip(depths, heads, strict=True)):
        for b in range(depth):
            at = f"features.{2 * stage + 1}.{b}"
            d = width * 2**stage // h
            q, k, v, o = t.attention(at, h, d, d)
            t.affine(f"{at}.attn.qkv", f"{q}|{k}|{v}", t.norm(f"{at}.norm1", stream))
            t.put(f"{at}.attn.relative_position_bias_table", ".", f"{at}.heads")
            t.affine(f"{at}.attn.proj", stream, o)
            feed_forward(t, f"{at}.mlp.0", f"{at}.mlp.3", stream, t.norm(f"{at}.norm2", stream))
        if stage + 1 < len(depths):
            at = f"features.{2 * stage + 2}"
            quarters = [f"{at}.{i}" for i in range(4)]
            t.kinds |= dict.fromkeys(quarters, "real")
            t.put(f"{at}.norm.weight", "|".join(f"{stream}^{n}" for n in quarters))
            t.put(f"{at}.norm.bias", "|".join(f"{stream}^{n}" for n in quarters))
            t.affine(f"{at}.reduction", f"s{stage + 1}", "|".join(f"{stream}/{n}" for n in quarters), bias=False)
            stream = f"s{stage + 1}"
    t.affine("head", ".", t.norm("norm", stream))
    return t


def multi_head(t: Table, name: str, heads: int, size: int, stream: str, read: str) -> None:
    """nn.MultiheadAttention of one input."""
    q, k, v, o = t.attention(name, heads, size, size)
    t.put(f"{name}.in_proj_weight", f"{q}|{k}|{v}", read)
    t.put(f"{name}.in_proj_bias", f"{q}|{k}|{v}")
    t.affine(f"{name}.out_proj", stream, o)


def vit(depth: int, heads: int, size: int) -> Table:
    t = Table()
    t.affine("conv_proj", "s", ".")
    t.put("class_token", ".", ".", "s")
    t.put("encoder.pos_embedding", ".", ".", "s")
    for i in range(depth):
        at = f"encoder.layers.encoder_layer_{i}"
        multi_head(t, f"{at}.self_attention", heads, size, "s", t.norm(f"{at}.ln_1", "s"))
        feed_forward(t, f"{at}.mlp.0", f"{at}.mlp.3", "s", t.norm(f"{at}.ln_2", "s"))
    t.affine("heads.head", ".", t.norm("encoder.ln", "s"))
    return t


def encoder(kind: Kind | None, norm_first: bool) -> Table:
    """After a post-norm comes a sum that is normalised again: only the last norm of all is read linearly."""
    t = Table()
    t.affine("0", "s", ".")
    for i in range(2):
        at = f"1.layers.{i}"
        last = i == 1 and not norm_first
        reads = [t.norm(f"{at}.norm{n}", "s", blocked=not (norm_first or (last and n == 2))) for n in (1, 2)]
        first, second = reads if norm_first else ("s", "s")
        multi_head(t, f"{at}.self_attn", 4, 4, "s", first)
        feed_forward(t, f"{at}.linear1", f"{at}.linear2", "s", second, kind)
    t.affine("2", ".", t.norm("1.norm", "s") if norm_first else reads[1])
    return t


def gpt(layout: str, tied: bool = False) -> Table:
    t = Table()
    t.put("wte.weight", ".", "s")
    t.put("wpe.weight", ".", "s")
    for i in range(2):
        at = f"blocks.{i}"
        q, k, v, o = t.attention(at, 4, 4, 4)
        inner = "|".join(axis.partition("*")[2] for axis in (q, k, v))
        fused = f"{at}.heads:4*({inner})" if layout == "neox" else f"{q}|{k}|{v}"
        t.affine(f"{at}.qkv", fused, t.norm(f"{at}.ln1", "s"))
        t.affine(f"{at}.proj", "s", o)
        feed_forward(t, f"{at}.fc1", f"{at}.fc2", "s", t.norm(f"{at}.ln2", "s"))
    final = t.norm("ln_f", "s", blocked=tied)
    if not tied:
        t.affine("head", ".", final, bias=False)
    return t


def own_transformer() -> Table:
    t = Table()
    t.put("embed.weight", ".", "s")
    t.put("pos", ".", "s")
    for i in range(2):
        at = f"blocks.{i}"
        read = t.norm(f"{at}.ln1", "s")
        *qkv, o = t.attention(at, 4, 4, 4)
        for name, axis in zip("qkv", qkv, strict=True):
            t.affine(f"{at}.attn.{name}", axis, read)
        t.affine(f"{at}.attn.proj", "s", o)
        feed_forward(t, f"{at}.fc1", f"{at}.fc2", "s", t.norm(f"{at}.ln2", "s"))
    t.affine("head", ".", t.norm("ln_f", "s"))
    return t


def gpt2() -> Table:
    """Its Conv1D stores weights as [in, out]; the head is the embedding."""
    t = Table()
    at = "model.transformer"
    t.put(f"{at}.wte.weight", ".", "s")
    t.put(f"{at}.wpe.weight", ".", "s")

    def layer(name: str, out: str, read: str) -> None:
        t.put(f"{name}.weight", read, out)
        t.put(f"{name}.bias", out)

    for i in range(2):
        block = f"{at}.h.{i}"
        q, k, v, o = t.attention(block, 4, 4, 4)
        layer(f"{block}.attn.c_attn", f"{q}|{k}|{v}", t.norm(f"{block}.ln_1", "s"))
        layer(f"{block}.attn.c_proj", "s", o)
        layer(f"{block}.mlp.c_fc", f"{block}.ff", t.norm(f"{block}.ln_2", "s"))
        layer(f"{block}.mlp.c_proj", "s", f"{block}.ff")
    t.norm(f"{at}.ln_f", "s", blocked=True)
    return t


def bert() -> Table:
    """Post-norm; the transform writes what the embedding of words reads, so both are one stream."""
    t = Table()
    at = "model.bert.embeddings"
    for table in ("word", "position", "token_type"):
        t.put(f"{at}.{table}_embeddings.weight", ".", "s")
    t.norm(f"{at}.LayerNorm", "s", blocked=True)
    for i in range(2):
        at = f"model.bert.encoder.layer.{i}"
        *qkv, o = t.attention(at, 4, 8, 8)
        for name, axis in zip(("query", "key", "value"), qkv, strict=True):
            t.affine(f"{at}.attention.self.{name}", axis, "s")
        t.affine(f"{at}.attention.output.dense", "s", o)
        t.norm(f"{at}.attention.output.LayerNorm", "s", blocked=True)
        feed_forward(t, f"{at}.intermediate.dense", f"{at}.output.dense", "s", "s")
        read = t.norm(f"{at}.output.LayerNorm", "s", blocked=i == 0)
    t.affine("model.cls.predictions.transform.dense", "s", read)
    t.norm("model.cls.predictions.transform.LayerNorm", "s", blocked=True)
    return t


def rms_stream(t: Table) -> str:
    """A residual stream of which RMSNorm sees only squares: a sign for the whole stream."""
    t.kinds["sign"] = "sign"
    return "s^sign"


def llama(names: dict[str, str], *, layers: list[str], bias: bool = False, tied: bool = False) -> Table:
    """Rotary positions, 4 query heads on 2 key heads of 8, and SwiGLU, whose gate has no scale."""
    t = Table()
    stream = rms_stream(t)
    t.put(f"{names['embed']}.weight", ".", stream)
    for at in layers:

        def name(part: str, at: str = at) -> str:
            return f"{at}.{names[part]}"

        kv, group, freq, vo, ff = (f"{at}.{n}" for n in ("kv", "group", "freq", "vo", "ff"))
        t.over |= dict.fromkeys((group, freq, vo), (kv,))
        t.fixed.add(freq)
        t.kinds |= dict.fromkeys((freq, vo, ff), "real")
        read = t.norm(name("n1"), "s", bias=False) + "/sign"
        t.affine(name("q"), f"{kv}:2 * {group}:2 * ({freq}:4^{freq} | {freq}:4^{freq})", read, bias)
        t.affine(name("k"), f"{kv}:2 * ({freq}:4/{freq} | {freq}:4/{freq})", read, bias)
        t.affine(name("v"), f"{kv}:2 * {vo}:8^{vo}", read, bias)
        t.affine(name("o"), stream, f"{kv}:2 * {group}:2 * {vo}:8/{vo}", False)
        read = t.norm(name("n2"), "s", bias=False) + "/sign"
        t.affine(name("gate"), ff, read, False)
        t.affine(name("up"), f"{ff}^{ff}", read, False)
        t.affine(name("down"), stream, f"{ff}/{ff}", False)
    read = t.norm(names["norm"], "s", bias=False, blocked=tied)
    if not tied:
        t.affine(names["head"], ".", f"{read}/sign", False)
    return t


_BY_HAND = dict(embed="0", norm="3", head="4") | {n: n for n in ("n1", "n2", "q", "k", "v", "o", "gate", "up", "down")}
_HF_LLAMA = {
    **dict(embed="model.model.embed_tokens", norm="model.model.norm", head="model.lm_head"),
    **dict(n1="input_layernorm", n2="post_attention_layernorm"),
    **{n: f"self_attn.{n}_proj" for n in "qkvo"},
    **{n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}
_HF_LAYERS = ["model.model.layers.0", "model.model.layers.1"]


def t5() -> Table:
    """One embedding for both streams; relative positions tie the heads of all self-attention of a stack."""
    t = Table()
    stream = rms_stream(t)
    t.put("model.shared.weight", ".", stream)

    def attend(name: str, base: str, read: str, memory: str) -> None:
        q, k, v, o = t.attention(name, 4, 4, 4, base)
        for part, axis, source in (("q", q, read), ("k", k, memory), ("v", v, memory)):
            t.affine(f"{name}.{part}", axis, source, False)
        t.affine(f"{name}.o", stream, o, False)

    def norm(name: str) -> str:
        return t.norm(name, "s", bias=False) + "/sign"

    memory = "s"
    for stack in ("encoder", "decoder"):
        at = f"model.{stack}.block"
        t.put(f"{at}.0.layer.0.SelfAttention.relative_attention_bias.weight", ".", f"{stack}.heads")
        for i in range(2):
            read = norm(f"{at}.{i}.layer.0.layer_norm")
            attend(f"{at}.{i}.layer.0.SelfAttention", f"{stack}.heads", read, read)
            if stack == "decoder":
                read = norm(f"{at}.{i}.layer.1.layer_norm")
                attend(f"{at}.{i}.layer.1.EncDecAttention", f"{at}.{i}.cross", read, memory)
            last = f"{at}.{i}.layer.{1 if stack == 'encoder' else 2}"
            written, inner = t.units(f"{last}.ff", "positive")
            t.affine(f"{last}.DenseReluDense.wi", written, norm(f"{last}.layer_norm"), False)
            t.affine(f"{last}.DenseReluDense.wo", stream, inner, False)
        if stack == "encoder":
            memory = norm("model.encoder.final_layer_norm")
    t.norm("model.decoder.final_layer_norm", "s", bias=False, blocked=True)
    return t


def mamba(rank: int, states: int, inner: int) -> Table:
    """Units of the convolution and of the gate multiply, hence one label.

    The input projection of the convolved half scales against the (depthwise) convolution. The step's low rank is
    linear; states permute, and what B writes into a state C reads.
    """
    t = Table()
    stream = rms_stream(t)
    t.put("model.backbone.embeddings.weight", ".", stream)
    for i in range(2):
        at = f"model.backbone.layers.{i}"
        m = f"{at}.mixer"
        u, step, state = f"{at}.u", f"{at}.step", f"{at}.state"
        t.kinds |= dict.fromkeys((u, step, state), "real")
        read = t.norm(f"{at}.norm", "s", bias=False) + "/sign"
        t.affine(f"{m}.in_proj", f"{u}:{inner}^{u} | {u}", read, False)
        t.put(f"{m}.conv1d.weight", f"{u}/{u}")
        t.put(f"{m}.conv1d.bias", u)
        t.affine(f"{m}.x_proj", f"{step}:{rank}^{step} | {state}:{states}^{state} | {state}/{state}", u, False)
        t.affine(f"{m}.dt_proj", u, f"{step}/{step}")
        t.put(f"{m}.A_log", u, state)
        t.put(f"{m}.D", u)
        t.affine(f"{m}.out_proj", stream, u, False)
    t.norm("model.backbone.norm_f", "s", bias=False, blocked=True)
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
