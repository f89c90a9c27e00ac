"""The zoo of the inference tests: small models of many architectures and example inputs for each.

Every model returns one tensor, the output that counts. Batches hold two items (a batch of one hides axes), token
ids repeat, and inputs are as long as the position tables, so that every row that can be used is used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """``build`` gives the model in the mode to infer (its random state is the caller's)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    slow: bool = False
    needs: str | None = None  # a package that is not always there
    covered: float = 0.97  # the share of the weights that is on a label that moves


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def floats(*shape: int) -> Callable[[], Inputs]:
    """A function that makes one normal tensor."""
    return lambda: (torch.randn(shape, generator=generator()),)


def tokens(vocabulary: int, *lengths: int) -> Callable[[], Inputs]:
    """A function that makes token ids ``[2, length]`` for each length; ids repeat."""
    return lambda: tuple(torch.randint(vocabulary, (2, n), generator=generator()) for n in lengths)


# ------------------------------------------------------------------------------------------------ parts
class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Logits(nn.Module):
    """A Hugging Face model that takes these inputs by name, reduced to its logits."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits


def mlp(act: Callable[[], nn.Module], *norms: nn.Module) -> nn.Module:
    """10 -> 16 -> 12 -> 3, with the given norm after the first layer."""
    return nn.Sequential(
        nn.Linear(10, 16), *norms, act(), nn.Linear(16, 12), act(), nn.Linear(12, 3)
    )  # fmt: skip


class SharedLayer(nn.Module):
    """One hidden layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last(self.shared(self.shared(h).relu()).relu())


def cnn_bn(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Two convolutions with batch-norm and max-pooling, flattened."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), act(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(10 * 16, 5)),
    )


def cnn_plain() -> nn.Module:
    """Convolutions of strides 1 and 2, no norm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 5)),
    )


def cnn_groups() -> nn.Module:
    """A grouped convolution between two plain ones."""
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=3), nn.ReLU()),
        *(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def cnn_group_norm() -> nn.Module:
    """Group normalisation: channels move within groups, groups as wholes."""
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 6, 3), nn.GroupNorm(1, 6), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(4, 8, 3), nn.LeakyReLU(), nn.Conv1d(8, 6, 3, dilation=2), nn.Tanh()),
        *(nn.AvgPool1d(2), nn.Flatten(), nn.Linear(6 * 5, 3)),
    )


def conv_autoencoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)),
        *(nn.Linear(5, 6 * 16), nn.Unflatten(1, (6, 4, 4)), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 4, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, padding=1), nn.Sigmoid()),
    )


class SqueezeExcitation(nn.Module):
    """A convolution whose channels are gated by their own mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        gate = self.excite(self.squeeze(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((h * gate).mean((2, 3)))


class Mixer(nn.Module):
    """MLP-mixer: one MLP over the positions, one over the channels, in turn."""

    def __init__(self, positions: int = 6, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.positions = nn.Sequential(nn.Linear(positions, 12), nn.GELU(), nn.Linear(12, positions))
        self.channels = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.positions(self.norms[0](h).mT).mT
        return self.head((h + self.channels(self.norms[1](h))).mean(1))


class GraphConvolution(nn.Module):
    """``A (x W)`` twice with a normalised adjacency, then a sum over nodes (DeepSets where A is the identity)."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(shape)) for shape in ((5, 8), (8, 6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        a = adjacency / adjacency.sum(-1, keepdim=True)
        h = (a @ (x @ self.w1)).relu()
        return self.head((a @ (h @ self.w2)).relu().sum(1))


class MeanEmbedding(nn.Module):
    """A classifier of the mean embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids).mean(1))))


class Recurrent(nn.Module):
    """nn.LSTM, nn.GRU or nn.RNN with a head at every position."""

    def __init__(self, cell: Callable[..., nn.Module], **settings: object) -> None:
        super().__init__()
        self.cell = cell(5, 6, batch_first=True, **settings)
        self.head = nn.Linear(6 * (2 if settings.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


# ----------------------------------------------------------------------------------------- transformers
class GPTBlock(nn.Module):
    """Pre-norm block with a fused projection in one of three layouts.

    ``split``: q | k | v; ``view``: the same through an axis of 3; ``neox``: per head q | k | v.
    """

    def __init__(self, width: int, heads: int, layout: str, fused_attention: bool) -> None:
        super().__init__()
        self.heads, self.layout, self.fused_attention = heads, layout, fused_attention
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def project(self, x: Tensor) -> list[Tensor]:
        b, t, e = x.shape
        y, h = self.qkv(x), self.heads
        if self.layout == "split":
            return [z.view(b, t, h, e // h).transpose(1, 2) for z in y.split(e, dim=2)]
        if self.layout == "view":
            return [z.transpose(1, 2) for z in y.view(b, t, 3, h, e // h).unbind(2)]
        return list(y.view(b, t, h, 3 * e // h).transpose(1, 2).chunk(3, dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, e = x.shape
        q, k, v = self.project(self.ln1(x))
        if self.fused_attention:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            mask = torch.tril(torch.ones(t, t, dtype=torch.bool, device=x.device))
            y = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, e))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class GPT(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, layout: str = "split", *, tied: bool = False, fused_attention: bool = True) -> None:
        super().__init__()
        vocabulary, length, width = 11, 7, 16
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, 4, layout, fused_attention) for _ in range(2)))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.ln_f(self.blocks(x)))


class RMSNorm(nn.Module):
    """By hand, as most decoders have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, grouped queries, SwiGLU; 4 query heads on 2 key heads of 8."""

    def __init__(self, width: int = 32, hidden: int = 24) -> None:
        super().__init__()
        self.n1, self.n2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, n, bias=False) for n in (width, 16, 16, width))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    @staticmethod
    def rotate(x: Tensor) -> Tensor:
        length, half = x.shape[-2], x.shape[-1] // 2
        angle = torch.arange(length, dtype=x.dtype)[:, None] * 10.0 ** -torch.arange(half, dtype=x.dtype)
        cos, sin = angle.cos(), angle.sin()
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, e = x.shape
        h = self.n1(x)
        q, k, v = (layer(h).view(b, t, -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (z[:, :, None].expand(b, 2, 2, t, 8).reshape(b, 4, t, 8) for z in (self.rotate(k), v))
        y = F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, e))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def llama_by_hand() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 32), LlamaBlock(), LlamaBlock(), RMSNorm(32), nn.Linear(32, 11, bias=False))


