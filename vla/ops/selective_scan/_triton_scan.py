"""What the selective scan's Triton kernels and their launchers share."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, softplus2

# Programs that keep a GPU busy. Fewer rows than that, and parts of a sequence run in parallel.
MIN_PROGRAMS = 1024


@triton.jit
def exponent(s, inside, SOFTPLUS: tl.constexpr):
    """`log2(e)` times the time step, from `log2(e)` times the biased `delta`: times `A` it is the exponent of `exp2`.

    Padding neither decays nor adds, so that the states behind it are those in front of it. Under softplus it was loaded
    as minus infinity.
    """
    if SOFTPLUS:
        return softplus2(s)
    return tl.where(inside, s, 0.0)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """`stride`, a multiple of ALIGN as its caller knows: the compiler then may use wide loads."""
    return stride // ALIGN * ALIGN


@triton.jit
def place(program, span, channels, rows):
    """Sequence of a program, the first channel of its span, and its first row there.

    Rows of a span share a group of B and a group of C.
    """
    blocks = tl.cdiv(span, rows)
    per_sequence = (channels // span) * blocks
    block = program % per_sequence
    return (program // per_sequence).to(tl.int64), (block // blocks) * span, (block % blocks) * rows


class Scan:
    """Arguments of one call as the kernels want them."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
    ):
        self.u, self.delta, self.z, self.B, self.C = (steps_last(x) for x in (u, delta, z, B, C))
        self.A = A
        self.softplus = softplus
        self.batch, self.channels, self.length = u.shape
        self.states = A.shape[1]
        self.D = None if D is None else D.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.B_strides, self.B_channels = self._projection(self.B)
        self.C_strides, self.C_channels = self._projection(self.C)
        # Rows of a program share a group of B and a group of C.
        self.span = math.gcd(*(k for k in (self.B_channels, self.C_channels, self.channels) if k))

    def _projection(self, x: Tensor) -> tuple[tuple[int, ...], int]:
        """Strides (b, g, n, l) of B or C and the channels of a group, 0 if constant along the steps."""
        if x.dim() == 2:
            return (0, x.stride(0), x.stride(1), 0), 0
        if x.dim() == 3:
            return (x.stride(0), 0, x.stride(1), x.stride(2)), self.channels
        return x.stride(), self.channels // x.shape[1]

    def programs(self, rows: int) -> int:
        return self.batch * (self.channels // self.span) * cdiv(self.span, rows)

    def alignment(self, *tensors: Tensor | None) -> int:
        """Largest power of two up to 16 that divides the length and all strides between rows of equal steps."""
        sizes = [self.length]
        for x in (self.u, self.delta, self.z, self.B, self.C, *tensors):
            if x is not None and x.dim() > 2:
                sizes += x.stride()[:-1]
        return next(k for k in (16, 8, 4, 2, 1) if all(size % k == 0 for size in sizes))

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)


def steps_last(x: Tensor | None) -> Tensor | None:
    """`x` with its steps next to each other in memory, unless it is constant along them."""
    return x if x is None or x.dim() == 2 or x.stride(-1) <= 1 or x.shape[-1] == 1 else x.contiguous()


def strides_of(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
