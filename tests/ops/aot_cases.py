"""What `tests.ops.aot` compiles: calls of the operators on meta tensors, by operator.

Every kernel must be launched by some case. Sizes are those of models and benchmarks, then awkward ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vla import ops

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CROSS = ["row", "col", "row_rev", "col_rev"]
SWEEPS = ["right", "down", "left", "up"]


@dataclass(frozen=True)
class Case:
    """`function(**make(dtype))`, and all its gradients.

    Args:
        name: For messages and for choosing.
        function: Public function of `vla.ops`.
        make: From the activations' dtype to the arguments.
        dtypes: Activations' dtypes to compile for.
    """

    name: str
    function: Callable
    make: Callable[[torch.dtype], dict]
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16)


def weight(*size: int) -> Tensor:
    """A parameter: float32, whatever the activations are."""
    return torch.empty(size, device="meta")


def maps(dtype: torch.dtype, *size: int) -> Tensor:
    """Activations (..., C, H, W), channels last in memory."""
    return torch.empty(*size[:-3], *size[-2:], size[-3], dtype=dtype, device="meta").movedim(-1, -3)


def rows(dtype: torch.dtype, *size: int) -> Tensor:
    """Activations, contiguous."""
    return torch.empty(size, dtype=dtype, device="meta")


def halves(dtype: torch.dtype, *size: int) -> Tensor:
    """Activations, the second half of a linear layer's result."""
    return rows(dtype, *size[:-1], 2 * size[-1])[..., size[-1] :]


def _selective_scan() -> Iterator[Case]:
    def arguments(batch, channels, length, states, groups, gate=False, tokens=False):
        def make(dtype: torch.dtype) -> dict:
            def sequence(*size: int) -> Tensor:  # `tokens`: (B, L, ...) in memory, as linear layers leave it
                return maps(dtype, *size[:-1], 1, size[-1]).squeeze(-2) if tokens else rows(dtype, *size)

            return dict(
                u=sequence(batch, channels, length),
                delta=sequence(batch, channels, length),
                A=weight(channels, states),
                B=sequence(batch, groups, states, length),
                C=sequence(batch, groups, states, length),
                D=weight(channels),
                z=sequence(batch, channels, length) if gate else None,
                delta_bias=weight(channels),
                delta_softplus=True,
                return_last_state=gate,
            )

        return make

    def constant(dtype: torch.dtype) -> dict:
        return arguments(1024, 160, 196, 8, 1, gate=True)(dtype) | dict(B=weight(160, 8))

    def bare(dtype: torch.dtype) -> dict:
        u = rows(dtype, 3, 5, 197)
        return dict(u=u, delta=u.clone(), A=weight(5, 3), B=weight(5, 3), C=rows(dtype, 3, 3, 197))

    f = ops.selective_scan
    yield Case("vmamba", f, arguments(128, 384, 3136, 1, 4))
    yield Case("vmamba, shorter", f, arguments(128, 768, 784, 1, 4), (BF16,))
    yield Case("mambavision", f, arguments(1024, 160, 196, 8, 1), (BF16,))
    yield Case("mambavision, gated, constant B", f, constant, (FP16,))
    yield Case("mambavision tokens", f, arguments(1024, 160, 49, 8, 1, tokens=True), (BF16,))
    yield Case("language", f, arguments(8, 1536, 4096, 16, 1, gate=True), (BF16,))
    yield Case("one row", f, arguments(1, 1536, 65536, 16, 1), (BF16,))
    yield Case("one row, one state", f, arguments(1, 384, 65536, 1, 4), (BF16,))
    yield Case("vmamba, 16 states", f, arguments(128, 384, 3136, 16, 4), (BF16,))
    yield Case("64 states", f, arguments(2, 64, 333, 64, 2, gate=True), (FP16,))
    yield Case("bare", f, bare, (FP32,))