def encoder(act: str, norm_first: bool) -> nn.Module:
    """nn.TransformerEncoder between two linear layers; pre-norm ones end in a norm."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, act, batch_first=True, norm_first=norm_first)
    norm = nn.LayerNorm(16) if norm_first else None
    return nn.Sequential(
        nn.Linear(5, 16), nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False), nn.Linear(16, 3)
    )


class EncoderDecoder(nn.Module):
    """nn.Transformer between embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.head = nn.Linear(5, 16), nn.Linear(4, 16), nn.Linear(16, 3)
        self.core = nn.Transformer(16, 4, 1, 1, 24, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.core(self.source(x), self.target(y)))


def own_transformer() -> nn.Module:
    from tasks.transformer import Transformer

    return Transformer(nn.Embedding(11, 16), 6, 5, width=16, heads=4, depth=2, hidden=24, causal=True, fused=False)


# ------------------------------------------------------------------------------------- torchvision, HF
def vision(name: str, *, train: bool = False, **settings: object) -> Callable[[], nn.Module]:
    """A torchvision model, untrained."""

    def build() -> nn.Module:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None, **settings)
        return model.train(train)

    return build


def small_vgg() -> nn.Module:
    """VGG at a tenth of its width, its own 7 x 7 classifier included."""
    from torchvision.models.vgg import VGG, make_layers

    model = VGG(make_layers([8, "M", 12, "M", 16, 16, "M"], batch_norm=True), num_classes=5)
    model.classifier[0] = nn.Linear(16 * 49, 24)
    model.classifier[3], model.classifier[6] = nn.Linear(24, 20), nn.Linear(20, 5)
    return model.eval()


def small_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)], layer_scale=0.5, num_classes=5).eval()


def small_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 16, [2, 1], [2, 4], [4, 4], num_classes=5).eval()


def small_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=40, num_classes=5).eval()


