"""More of the zoo: networks on graphs, of experts, with memory, spectral ones, and operators in combination."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.symmetry.infer import parts as z
from tests.symmetry.infer.architectures import Case, floats, tokens

_ROWS, _SEQUENCE, _IMAGES = floats(6, 10), floats(2, 6, 5), floats(2, 3, 8, 8)
_A, _C = z.linear(5, 8), z.linear(8, 3)
_E: Mapping[str, Any] = {
    "a": z.linear(10, 8),
    "router": z.linear(8, 4),
    "up": (4, 8, 6),
    "down": (4, 6, 8),
    "c": z.linear(8, 3),
}

MORE: dict[str, Case] = {
    # graphs
    "graph_index_add": Case(z.of(z.index_add, a=_A, b=z.linear(8, 8), c=_C), z.edges),
    "graph_scatter_add": Case(z.of(z.scatter_add, a=_A, b=z.linear(8, 8), c=_C), z.edges),
    "graph_scatter_mean": Case(z.of(z.scatter_reduced("mean"), a=_A, b=z.linear(8, 8), c=_C), z.edges),
    "graph_scatter_max": Case(z.of(z.scatter_reduced("amax"), a=_A, b=z.linear(8, 8), c=_C), z.edges),
    "graph_index_reduce": Case(z.of(z.index_reduced, a=_A, b=z.linear(8, 8), c=_C), z.edges),
    "graph_attention": Case(
        z.of(z.graph_attention, a=z.linear(5, 12), left=(2, 6), right=(2, 6), c=z.linear(12, 3)), z.edges
    ),
    "graph_gated": Case(z.of(z.gated_graph, a=_A, b=z.linear(8, 7), cell=lambda: nn.GRUCell(7, 8), c=_C), z.edges),
    "graph_messages": Case(z.of(z.message_passing, a=_A, edge=z.linear(16, 6), c=z.linear(14, 3)), z.edges),
    "graph_degrees": Case(z.of(z.degree_scaled, a=_A, c=_C), z.edges, covered=0.95),
    "segment_mean": Case(z.of(z.segments, a=z.linear(10, 8), c=_C), _ROWS),
    # experts
    "experts_switch": Case(z.of(z.switch, **_E), _ROWS),
    "experts_top_two": Case(z.of(z.top_two, **_E), _ROWS),
    "experts_sorted": Case(z.of(z.sorted_experts, **{**_E, "down": z.linear(6, 8)}), _ROWS),
    "experts_dense": Case(
        z.of(
            z.dense_mixture,
            router=z.linear(10, 3),
            c=_C,
            experts=lambda: nn.ModuleList(nn.Linear(10, 8) for _ in range(3)),
        ),
        _ROWS,
        covered=0.85,
    ),
    # memory
    "cells_lstm": Case(z.unrolled(nn.LSTMCell), _SEQUENCE),
    "cells_gru": Case(z.unrolled(nn.GRUCell), _SEQUENCE),
    "cells_rnn": Case(z.unrolled(nn.RNNCell), _SEQUENCE, covered=0.95),
    "cells_rnn_relu": Case(z.unrolled(lambda i, h: nn.RNNCell(i, h, nonlinearity="relu")), _SEQUENCE, covered=0.95),
    "packed_lstm": Case(z.packed(nn.LSTM, True), z.with_lengths(6, 4, 3)),
    "packed_gru_unsorted": Case(z.packed(nn.GRU, False, num_layers=2), z.with_lengths(3, 6, 4)),
    "packed_lstm_bidirectional": Case(z.packed(nn.LSTM, False, bidirectional=True), z.with_lengths(3, 6, 4)),
    "packed_last_state": Case(
        z.of(z.last_state, cell=lambda: nn.LSTM(5, 6, batch_first=True), c=z.linear(6, 3)), z.with_lengths(3, 6, 4)
    ),
    "highway": Case(z.of(z.highway, a=z.linear(10, 8), gate=z.linear(8, 8), b=z.linear(8, 8), c=_C), _ROWS),
    "written_step_by_step": Case(z.of(z.written_step_by_step, a=_A, b=z.linear(8, 8), c=_C), _SEQUENCE),
    "state_space": Case(z.of(z.state_space, a=_A, log_decay=(8,), c=_C), _SEQUENCE, covered=0.95),
    "lstm_two_layers_dropout": Case(
        z.of(
            lambda m, x: m.c(m.r(x)[0]),
            r=lambda: nn.LSTM(5, 6, 2, batch_first=True, dropout=0.2).eval(),
            c=z.linear(6, 3),
        ),
        _SEQUENCE,
    ),
    # spectra
    "fnet": Case(
        z.of(z.fnet, a=_A, norm=lambda: nn.LayerNorm(8), up=z.linear(8, 12), down=z.linear(12, 8), c=_C), _SEQUENCE
    ),
    "neural_operator": Case(
        z.of(z.neural_operator, a=_A, b=z.linear(8, 8), weight=(8, 8, 3, 2), c=_C), _SEQUENCE, covered=0.9
    ),
    "global_filter": Case(
        z.of(
            z.global_filter,
            a=lambda: nn.Conv2d(3, 6, 3, padding=1),
            real=(6, 8, 5),
            imaginary=(6, 8, 5),
            c=z.linear(6, 3),
        ),
        _IMAGES,
    ),
    # attention
    "masked_encoder": Case(
        z.of(z.masked_encoder, a=z.linear(5, 16), core=z.encoder_core, c=z.linear(16, 3)), _SEQUENCE
    ),
    "encoder_with_given_mask": Case(
        z.of(z.given_mask, a=z.linear(5, 16), core=z.encoder_core, c=z.linear(16, 3)), z.with_mask
    ),
    "padded_encoder": Case(
        z.of(z.padded_encoder, a=z.linear(5, 16), core=z.encoder_core, c=z.linear(16, 3)), z.with_padding
    ),
    "masked_transformer": Case(
        z.of(z.transformer, a=z.linear(5, 16), b=z.linear(4, 16), core=z.transformer_core, c=z.linear(16, 3)),
        z.two_sequences,
    ),
    "linear_attention": Case(z.of(z.linear_attention, qkv=z.linear(5, 24), c=_C), _SEQUENCE),
    "attention_by_ellipsis": Case(z.of(z.heads_by_einsum, q=_A, k=_A, v=_A, c=_C), _SEQUENCE),
    "relative_positions": Case(
        z.of(z.relative_positions, qkv=z.linear(5, 24), table=lambda: nn.Embedding(11, 4), c=_C), _SEQUENCE
    ),
    "attention_pooling": Case(z.of(z.pooled_by_attention, a=_A, query=(8,), v=_A, c=_C), _SEQUENCE),
    "perceiver": Case(z.of(z.perceiver, latent=(4, 7), q=z.linear(7, 8), k=_A, v=_A, c=_C), _SEQUENCE),
    # weights of weights
    "dora": Case(lambda: nn.Sequential(z.DoRA(10, 12), nn.ReLU(), z.DoRA(12, 3)), _ROWS),
    "hypernetwork": Case(z.of(z.hyper, code=(5,), make=z.linear(5, 80), c=_C), _ROWS),
    "normalised_weights": Case(z.of(z.normalised_weights, w=(8, 10), c=_C), _ROWS),
    "standardised_weights": Case(z.of(z.standardised_weights, w=(8, 3, 3, 3), c=_C), _IMAGES),
    "cosine_classifier": Case(z.of(z.cosine_classifier, a=z.linear(10, 8), prototypes=(4, 8)), _ROWS),
    "distances": Case(z.of(z.distances, a=z.linear(10, 8), prototypes=(4, 8)), _ROWS),
    "radial_basis": Case(z.of(z.radial, centres=(8, 10), width=(8,), c=_C), _ROWS),
    "product_of_three": Case(
        z.of(z.product_of_sums, a=z.linear(10, 8), b=z.linear(10, 8), d=z.linear(10, 8), c=_C), _ROWS
    ),
    "tucker": Case(z.of(z.factorised, left=(5, 4), right=(5, 6), core=(4, 6, 8), c=_C), _ROWS),
    "bilinear": Case(
        z.of(lambda m, x: m.c(m.b(x[:, :4], x[:, 4:]).relu()), b=lambda: nn.Bilinear(4, 6, 8), c=_C), _ROWS
    ),
    # others
    "patches": Case(z.of(z.rearranged, a=z.linear(12, 8), c=_C), _IMAGES),
    "vae": Case(z.of(z.vae, a=z.linear(10, 8), encode=z.linear(8, 10), decode=z.linear(5, 8), c=_C), _ROWS),
    "quantised": Case(z.of(z.quantised, a=z.linear(10, 8), codes=(4, 8), table=(4, 3), c=_C), _ROWS, covered=0.9),
    "unet": Case(
        z.of(
            z.unet,
            a=lambda: nn.Conv2d(3, 6, 3, padding=1),
            b=lambda: nn.Conv2d(6, 5, 3, padding=1),
            c=lambda: nn.Conv2d(11, 3, 1),
        ),
        _IMAGES,
    ),
    "film": Case(z.of(z.film, a=z.linear(10, 8), condition=z.linear(4, 16), c=_C), _ROWS),
    "dueling": Case(z.of(z.dueling, a=z.linear(10, 8), value=z.linear(8, 1), c=_C), _ROWS, covered=0.95),
    "shared_trunk": Case(z.of(z.shared_trunk, a=z.linear(10, 8), value=z.linear(8, 1), c=_C), _ROWS, covered=0.95),
    "kolmogorov_arnold": Case(z.of(z.kolmogorov_arnold, w=(8, 10, 4), c=_C), _ROWS),
    "bags": Case(z.of(lambda m, ids: m.c(m.bag(ids).relu()), bag=lambda: nn.EmbeddingBag(11, 8), c=_C), tokens(11, 7)),
    "bags_of_maxima": Case(
        z.of(lambda m, ids: m.c(m.bag(ids).relu()), bag=lambda: nn.EmbeddingBag(11, 8, mode="max"), c=_C), tokens(11, 7)
    ),
    "depthwise_separable": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1), nn.Hardswish()),
            *(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)),
        ),
        _IMAGES,
    ),
    "depthwise_transposed": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8 * 64, 3)),
        ),
        _IMAGES,
    ),
    "glumlp": Case(z.of(lambda m, x: m.c(F.glu(m.a(x))), a=z.linear(10, 16), c=_C), _ROWS),
    "maxout": Case(z.of(lambda m, x: m.c(m.a(x).view(-1, 8, 3).amax(-1)), a=z.linear(10, 24), c=_C), _ROWS),
    "crelu": Case(z.of(lambda m, x: m.c(z.both_signs(m.a(x))), a=z.linear(10, 8), c=z.linear(16, 3)), _ROWS),
    "prelu_conv": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 3)), _IMAGES
    ),
    "local_response": Case(z.between(lambda h: h / (1 + h.square().mean(-1, keepdim=True)).sqrt()), _ROWS),
    "softsign_arctan": Case(z.between(lambda h: F.softsign(h) + torch.atan(h)), _ROWS),
    "logaddexp": Case(z.between(lambda h: torch.logaddexp(h, -h)), _ROWS),
    "hypot": Case(z.between(lambda h: torch.hypot(h, h.relu())), _ROWS),
    "var_mean": Case(z.between(lambda h: (h - torch.var_mean(h, 0)[1]) / (torch.var_mean(h, 0)[0] + 1)), _ROWS),
    "lp_pool": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LPPool2d(2, 2), nn.Flatten(), nn.Linear(72, 3)), _IMAGES
    ),
    "masked_mean": Case(
        z.of(
            lambda m, x, mask: m.c((m.a(x).relu() * ~mask[..., None]).sum(1) / (~mask).sum(1, keepdim=True)),
            a=_A,
            c=_C,
        ),
        z.with_padding,
        covered=0.95,
    ),
    "nearest_centre": Case(z.of(lambda m, x: m.c(m.a(x).relu().sort(0)[0]), a=z.linear(10, 8), c=_C), _ROWS),
    "top_of_positions": Case(
        z.of(lambda m, x: m.c(m.a(x).relu().topk(2, 1)[0].mean(1)), a=_A, c=_C), _SEQUENCE, covered=0.95
    ),
}