def _scan2d() -> Iterator[Case]:
    def arguments(batch, channels, height, width, states=1, rank=6, k=CROSS, layout=maps, **options):
        def make(dtype: torch.dtype) -> dict:
            parameters = len(k)
            d = channels
            full = parameters * d if options.get("grouped") else d
            # One projection of the pixels, split: dt, B and C are views of it.
            width_of_projection = (rank or d) + 2 * states
            projected = layout(dtype, batch, parameters * width_of_projection, height, width)
            projected = projected.unflatten(1, (parameters, width_of_projection))
            dt, B, C = projected.split([rank or d, states, states], dim=2)
            return dict(
                x=layout(dtype, batch, full, height, width),
                dt=dt,
                A=weight(parameters, d, states),
                B=B,
                C=C,
                directions=k,
                D=weight(parameters, d),
                dt_weight=weight(parameters, d, rank) if rank else None,
                dt_bias=weight(parameters, d),
                **options,
            )

        return make

    f = ops.scan2d
    yield Case("vmamba stage 1", f, arguments(128, 96, 56, 56))
    yield Case("vmamba stage 2", f, arguments(128, 192, 28, 28, rank=12), (BF16,))
    yield Case("vmamba stage 3", f, arguments(128, 384, 14, 14, rank=24), (BF16,))
    yield Case("vmamba stage 4", f, arguments(128, 768, 7, 7, rank=48), (BF16,))
    yield Case("vmamba stage 3, one picture", f, arguments(1, 384, 14, 14, rank=24), (BF16,))
    yield Case("vmamba 1024 stage 2", f, arguments(8, 192, 128, 128, rank=12), (BF16,))
    yield Case("vmamba 1024 stage 3", f, arguments(8, 384, 64, 64, rank=24), (BF16,))
    yield Case("vmamba 1024 stage 4", f, arguments(8, 768, 32, 32, rank=48), (BF16,))
    yield Case("vmamba 2048", f, arguments(1, 96, 512, 512), (BF16,))
    yield Case("one block of channels", f, arguments(128, 32, 28, 28, rank=2), (BF16,))
    yield Case("one block of channels, one picture", f, arguments(1, 32, 28, 28, rank=2), (BF16,))
    yield Case("16 states", f, arguments(8, 192, 56, 56, states=16), (BF16,))
    yield Case("groupmamba", f, arguments(128, 16, 56, 56, rank=1, grouped=True), (BF16,))
    yield Case("groupmamba stage 2", f, arguments(128, 32, 28, 28, rank=2, grouped=True), (BF16,))
    yield Case("groupmamba stage 3", f, arguments(128, 87, 14, 14, rank=6, grouped=True), (BF16,))
    yield Case("groupmamba, one picture", f, arguments(1, 16, 56, 56, rank=1, grouped=True), (BF16,))
    yield Case("groupmamba 1024 stage 2", f, arguments(8, 32, 128, 128, rank=2, grouped=True), (BF16,))
    yield Case("groupmamba 1024 stage 3", f, arguments(8, 87, 64, 64, rank=6, grouped=True), (BF16,))
    yield Case("groupmamba stage 3, one picture", f, arguments(1, 87, 64, 64, rank=6, grouped=True), (BF16,))
    yield Case("groupmamba_base", f, arguments(128, 24, 56, 56, rank=2, grouped=True), (BF16,))
    yield Case("groupmamba_base stage 2", f, arguments(128, 48, 28, 28, rank=3, grouped=True))
    yield Case("groupmamba_base stage 3", f, arguments(128, 106, 14, 14, rank=7, grouped=True), (BF16,))
    mambavision = arguments(128, 160, 1, 196, states=8, rank=20, k=["row"])
    yield Case("mambavision", f, mambavision, (BF16,))
    yield Case("lines, full rank", f, arguments(2, 33, 13, 17, states=3, rank=0, k=["row", "row_rev"], per_line=True))
    yield Case("contiguous", f, arguments(2, 33, 13, 17, layout=rows), (FP32,))


def _projected_scan2d() -> Iterator[Case]:
    def arguments(batch, channels, height, width, states=1, rank=6, norm=False):
        return lambda dtype: dict(
            x=maps(dtype, batch, channels, height, width),
            weight=weight(4, rank + 2 * states, channels),
            A=weight(4, channels, states),
            directions=CROSS,
            D=weight(4, channels),
            dt_weight=weight(4, channels, rank),
            dt_bias=weight(4, channels),
            norm_weight=weight(channels) if norm else None,
            norm_bias=weight(channels) if norm else None,
        )

    yield Case("vmamba stage 1, normalised", ops.projected_scan2d, arguments(128, 96, 56, 56, norm=True), (BF16,))
    yield Case("vmamba stage 1", ops.projected_scan2d, arguments(128, 96, 56, 56), (BF16,))
    yield Case("odd", ops.projected_scan2d, arguments(2, 33, 13, 17, states=2, rank=3), (FP32,))
    yield Case("a single number", ops.projected_scan2d, arguments(1, 1, 1, 1, rank=1), (BF16,))


