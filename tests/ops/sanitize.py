"""Runs every operator's kernels once, forward and backward, on tensors small enough for NVIDIA's checkers.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.ops.sanitize
compute-sanitizer --tool racecheck python -m tests.ops.sanitize selective_scan line_scan
"""

import sys

import torch

from tests.device import use

use("cuda")

# They look at the default device.
from tests.ops import test_channel_gate, test_conv_gelu_linear, test_conv_mlp, test_conv_norm_relu, test_gpu  # noqa: E402
from tests.ops.harness import run  # noqa: E402
from tests.ops.test_gpu import (  # noqa: E402
    CROSS,
    Case,
    add_layer_norm,
    bi_wkv,
    bias_gelu,
    depthwise,
    directional,
    group_modulation,
    grouped,
    layer_norm,
    layer_norm_grn,
    lines,
    mlp,
    modulated_layer_norm,
    norm,
    normed_twice,
    pictures,
    projected,
    projected_lines,
    q_shift,
    q_shift_mix,
    randn,
    scan,
    squared_relu,
    two_layers,
    wkv6,
)
from vla.ops import (  # noqa: E402
    channel_gate,
    conv_gelu_linear,
    conv_gelu_linear_add_norm,
    conv_mlp,
    conv_mlp_add_norm,
    conv_norm_relu,
    grouped_linear_pair_mean,
)

