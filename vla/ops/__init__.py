"""Operators: pure functions on tensors, each a `torch.library` operator with one kernel per kind of device."""

from ._registry import use_backend
from .bi_wkv import bi_wkv
from .bias_gelu import bias_gelu
from .channel_gate import channel_gate
from .conv_gelu_linear import conv_gelu_linear, conv_gelu_linear_add_norm
from .conv_layer_norm import conv_layer_norm, conv_layer_norm_twice
from .conv_mlp import conv_mlp, conv_mlp_add_norm
from .conv_norm_relu import conv_norm_relu
from .depthwise_conv2d import depthwise_conv2d
from .group_modulation import group_modulation, group_modulation_add_norm
from .grouped_linear import grouped_linear, grouped_linear_pair, grouped_linear_pair_mean
from .layer_norm import add_layer_norm, layer_norm
from .layer_norm_grn import layer_norm_grn
from .line_scan import line_scan
from .mlp import mlp
from .modulated_layer_norm import modulated_layer_norm
from .projected_line_scan import projected_line_scan
from .projected_scan2d import projected_scan2d
from .q_shift import q_shift
from .q_shift_mix import q_shift_mix
from .scan2d import cross_merge, cross_scan, scan2d
from .selective_scan import selective_scan
from .squared_relu import squared_relu
from .ssd import ssd
from .wkv6 import wkv6

__all__ = [
    "add_layer_norm",
    "bi_wkv",
    "bias_gelu",
    "channel_gate",
    "conv_gelu_linear",
    "conv_gelu_linear_add_norm",
    "conv_layer_norm",
    "conv_layer_norm_twice",
    "conv_mlp",
    "conv_mlp_add_norm",
    "conv_norm_relu",
    "cross_merge",
    "cross_scan",
    "depthwise_conv2d",
    "group_modulation",
    "group_modulation_add_norm",
    "grouped_linear",
    "grouped_linear_pair",
    "grouped_linear_pair_mean",
    "layer_norm",
    "layer_norm_grn",
    "line_scan",
    "mlp",
    "modulated_layer_norm",
    "projected_line_scan",
    "projected_scan2d",
    "q_shift",
    "q_shift_mix",
    "scan2d",
    "selective_scan",
    "squared_relu",
    "ssd",
    "use_backend",
    "wkv6",
]