def _bi_wkv() -> Iterator[Case]:
    def arguments(batch, length, channels, gated=False):
        return lambda dtype: dict(
            w=weight(channels),
            u=weight(channels),
            k=rows(dtype, batch, length, channels),
            v=rows(dtype, batch, length, channels),
            gate=rows(dtype, batch, length, channels) if gated else None,
        )

    f = ops.bi_wkv
    yield Case("vrwkv_tiny, gated", f, arguments(128, 196, 192, gated=True), (BF16,))
    yield Case("vrwkv_tiny", f, arguments(128, 196, 192), (FP32,))
    yield Case("896", f, arguments(16, 3136, 192), (BF16,))
    yield Case("one row", f, arguments(1, 65536, 192), (BF16,))
    yield Case("odd", f, arguments(3, 197, 33), (FP16,))


def _wkv6() -> Iterator[Case]:
    def arguments(batch, length, heads, size):
        def make(dtype: torch.dtype) -> dict:
            return {n: rows(dtype, batch, length, heads * size) for n in "rkvw"} | {"u": weight(heads, size)}

        return make

    f = ops.wkv6
    yield Case("vrwkv6_tiny", f, arguments(128, 196, 3, 64))
    yield Case("vrwkv6_base", f, arguments(32, 196, 12, 64), (BF16,))
    yield Case("2048", f, arguments(1, 16384, 6, 64), (BF16,))
    yield Case("heads of 32", f, arguments(2, 333, 2, 32), (FP16,))
    yield Case("one head of 16", f, arguments(1, 197, 1, 16), (FP32,))


def _q_shift() -> Iterator[Case]:
    def arguments(layout, *size, **options):
        return lambda dtype: dict(x=layout(dtype, *size), **options)

    f = ops.q_shift
    yield Case("vrwkv", f, arguments(maps, 128, 192, 14, 14))
    yield Case("vrwkv6", f, arguments(maps, 128, 192, 14, 14, head_dim=64), (BF16,))
    yield Case("odd", f, arguments(rows, 3, 33, 7, 9, shift=2, gamma=0.2), (FP16,))


def _q_shift_mix() -> Iterator[Case]:
    def arguments(layout, mixes, rank, *size, **options):
        def make(dtype: torch.dtype) -> dict:
            batch, channels, height, width = size
            tensors = dict(x=layout(dtype, *size), weight=weight(mixes, channels))
            if rank > 0:
                tensors |= dict(low=rows(dtype, batch, height * width, mixes * rank), up=weight(mixes, rank, channels))
            return tensors | options

        return make

    f = ops.q_shift_mix
    yield Case("vrwkv", f, arguments(maps, 3, 0, 128, 192, 14, 14, dtype=BF16, keeps=True))
    yield Case("vrwkv6", f, arguments(maps, 5, 32, 128, 192, 14, 14, head_dim=64), (BF16,))
    yield Case("odd", f, arguments(rows, 2, 5, 1, 33, 7, 9, shift=2, gamma=0.2), (FP32, FP16))


def _layer_norm_grn() -> Iterator[Case]:
    def arguments(layout, *size, features=None, **options):
        def make(dtype: torch.dtype) -> dict:
            channels = size[1]
            parameters = {name: weight(channels) for name in ("norm_weight", "norm_bias", "weight", "bias")}
            if features is not None:
                parameters["projection"] = weight(features, channels)
            return dict(x=layout(dtype, *size), **parameters, **options)

        return make

    f = ops.layer_norm_grn
    yield Case("linear, gspn stage 1", f, arguments(maps, 128, 144, 56, 56, features=96), (BF16,))
    yield Case("linear, gspn stage 2", f, arguments(maps, 128, 288, 28, 28, features=192), (BF16,))
    yield Case("linear, gspn small", f, arguments(maps, 128, 162, 56, 56, features=108), (BF16,))
    yield Case("linear, odd", f, arguments(rows, 1, 33, 7, 9, features=7), (BF16,))
    yield Case("linear, large pictures", f, arguments(maps, 8, 144, 256, 256, features=96), (BF16,))
    yield Case("large pictures", f, arguments(maps, 8, 288, 128, 128), (BF16,))
    yield Case("gspn stage 1", f, arguments(maps, 128, 144, 56, 56))
    yield Case("gspn stage 4", f, arguments(maps, 128, 1152, 7, 7, dtype=BF16), (BF16,))
    yield Case("odd", f, arguments(rows, 1, 33, 7, 9), (FP32, FP16))


def _squared_relu() -> Iterator[Case]:
    yield Case("vrwkv_tiny", ops.squared_relu, lambda dtype: dict(x=rows(dtype, 128, 196, 768)))
    yield Case("odd", ops.squared_relu, lambda dtype: dict(x=rows(dtype, 3, 7, 5)), (FP16,))