CASES: dict[str, Case] = {
    "selective_scan": scan(2, 37, 197, 1),
    "selective_scan grouped": scan(2, 12, 130, 3, 4),
    "selective_scan windows": scan(40, 33, 49, 8),
    "selective_scan many rows": scan(16, 40, 70, 16),
    "selective_scan long": scan(1, 3, 4097, 3),
    "selective_scan rows along lanes": scan(1024, 32, 20, 2),
    "selective_scan segments": scan(512, 32, 529, 2),
    "scan2d": directional((2, 33, 13, 17)),
    "scan2d runs": directional((1, 16, 40, 41)),
    "scan2d states": directional((3, 40, 7, 7), states=8, directions=CROSS[:1] * 4),
    "scan2d grouped": directional((2, 29, 9, 7), rank=3, grouped=True),
    "scan2d narrow groups": directional((26, 15, 9, 7), rank=1, grouped=True),
    "scan2d groups of one word": directional((2, 18, 23, 7), rank=2, grouped=True),
    "scan2d per line": directional((1, 20, 12, 9), per_line=True),
    "scan2d wide": directional((2, 130, 9, 7)),
    "scan2d high rank": directional((1, 130, 9, 7), rank=33),
    "scan2d halves": directional((264, 17, 23, 23)),
    "projected_scan2d": projected((2, 33, 13, 17)),
    "bi_wkv": (bi_wkv, lambda: test_gpu.test_bi_wkv.make(2, 197, 33), {}),
    "bi_wkv long": (bi_wkv, lambda: test_gpu.test_bi_wkv.make(1, 3000, 20), {}),
    "wkv6": (wkv6, lambda: test_gpu.test_wkv6.make(1, 100, 2, 32), {}),
    "wkv6 segments": (wkv6, lambda: test_gpu.test_wkv6.make(1, 600, 2, 16), {}),
    "wkv6 one chunk": (wkv6, lambda: test_gpu.test_wkv6.make(1, 16, 2, 16), {}),
    "projected_line_scan": projected_lines((2, 33, 13, 17)),
    "line_scan": lines((1, 18, 15, 22)),
    "line_scan chunks": lines((1, 18, 56, 56), chunk=2),
    "line_scan wide": lines((1, 9, 20, 140), aligned=True),
    "line_scan stored": lines((1, 12, 15, 22), rank=0),
    "line_scan stored chunks": lines((1, 6, 28, 28), rank=0, chunk=2),
    "line_scan stored wide": lines((1, 3, 20, 200), rank=0, aligned=True),
    "q_shift": (q_shift, lambda: {"x": randn(0)(2, 70, 9, 7)}, {}),
    "q_shift_mix": (q_shift_mix, lambda: test_gpu.test_q_shift_mix.make((2, 64, 9, 7), 3), {}),
    "q_shift_mix low": (q_shift_mix, lambda: test_gpu.test_q_shift_mix.make((2, 64, 9, 7), 5, 32), dict(head_dim=32)),
    "depthwise_conv2d": depthwise((2, 33, 13, 17), 3, act="silu", bias=True),
    "depthwise_conv2d 7x7": depthwise((1, 40, 15, 15), 7),
    "depthwise_conv2d 7x7 many": depthwise((5, 36, 9, 14), 7),
    "depthwise_conv2d 5x5 activation": depthwise((1, 34, 9, 11), 5, act="silu", bias=True),
    "layer_norm": norm(layer_norm, (2, 200, 96)),
    "layer_norm gated": norm(layer_norm, (4, 197, 348), groups=4, gate=True),
    "add_layer_norm": norm(add_layer_norm, (2, 197, 192), branch=True),
    "add_layer_norm two branches": norm(add_layer_norm, (2, 197, 348), branch=True, second=True),
    "layer_norm_grn": (layer_norm_grn, lambda: test_gpu.test_layer_norm_grn.make((2, 72, 13, 9)), {}),
    "layer_norm_grn linear": (
        layer_norm_grn,
        lambda: test_gpu.test_layer_norm_grn.make((2, 72, 13, 9), features=44),
        {},
    ),
    "bias_gelu": (bias_gelu, lambda: test_gpu.test_bias_gelu.make((7, 101, 300)), {}),
    "conv_layer_norm": pictures((2, 3, 19, 22), 48),
    "conv_layer_norm twice": normed_twice((2, 32, 19, 22), 64),
    "squared_relu": (squared_relu, lambda: {"x": randn(0)(7, 101, 33)}, {}),
    "group_modulation": (group_modulation, lambda: test_gpu.test_group_modulation.make((3, 9, 7, 100)), {}),
    "group_modulation two passes": (
        group_modulation,
        lambda: test_gpu.test_group_modulation.make((3, 9, 7, 148)),
        {},
    ),
    "modulated_layer_norm": (
        modulated_layer_norm,
        lambda: test_gpu.test_modulated_layer_norm.make((3, 9, 7, 100)),
        dict(columns=4),
    ),
    "grouped_linear": grouped((3, 9, 7), 87, 33),
    "grouped_linear mean": grouped((3, 9, 7), 16, 16, function=grouped_linear_pair_mean),
    "channel_gate": (channel_gate, lambda: test_channel_gate.make(3, 100, 6), {}),
    "conv_norm_relu": (
        conv_norm_relu,
        lambda: test_conv_norm_relu.make((3, 24, 11, 9), 34, (4, 3), 17),
        dict(padding_w=1),
    ),
    "conv_norm_relu images": (
        conv_norm_relu,
        lambda: test_conv_norm_relu.make((2, 3, 22, 36), 34, (8, 10), 17),
        dict(padding_h=3, padding_w=4, stride_h=2, stride_w=4),
    ),
    "conv_gelu_linear": (conv_gelu_linear, lambda: test_conv_gelu_linear.make((3, 9, 11, 67), 33), {}),
    "conv_gelu_linear ahead": (conv_gelu_linear, lambda: test_conv_gelu_linear.make((3, 16, 8, 256), 64), {}),
    "conv_gelu_linear norm": (
        conv_gelu_linear_add_norm,
        lambda: test_conv_gelu_linear.make_all((3, 9, 11, 67), 33),
        {},
    ),
    "conv_gelu_linear norm ahead": (
        conv_gelu_linear_add_norm,
        lambda: test_conv_gelu_linear.make_all((3, 16, 8, 256), 64),
        {},
    ),
    "conv_mlp": (conv_mlp, lambda: test_conv_mlp.make((3, 9, 11, 35), 67, 33), {}),
    "conv_mlp norm": (conv_mlp_add_norm, lambda: test_conv_mlp.make_all((3, 16, 20, 48), 128, 64), {}),
    "mlp": two_layers((3, 67, 33), 100, out=20),
    "mlp wide": two_layers((3, 67, 100), 130, out=20),
    "mlp wider": two_layers((3, 67, 403), 130, out=20),
}


# Have kernels for 16 bits only.
NARROW = (conv_gelu_linear, conv_gelu_linear_add_norm, conv_mlp, conv_mlp_add_norm, mlp)


def main(names: list[str]) -> None:
    for name, (function, make, options) in CASES.items():
        if names and name.split()[0] not in names:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            if function in NARROW and dtype == torch.float32:
                continue
            run("triton", function, {n: t if t is None else t.to(dtype) for n, t in make().items()}, **options)
            torch.cuda.synchronize()
            sys.stdout.write(f"{name} {dtype}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
