"""What follows GroupMamba's scan up to the end of its mixer, https://arxiv.org/abs/2407.13772, in one pass."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_result_dtype, check_shape
from .._registry import Operator

__all__ = ["group_modulation", "group_modulation_add_norm"]

_OP = "group_modulation"
# Channels up to which the rows of both products fit in registers, in 16 bits; in a group, those of one product.
WHOLE = 128


def _infer(
    y: Tensor,
    z: Tensor,
    n: Tensor,
    gate: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    stream: Tensor | None,
    stream_norm_weight: Tensor | None,
    stream_norm_bias: Tensor | None,
    out_eps: float,
    eps: float,
    stream_eps: float,
    dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    check_ndim(_OP, "y", y, (4,), "(B, H, W, C)")
    batch, channels = y.shape[0], y.shape[3]
    check_ndim(_OP, "out_proj", out_proj, (3,), "(K, I, I)")
    groups = out_proj.shape[0]
    if groups == 0 or channels % groups != 0:
        raise ValueError(f"{_OP}: out_proj has {groups} groups, expected a divisor of the {channels} channels")
    check_shape(_OP, "out_proj", out_proj, (groups, channels // groups, channels // groups), "(K, I, I)")
    for name, tensor in (("z", z), ("n", n)):
        check_shape(_OP, name, tensor, y.shape, "that of y")
    check_shape(_OP, "gate", gate, (batch, channels), "(B, C)")
    check_shape(_OP, "proj", proj, (channels, channels), "(C, C)")
    vectors = dict(
        out_norm_weight=out_norm_weight,
        out_norm_bias=out_norm_bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        proj_bias=proj_bias,
    )
    if stream is not None:
        check_shape(_OP, "stream", stream, y.shape, "that of y")
        vectors |= dict(stream_norm_weight=stream_norm_weight, stream_norm_bias=stream_norm_bias)
    for name, tensor in vectors.items():
        check_shape(_OP, name, tensor, (channels,), "(C,)")
    check_float(_OP, y=y, z=z, n=n, gate=gate, out_proj=out_proj, proj=proj, stream=stream, **vectors)
    check_result_dtype(_OP, dtype)
    check_result_dtype(_OP, norm_dtype)
    return empty_results(y, stream, dtype, norm_dtype)


def empty_results(
    y: Tensor, stream: Tensor | None, dtype: torch.dtype | None, norm_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The mixer's result, and the norm, which is empty without a stream."""
    out = y.new_empty(y.shape, dtype=dtype)
    if stream is None:
        return out, out.new_empty(0)
    return out, y.new_empty(y.shape, dtype=norm_dtype or torch.promote_types(stream.dtype, out.dtype))


def _flops(y, z, n, gate, ow, ob, out_proj, nw, nb, proj, pb, stream, *rest) -> int:
    # Two products; norms, gates and their SiLU as in `layer_norm`, the last addition and norm as in `add_layer_norm`.
    return y.numel() * (2 * out_proj[1] + 2 * y[3] + (25 if stream is None else 33))


operator = Operator(
    _OP,
    "(Tensor y, Tensor z, Tensor n, Tensor gate, Tensor out_norm_weight, Tensor out_norm_bias, Tensor out_proj, "
    "Tensor norm_weight, Tensor norm_bias, Tensor proj, Tensor proj_bias, Tensor? stream, Tensor? stream_norm_weight, "
    "Tensor? stream_norm_bias, float out_eps, float eps, float stream_eps, ScalarType? dtype, ScalarType? norm_dtype)"
    " -> (Tensor, Tensor)",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    exact_strides=False,
)