def _bias_gelu() -> Iterator[Case]:
    def arguments(*size):
        return lambda dtype: dict(x=rows(dtype, *size), bias=weight(size[-1]))

    yield Case("vmamba stage 3", ops.bias_gelu, arguments(25088, 1536), (BF16,))
    yield Case("odd", ops.bias_gelu, arguments(3, 7, 33), (FP32, FP16))


def _layer_norm() -> Iterator[Case]:
    def arguments(*size, branch=None, affine=True, gate=False, dtype=BF16, **options):
        def make(x_dtype: torch.dtype) -> dict:
            return dict(
                x=rows(x_dtype, *size),
                weight=weight(size[-1]) if affine else None,
                bias=weight(size[-1]) if affine else None,
                gate=halves(x_dtype, *size) if gate else None,
                dtype=dtype,
                **(dict(branch=rows(branch, *size)) if branch else {}),
                **options,
            )

        return make

    f = ops.layer_norm
    for channels, side in ((48, 112), (96, 56), (192, 28), (384, 14), (768, 7)):
        yield Case(f"vmamba {channels}", f, arguments(128, side, side, channels))
    yield Case("groupmamba", f, arguments(128, 14, 14, 348))
    yield Case("groupmamba, groups", f, arguments(128, 56, 56, 64, groups=4, gate=True), (BF16,))
    yield Case("groupmamba stage 3, groups", f, arguments(128, 14, 14, 348, groups=4, gate=True), (BF16,))
    yield Case("vrwkv6", f, arguments(128, 196, 192, groups=3, gate=True), (BF16,))
    yield Case("wide", f, arguments(5, 24576, affine=False, dtype=None), (FP16,))
    yield Case("narrow", f, arguments(5, 3, dtype=None), (FP16,))
    f = ops.add_layer_norm
    yield Case("residual", f, arguments(128, 56, 56, 96, branch=BF16), (FP32,))
    yield Case(
        "groupmamba stage 3", f, arguments(128, 14, 14, 348, branch=BF16, columns=4, factor=weight(128)), (FP32,)
    )
    two = dict(branch=BF16, second=rows(BF16, 128, 14, 14, 348), columns=4)
    yield Case("two branches, groupmamba stage 3", f, arguments(128, 14, 14, 348, **two), (FP32,))
    yield Case("no sum", f, arguments(128, 14, 14, 348, branch=BF16, columns=4, with_sum=False), (FP32,))
    yield Case("residual, one dtype", f, arguments(128, 14, 14, 384, branch=FP32, dtype=None), (FP32,))
    yield Case("residual, gated", f, arguments(7, 33, 100, branch=FP16, groups=5, gate=True, dtype=None), (FP16,))


def _conv_layer_norm() -> Iterator[Case]:
    def arguments(batch, side, channels, out, size, bias=True, **options):
        def make(x_dtype: torch.dtype) -> dict:
            return dict(
                x=maps(x_dtype, batch, channels, side, side),
                weight=weight(out, channels, size, size),
                bias=weight(out) if bias else None,
                norm_weight=weight(out),
                norm_bias=weight(out),
                **options,
            )

        return make

    def f(x: Tensor, **arguments) -> Tensor:
        return ops.conv_layer_norm(x.detach(), **arguments)

    def narrow(x: Tensor, weight: Tensor, **arguments) -> Tensor:
        return ops.conv_layer_norm(x.detach(), weight.to(x.dtype), **arguments)

    stem = dict(stride=2, padding=1, act="gelu", dtype=BF16)
    yield Case("vmamba", f, arguments(128, 224, 3, 48, 3, **stem))
    yield Case("vmamba base", f, arguments(128, 224, 3, 64, 3, **stem), (FP32,))
    yield Case("patches", f, arguments(128, 224, 3, 96, 4, stride=4, dtype=BF16), (FP32,))
    yield Case("odd", f, arguments(3, 33, 2, 20, 3, bias=False, stride=2), (FP32, FP16))

    def twice(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, **arguments) -> tuple[Tensor, Tensor]:
        vectors = dict(norm_weight=norm_weight, norm_bias=norm_bias, next_weight=norm_weight, next_bias=norm_bias)
        return ops.conv_layer_norm_twice(x.detach(), weight.to(x.dtype), **vectors, **arguments, next_dtype=BF16)

    first = dict(stride=2, padding=1, dtype=FP32)
    yield Case("groupmamba", narrow, arguments(128, 112, 32, 64, 3, **first), (BF16,))
    yield Case("groupmamba twice", twice, arguments(128, 112, 32, 64, 3, **first), (BF16,))
    yield Case("odd, many channels", f, arguments(3, 9, 20, 33, 4, bias=False, act="gelu"), (FP16,))