def hugging_face(model: str, config: str, *names: str, **settings: object) -> Callable[[], nn.Module]:
    """A Hugging Face model of a tiny random configuration."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return Logits(made.eval(), *names)

    return build


_LM = dict(vocab_size=19, hidden_size=32, num_hidden_layers=2, max_position_embeddings=8)
_DECODER = dict(_LM, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)
_T5 = dict(vocab_size=19, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8)
_SMALL, _IMAGE = floats(2, 3, 32, 32), floats(2, 3, 224, 224)


def _hf(model: str, config: str, **settings: object) -> Case:
    return Case(hugging_face(model, config, "input_ids", **settings), tokens(19, 8), needs="transformers")


def _vision(build: Callable[[], nn.Module], inputs: Callable[[], Inputs] = _SMALL, slow: bool = False) -> Case:
    return Case(build, inputs, slow, "torchvision")


def _graph() -> Inputs:
    return torch.randn(2, 4, 5, generator=generator()), torch.rand(2, 4, 4, generator=generator())


def _pair() -> Inputs:
    return torch.randn(2, 6, 5, generator=generator()), torch.randn(2, 4, 4, generator=generator())


_ROWS, _SEQUENCE, _TEXT = floats(4, 10), floats(2, 6, 5), tokens(11, 7)

CASES: dict[str, Case] = {
    "mlp_relu": Case(lambda: mlp(nn.ReLU), _ROWS),
    "mlp_leaky": Case(lambda: mlp(nn.LeakyReLU), _ROWS),
    "mlp_tanh": Case(lambda: mlp(nn.Tanh), _ROWS),
    "mlp_gelu": Case(lambda: mlp(nn.GELU), _ROWS),
    "mlp_silu": Case(lambda: mlp(nn.SiLU), _ROWS),
    "mlp_linear": Case(lambda: mlp(nn.Identity), _ROWS),
    "mlp_siren": Case(lambda: mlp(lambda: Lambda(lambda x: torch.sin(30 * x))), _ROWS),
    "mlp_bn_train": Case(lambda: mlp(nn.ReLU, nn.BatchNorm1d(16)), _ROWS),
    "mlp_bn_eval": Case(lambda: mlp(nn.ReLU, nn.BatchNorm1d(16)).eval(), _ROWS),
    "mlp_layer_norm": Case(lambda: mlp(nn.ReLU, nn.LayerNorm(16)), _ROWS),
    "mlp_shared": Case(SharedLayer, _SEQUENCE),
    "mlp_flatten": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 3)), _SEQUENCE),
    "mlp_autoencoder": Case(
        lambda: nn.Sequential(mlp(nn.ReLU), nn.ReLU(), nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 10)), _ROWS
    ),
    "cnn_bn_train": Case(cnn_bn, floats(2, 3, 16, 16)),
    "cnn_bn_eval": Case(lambda: cnn_bn().eval(), floats(2, 3, 16, 16)),
    "cnn_plain": Case(cnn_plain, floats(2, 3, 8, 8)),
    "cnn_groups": Case(cnn_groups, floats(2, 3, 8, 8)),
    "cnn_group_norm": Case(cnn_group_norm, floats(2, 3, 8, 8)),
    "conv1d": Case(conv1d, floats(2, 4, 16)),
    "conv_autoencoder": Case(conv_autoencoder, floats(2, 2, 8, 8)),
    "squeeze_excitation": Case(SqueezeExcitation, floats(2, 3, 8, 8)),
    "mixer": Case(Mixer, _SEQUENCE),
    "graph_convolution": Case(GraphConvolution, _graph),
    "mean_embedding": Case(MeanEmbedding, tokens(20, 9)),
    "lstm": Case(lambda: Recurrent(nn.LSTM), _SEQUENCE),
    "lstm_bidirectional": Case(lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), _SEQUENCE),
    "gru": Case(lambda: Recurrent(nn.GRU, num_layers=2), _SEQUENCE),
    "rnn_tanh": Case(lambda: Recurrent(nn.RNN, num_layers=2), _SEQUENCE),
    "encoder_relu_post": Case(lambda: encoder("relu", False), _SEQUENCE),
    "encoder_gelu_pre": Case(lambda: encoder("gelu", True).eval(), _SEQUENCE),
    "encoder_decoder": Case(EncoderDecoder, _pair),
    "gpt_split": Case(GPT, _TEXT),
    "gpt_split_by_hand_tied": Case(lambda: GPT(tied=True, fused_attention=False), _TEXT),
    "gpt_view": Case(lambda: GPT("view"), _TEXT),
    "gpt_neox": Case(lambda: GPT("neox", fused_attention=False), _TEXT),
    "llama_by_hand": Case(llama_by_hand, _TEXT),
    "own_transformer": Case(own_transformer, tokens(11, 6)),
    "vgg_small": _vision(small_vgg),
    "convnext_small": _vision(small_convnext),
    "swin_small": _vision(small_swin),
    "vit_small": _vision(small_vit),
    "resnet18": _vision(vision("resnet18")),
    "resnet18_train": _vision(vision("resnet18", train=True), floats(2, 3, 64, 64), slow=True),
    "resnet50": _vision(vision("resnet50"), slow=True),
    "vgg11_bn": _vision(vision("vgg11_bn"), slow=True),
    "mobilenet_v2": _vision(vision("mobilenet_v2")),
    "shufflenet_v2": _vision(vision("shufflenet_v2_x0_5"), slow=True),
    "densenet121": _vision(vision("densenet121"), slow=True),
    "efficientnet_b0": _vision(vision("efficientnet_b0"), slow=True),
    "convnext_tiny": _vision(vision("convnext_tiny"), slow=True),
    "swin_t": _vision(vision("swin_t"), floats(2, 3, 64, 64), slow=True),
    "vit_b_16": _vision(vision("vit_b_16"), _IMAGE, slow=True),
    "hf_gpt2": _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=19, n_positions=8, n_embd=16, n_layer=2, n_head=4),
    "hf_llama": _hf("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    "hf_qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", **_DECODER, tie_word_embeddings=True),
    "hf_qwen3": _hf("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=8),
    "hf_phi3": _hf("Phi3ForCausalLM", "Phi3Config", **_DECODER, pad_token_id=0),
    "hf_gpt_neox": _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_LM, num_attention_heads=4, intermediate_size=24),
    "hf_bert": _hf("BertForMaskedLM", "BertConfig", **_LM, num_attention_heads=4, intermediate_size=24),
    "hf_mamba": _hf(
        "MambaForCausalLM",
        "MambaConfig",
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        time_step_rank=2,
    ),
    "hf_mixtral": _hf("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4, num_experts_per_tok=2),
    "hf_t5": Case(
        hugging_face("T5ForConditionalGeneration", "T5Config", "input_ids", "decoder_input_ids", **_T5),
        tokens(19, 8, 6),
        needs="transformers",
    ),
}