def group_modulation(
    y: Tensor,
    z: Tensor,
    n: Tensor,
    gate: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    out_eps: float = 1e-5,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The end of GroupMamba's mixer, in one or a few passes over memory.

        a   = out_proj (groupnorm(y) silu(z))
        out = proj norm(a * n * gate) + proj_bias

    Both norms are layer norms over the channels of a pixel, the first over each group of channels. Norms and sums are
    computed in float32 (float64 for float64 inputs); factors of the products are rounded to the dtype of `y`. Every
    tensor argument is differentiable; of the forward only the arguments are kept.

    Args:
        y: Scanned map, (B, H, W, C); one pass up to 128 channels in 16 bits, fastest where they are next to each
            other in memory.
        z: What its SiLU multiplies, (B, H, W, C).
        n: Input of the mixer, (B, H, W, C).
        gate: Factor of every channel, (B, C).
        out_norm_weight: Scale of the first norm, (C,).
        out_norm_bias: Shift of the first norm, (C,).
        out_proj: Matrices of the groups, (K, I, I) with C = K * I.
        norm_weight: Scale of the second norm, (C,).
        norm_bias: Shift of the second norm, (C,).
        proj: Matrix (C, C).
        proj_bias: Bias (C,).
        out_eps: Added to the variances of the first norm.
        eps: Added to the variance of the second norm.
        dtype: dtype of the result; None for that of `y`.

    Returns:
        Contiguous (B, H, W, C).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        out, _ = torch.ops.vla.group_modulation(
            y, z, n, gate, out_norm_weight, out_norm_bias, out_proj, norm_weight, norm_bias, proj, proj_bias,
            None, None, None, out_eps, eps, 0.0, dtype, None,
        )  # fmt: skip
        return out
    else:
        return operator(
            y, z, n, gate, out_norm_weight, out_norm_bias, out_proj, norm_weight, norm_bias, proj, proj_bias,
            None, None, None, out_eps, eps, 0.0, dtype, None,
        )[0]  # fmt: skip


def group_modulation_add_norm(
    y: Tensor,
    z: Tensor,
    n: Tensor,
    gate: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    stream: Tensor,
    stream_norm_weight: Tensor,
    stream_norm_bias: Tensor,
    out_eps: float = 1e-5,
    eps: float = 1e-5,
    stream_eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""`group_modulation` and a layer norm of its sum with the residual stream.

        out = group_modulation(y, z, n, ...),    norm = layer_norm(stream + out)

    For inference: gradients are PyTorch's own. The sum itself is not written, for whoever adds the next branch as well.

    Args:
        y: Scanned map, (B, H, W, C), see `group_modulation` for this and all up to `proj_bias`.
        z: What its SiLU multiplies, (B, H, W, C).
        n: Input of the mixer, (B, H, W, C).
        gate: Factor of every channel, (B, C).
        out_norm_weight: Scale of the first norm, (C,).
        out_norm_bias: Shift of the first norm, (C,).
        out_proj: Matrices of the groups, (K, I, I) with C = K * I.
        norm_weight: Scale of the second norm, (C,).
        norm_bias: Shift of the second norm, (C,).
        proj: Matrix (C, C).
        proj_bias: Bias (C,).
        stream: Residual stream, (B, H, W, C).
        stream_norm_weight: Scale of its norm, (C,).
        stream_norm_bias: Shift of its norm, (C,).
        out_eps: Added to the variances of the first norm.
        eps: Added to the variance of the second norm.
        stream_eps: Added to the variance of the sum.
        dtype: dtype of `out`; None for that of `y`.
        norm_dtype: dtype of the norm; None for that of the sum.

    Returns:
        `out` and the norm of its sum with the stream, both contiguous (B, H, W, C).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.group_modulation(
            y, z, n, gate, out_norm_weight, out_norm_bias, out_proj, norm_weight, norm_bias, proj, proj_bias,
            stream, stream_norm_weight, stream_norm_bias, out_eps, eps, stream_eps, dtype, norm_dtype,
        )  # fmt: skip
    else:
        return operator(
            y, z, n, gate, out_norm_weight, out_norm_bias, out_proj, norm_weight, norm_bias, proj, proj_bias,
            stream, stream_norm_weight, stream_norm_bias, out_eps, eps, stream_eps, dtype, norm_dtype,
        )  # fmt: skip