def _group_modulation() -> Iterator[Case]:
    def arguments(batch, height, width, channels):
        def make(dtype: torch.dtype) -> dict:
            tensors = {name: rows(dtype, batch, height, width, channels) for name in ("y", "z", "n")}
            vectors = ("out_norm_weight", "out_norm_bias", "norm_weight", "norm_bias", "proj_bias")
            tensors |= {name: weight(channels) for name in vectors}
            tensors |= dict(out_proj=weight(4, channels // 4, channels // 4), proj=weight(channels, channels))
            return tensors | dict(gate=rows(dtype, batch, channels))

        return make

    f = ops.group_modulation
    yield Case("groupmamba", f, arguments(128, 56, 56, 64), (BF16,))
    yield Case("groupmamba stage 2", f, arguments(128, 28, 28, 128), (BF16, FP16))
    yield Case("groupmamba stage 3", f, arguments(128, 14, 14, 348), (BF16,))
    yield Case("groupmamba base", f, arguments(128, 56, 56, 96), (BF16,))
    yield Case("one picture", f, arguments(1, 14, 14, 348), (BF16,))

    def streams(*size):
        def make(dtype: torch.dtype) -> dict:
            vectors = dict(stream_norm_weight=weight(size[-1]), stream_norm_bias=weight(size[-1]), norm_dtype=dtype)
            return arguments(*size)(dtype) | vectors | dict(stream=rows(FP32, *size))

        return make

    f = ops.group_modulation_add_norm
    yield Case("norm, groupmamba", f, streams(128, 56, 56, 64), (BF16,))
    yield Case("norm, groupmamba stage 2", f, streams(128, 28, 28, 128), (BF16, FP16))
    yield Case("norm, groupmamba base", f, streams(128, 56, 56, 96), (BF16,))


def _modulated_layer_norm() -> Iterator[Case]:
    def arguments(batch, side, channels, columns):
        def make(dtype: torch.dtype) -> dict:
            tensors = {name: rows(dtype, batch, side, side, channels) for name in ("a", "n")}
            vectors = {name: weight(channels) for name in ("weight", "bias")}
            return tensors | vectors | dict(gate=weight(batch, channels), columns=columns)

        return make

    f = ops.modulated_layer_norm
    yield Case("groupmamba stage 3", f, arguments(128, 14, 348, 4), (BF16, FP16))
    yield Case("groupmamba stage 4", f, arguments(128, 7, 448, 0), (BF16,))
    yield Case("groupmamba base stage 2", f, arguments(128, 28, 192, 0), (BF16,))
    yield Case("odd", f, arguments(3, 5, 1031, 7), (FP32,))


def _grouped_linear() -> Iterator[Case]:
    def arguments(batch, side, width, outputs, two):
        def make(dtype: torch.dtype) -> dict:
            names = ("weight", "weight2") if two else ("weight",)
            return dict(x=rows(dtype, batch, side, side, 4 * width), **{n: weight(4, outputs, width) for n in names})

        return make

    one, two, mean = ops.grouped_linear, ops.grouped_linear_pair, ops.grouped_linear_pair_mean
    for width, side, outputs in ((16, 56, 3), (32, 28, 4), (87, 14, 8), (112, 7, 9)):
        yield Case(f"groupmamba {width} mean", mean, arguments(128, side, width, width, True), (BF16,))
        yield Case(f"groupmamba {width} time steps", one, arguments(128, side, width, outputs, False), (BF16,))
    for width, side in ((16, 56), (32, 28)):
        yield Case(f"groupmamba {width}", two, arguments(128, side, width, width, True), (BF16,))
    yield Case("one picture", mean, arguments(1, 14, 87, 87, True), (BF16,))
    yield Case("odd", two, arguments(3, 5, 150, 131, True), (FP32, FP16))


def _channel_gate() -> Iterator[Case]:
    def make(dtype: torch.dtype) -> dict:
        parameters = dict(weight1=weight(21, 348), bias1=weight(21), weight2=weight(348, 21), bias2=weight(348))
        return dict(x=rows(dtype, 128, 348), **parameters, scale=weight(1))

    yield Case("groupmamba", ops.channel_gate, make, (BF16,))


def _conv_norm_relu() -> Iterator[Case]:
    def arguments(channels, size, out, *kernel, normed, **padding):
        def make(dtype: torch.dtype) -> dict:
            norm = {name: weight(normed) for name in ("mean", "var", "norm_weight", "norm_bias")}
            return dict(x=maps(dtype, 128, channels, *size), weight=weight(out, channels, *kernel), **norm, **padding)

        return make

    f, padding = ops.conv_norm_relu, dict(padding_h=1, padding_w=1)
    yield Case("groupmamba", f, arguments(32, (112, 112), 32, 3, 3, normed=32, **padding), (BF16,))
    yield Case("groupmamba base", f, arguments(64, (112, 112), 64, 3, 3, normed=64, **padding), (BF16,))
    images = dict(padding_h=3, padding_w=4, stride_h=2, stride_w=4, dtype=BF16)
    yield Case("groupmamba images", f, arguments(3, (224, 224), 64, 8, 10, normed=32, **images), (FP32, BF16))
    yield Case("groupmamba base images", f, arguments(3, (224, 224), 128, 8, 10, normed=64, **images), (FP32,))
    yield Case("odd", f, arguments(20, (9, 7), 33, 5, 2, normed=11, padding_h=2), (FP32, FP16))


def _conv_gelu_linear() -> Iterator[Case]:
    def arguments(channels, size, out):
        def make(dtype: torch.dtype) -> dict:
            x = rows(dtype, 128, *size, channels)
            return dict(x=x, weight=weight(channels, 1, 3, 3), bias=weight(channels)) | dict(
                out_weight=weight(out, channels), out_bias=weight(out)
            )

        return make

    f = ops.conv_gelu_linear
    yield Case("groupmamba stage 2", f, arguments(1024, (28, 28), 128), (BF16,))
    yield Case("groupmamba base stage 1", f, arguments(768, (56, 56), 96), (BF16,))
    yield Case("groupmamba base stage 2", f, arguments(1536, (28, 28), 192), (BF16,))
    yield Case("odd", f, arguments(33, (9, 7), 300), (FP16,))

    def streams(channels, size, out, stream=torch.float32, branch=False, with_sum=True):
        def make(dtype: torch.dtype) -> dict:
            norm = dict(stream=rows(stream, 128, *size, out), norm_weight=weight(out), norm_bias=weight(out))
            norm |= dict(branch=rows(dtype, 128, *size, out)) if branch else {}
            return arguments(channels, size, out)(dtype) | norm | dict(dtype=dtype, with_sum=with_sum)

        return make

    f = ops.conv_gelu_linear_add_norm
    yield Case("norm, few columns", f, streams(512, (56, 56), 64), (BF16,))
    yield Case("norm, groupmamba stage 2, branch", f, streams(1024, (28, 28), 128, branch=True), (BF16,))
    yield Case("norm, groupmamba stage 2, last", f, streams(1024, (28, 28), 128, branch=True, with_sum=False), (BF16,))
    yield Case("norm, groupmamba base stage 1", f, streams(768, (56, 56), 96), (BF16,))
    yield Case("norm, odd", f, streams(33, (9, 7), 130, FP16, branch=True), (FP16,))
    yield Case("norm, wide", f, streams(33, (9, 7), 300), (FP16,))


def _conv_mlp() -> Iterator[Case]:
    def arguments(channels, features, size, out=None):
        def make(dtype: torch.dtype) -> dict:
            width = out or channels
            tensors = dict(x=rows(dtype, 128, *size, channels))
            tensors |= dict(in_weight=weight(features, channels), in_bias=weight(features))
            tensors |= dict(weight=weight(features, 1, 3, 3), bias=weight(features))
            return tensors | dict(out_weight=weight(width, features), out_bias=weight(width))

        return make

    f = ops.conv_mlp
    yield Case("groupmamba stage 1", f, arguments(64, 512, (56, 56)), (BF16, FP16))
    yield Case("odd", f, arguments(20, 33, (9, 7), 40), (FP16,))

    def streams(channels, features, size, stream=torch.float32, branch=False, with_sum=True):
        def make(dtype: torch.dtype) -> dict:
            norm = dict(stream=rows(stream, 128, *size, channels))
            norm |= dict(norm_weight=weight(channels), norm_bias=weight(channels))
            norm |= dict(branch=rows(dtype, 128, *size, channels)) if branch else {}
            return arguments(channels, features, size)(dtype) | norm | dict(dtype=dtype, with_sum=with_sum)

        return make

    f = ops.conv_mlp_add_norm
    yield Case("norm, groupmamba stage 1", f, streams(64, 512, (56, 56)), (BF16,))
    yield Case("norm, groupmamba stage 1, branch", f, streams(64, 512, (56, 56), branch=True), (BF16,))
    yield Case("norm, groupmamba stage 1, last", f, streams(64, 512, (56, 56), branch=True, with_sum=False), (BF16,))
    yield Case("norm, odd", f, streams(20, 33, (9, 7), FP16, branch=True), (FP16,))


def _mlp() -> Iterator[Case]:
    def arguments(channels, hidden, *size, out=None, bias=True, act="gelu"):
        def make(dtype: torch.dtype) -> dict:
            width = channels if out is None else out
            parameters = dict(weight1=weight(hidden, channels), weight2=weight(width, hidden))
            parameters |= dict(bias1=weight(hidden), bias2=weight(width)) if bias else dict(bias1=None, bias2=None)
            parameters = {n: None if t is None else t.detach().to(dtype) for n, t in parameters.items()}
            return dict(x=rows(dtype, *size, channels), **parameters, act=act)

        return make

    f = ops.mlp
    for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7)):
        yield Case(f"vmamba {channels}", f, arguments(channels, 4 * channels, 128, side, side), (BF16,))
    yield Case("mambavision", f, arguments(320, 1280, 128, 14, 14), (BF16,))
    yield Case("odd", f, arguments(33, 100, 3, 7, out=20, bias=False, act="silu"), (FP16,))
    yield Case("odd, wide", f, arguments(400, 130, 3, 7, out=20, act="squared_relu"), (FP16,))


