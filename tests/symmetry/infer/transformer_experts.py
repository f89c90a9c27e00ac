"""What an expert writes for transformers and Mamba; see ``experts.py``."""

from learned_opt.symmetry import Kind
from tests.symmetry.infer.expert_notation import Table


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
