"""HELD_OUT: tasks to report on. No optimizer was chosen by them, and when they were written NFNOpt took no more
than the ten steps of a test on them.

They share neither data nor networks with TRAIN, VALID, STREAMING and SEEN. All data is computed or comes with Python,
scikit-learn, networkx and matplotlib. A test holds the hash of these modules: see tests/test_suites.py.
"""

from collections.abc import Callable

from tasks.held_out import algorithms, dynamics, graphs, images, languages, signals, spaces, tables
from tasks.task import Task

HELD_OUT: dict[str, Callable[[], Task]] = {
    "llama-python": languages.llama_python,
    "tcn-names": languages.tcn_names,
    "mixer-letters": images.mixer_letters,
    "unet-mountains": images.unet_mountains,
    "nbeats-weather": signals.nbeats_weather,
    "gat-atlas": graphs.gat_atlas,
    "ode-neurons": dynamics.ode_neurons,
    "bellman-cart": dynamics.bellman_cart,
    "fttransformer-diabetes": tables.fttransformer_diabetes,
    "scarf-cancer": tables.scarf_cancer,
    "flow-wine": tables.flow_wine,
    "stream-retention-recall": algorithms.retention_recall,
    "stream-seq2seq-sort": algorithms.seq2seq_sort,
    "stream-moe-listops": algorithms.moe_listops,
    "stream-pointnet-surfaces": spaces.pointnet_surfaces,
    "stream-nerf-blobs": spaces.nerf_blobs,
    "stream-convnext-field": images.convnext_field,
    "stream-wavenet-sounds": signals.wavenet_sounds,
    "stream-deeponet-fronts": dynamics.deeponet_fronts,
}