def _depthwise_conv2d() -> Iterator[Case]:
    def arguments(layout, kernel, act, bias, *size, **options):
        def make(dtype: torch.dtype) -> dict:
            channels = size[1]
            tensors = dict(x=layout(dtype, *size), weight=weight(channels, 1, *kernel))
            return tensors | dict(bias=weight(channels) if bias else None, act=act, **options)

        return make

    f = ops.depthwise_conv2d
    yield Case("vmamba", f, arguments(maps, (3, 3), "silu", False, 128, 96, 56, 56))
    yield Case("groupmamba", f, arguments(maps, (3, 3), "silu", True, 128, 348, 14, 14), (BF16,))
    yield Case("zeros", f, arguments(maps, (3, 3), "silu", True, 8, 348, 64, 64, zeros=4), (BF16,))
    yield Case("groupmamba mlp", f, arguments(maps, (3, 3), "gelu", True, 128, 512, 56, 56), (BF16,))
    yield Case("groupmamba 1024", f, arguments(maps, (3, 3), "silu", True, 8, 64, 256, 256), (BF16,))
    yield Case("mambavision", f, arguments(maps, (1, 3), "silu", False, 128, 320, 1, 196), (BF16,))
    yield Case("gspn", f, arguments(maps, (7, 7), None, False, 128, 144, 56, 56))
    yield Case("gspn stage 3", f, arguments(maps, (7, 7), None, False, 128, 576, 14, 14), (FP16,))
    yield Case("three columns", f, arguments(maps, (5, 3), None, False, 8, 64, 33, 30), (BF16,))
    yield Case("one picture", f, arguments(maps, (7, 7), None, False, 1, 1152, 7, 7), (BF16,))
    yield Case("odd", f, arguments(rows, (5, 3), "gelu", True, 3, 33, 7, 9), (FP16,))
    yield Case("large, activation", f, arguments(maps, (5, 5), "silu", True, 8, 96, 56, 56), (BF16,))


def _line_scan() -> Iterator[Case]:
    def gspn(batch, channels, height, width, **options):
        """All four sweeps with coefficients expanded from a proxy of 8 channels."""

        def make(dtype: torch.dtype) -> dict:
            return dict(
                x=maps(dtype, batch, channels, height, width),
                gates=weight(3, 4, channels, 8),
                lam=weight(4, channels, 8),
                directions=SWEEPS,
                u=weight(4, channels, 8),
                skip=weight(4, channels, 8),
                proxy=maps(dtype, batch, 8, height, width),
                **options,
            )

        return make

    def dense(batch, channels, height, width, k=1, layout=rows, output=False, **options):
        """Coefficients as maps."""

        def make(dtype: torch.dtype) -> dict:
            def coefficient(*lead: int) -> Tensor:
                return layout(dtype, *lead, channels, height, width)

            return dict(
                x=layout(dtype, batch, channels, height, width),
                gates=coefficient(batch, 3, k),
                lam=coefficient(batch, k),
                directions=SWEEPS[:k],
                u=coefficient(batch, k) if output else None,
                skip=coefficient(batch, k) if output else None,
                **options,
            )

        return make

    f = ops.line_scan
    yield Case("gspn stage 1", f, gspn(128, 144, 56, 56, chunk=2, aligned=False))
    yield Case("gspn stage 2", f, gspn(128, 288, 28, 28, chunk=2), (BF16,))
    yield Case("gspn stage 3", f, gspn(128, 576, 14, 14, aligned=False), (BF16,))
    yield Case("gspn stage 4", f, gspn(128, 1152, 7, 7, aligned=False), (BF16, FP16))
    yield Case("gspn whole", f, gspn(8, 288, 28, 28, aligned=False), (BF16,))
    yield Case("gspn 1024", f, gspn(8, 576, 64, 64, aligned=False))
    yield Case("gspn 2048", f, gspn(8, 576, 128, 128, aligned=False), (BF16, FP16))
    yield Case("gspn 4096", f, gspn(1, 576, 256, 256, aligned=False), (BF16,))
    yield Case("gspn 8192", f, gspn(1, 144, 512, 512), (BF16,))
    yield Case("dense, local", f, dense(128, 576, 56, 56, chunk=2), (FP16,))
    yield Case("dense, local, odd", f, dense(2, 5, 7, 9, k=2, output=True, chunk=2), (BF16,))
    yield Case("dense, global", f, dense(128, 2304, 14, 14), (FP16,))
    yield Case("dense, blocks", f, dense(128, 1152, 28, 28), (FP16,))
    yield Case("dense, square", f, dense(1, 576, 256, 256), (FP16,))
    yield Case("dense, large", f, dense(1, 576, 1024, 1024), (FP16,))
    yield Case("dense, odd", f, dense(2, 5, 7, 9, k=4, layout=maps, output=True, chunk=4, normalize=False))


def _projected_line_scan() -> Iterator[Case]:
    def arguments(batch, channels, height, width, **options):
        return lambda dtype: dict(
            x=maps(dtype, batch, channels, height, width),
            weight=weight(8, channels),
            gates=weight(3, 4, channels, 8),
            lam=weight(4, channels, 8),
            u=weight(4, channels, 8),
            skip=weight(4, channels, 8),
            directions=["right", "down", "left", "up"],
            **options,
        )

    f = ops.projected_line_scan
    yield Case("gspn stage 1", f, arguments(128, 144, 56, 56, chunk=2, aligned=False), (BF16,))
    yield Case("gspn stage 3", f, arguments(128, 576, 14, 14, aligned=False), (BF16, FP16))
    yield Case("gspn base stage 1", f, arguments(128, 180, 56, 56, chunk=2, aligned=False), (BF16, FP16))
    yield Case("gspn base stage 3, local", f, arguments(128, 720, 14, 14, chunk=2, aligned=False), (BF16,))
    yield Case("gspn small stage 3", f, arguments(128, 648, 14, 14, aligned=False), (BF16,))
    yield Case("odd", f, arguments(2, 33, 13, 17), (FP32,))


CASES: dict[str, tuple[Case, ...]] = {
    "selective_scan": tuple(_selective_scan()),
    "scan2d": tuple(_scan2d()),
    "projected_line_scan": tuple(_projected_line_scan()),
    "projected_scan2d": tuple(_projected_scan2d()),
    "bi_wkv": tuple(_bi_wkv()),
    "wkv6": tuple(_wkv6()),
    "q_shift": tuple(_q_shift()),
    "q_shift_mix": tuple(_q_shift_mix()),
    "squared_relu": tuple(_squared_relu()),
    "layer_norm_grn": tuple(_layer_norm_grn()),
    "layer_norm": tuple(_layer_norm()),
    "bias_gelu": tuple(_bias_gelu()),
    "conv_layer_norm": tuple(_conv_layer_norm()),
    "depthwise_conv2d": tuple(_depthwise_conv2d()),
    "group_modulation": tuple(_group_modulation()),
    "modulated_layer_norm": tuple(_modulated_layer_norm()),
    "grouped_linear": tuple(_grouped_linear()),
    "channel_gate": tuple(_channel_gate()),
    "conv_norm_relu": tuple(_conv_norm_relu()),
    "conv_gelu_linear": tuple(_conv_gelu_linear()),
    "conv_mlp": tuple(_conv_mlp()),
    "mlp": tuple(_mlp()),
    "line_scan": tuple(_line_scan()),
}
