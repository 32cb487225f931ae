"""What the selective scan's Triton kernels and their launchers share."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, kernel, softplus2

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


@triton.jit
def prefetch(pointers):
    """Has NVIDIA's second-level cache fetch the lines that hold these addresses. Nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@kernel
def selective_scan_add_kernel(
    parts_ptr,
    out_ptr,
    size,
    parts,
    parts_g,
    parts_p,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sums `out` (groups, size) over the parts (groups, parts, size), in a fixed order."""
    blocks = tl.cdiv(size, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        at = parts_ptr + group * parts_g + part.to(tl.int64) * parts_p + column[None, :]
        total += tl.sum(tl.load(at, (part < parts) & valid[None, :], 0.0), 0)  # (p, c)
    tl.store(out_ptr + group * size + column, total, valid)


class Sizes:
    """Sizes of one call, and what follows from them alone."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.device, self.itemsize = u.device, u.element_size()
        self.batch, self.channels, self.length = u.shape
        self.states = A.shape[1]
        self.B_channels, self.C_channels = self._channels_of(B), self._channels_of(C)
        # Rows of a program share a group of B and a group of C.
        self.span = math.gcd(*(k for k in (self.B_channels, self.C_channels, self.channels) if k))

    def _channels_of(self, projection: Tensor) -> int:
        """Channels of a group of B or C, 0 if it is constant along the steps."""
        if projection.dim() == 2:
            return 0
        return self.channels // (1 if projection.dim() == 3 else projection.shape[1])

    def programs(self, rows: int) -> int:
        return self.batch * (self.channels // self.span) * cdiv(self.span, rows)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


class Scan(Sizes):
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
        super().__init__(u, A, B, C)
        self.u, self.delta, self.z, self.B, self.C = (steps_last(x) for x in (u, delta, z, B, C))
        self.A = A
        self.softplus = softplus
        self.D = None if D is None else D.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.B_strides, self.C_strides = _projection_strides(self.B), _projection_strides(self.C)

    @property
    def takes_ptx(self) -> bool:
        """Whether the device runs PTX; meta tensors stand for NVIDIA's."""
        return self.device.type in ("cuda", "meta") and torch.version.hip is None

    def alignment(self, *tensors: Tensor | None) -> int:
        """Largest power of two up to 16 that divides the length and all strides between rows of equal steps."""
        sizes = [self.length]
        for x in (self.u, self.delta, self.z, self.B, self.C, *tensors):
            if x is not None and x.dim() > 2:
                sizes += x.stride()[:-1]
        return next(k for k in (16, 8, 4, 2, 1) if all(size % k == 0 for size in sizes))


class Parts:
    """Where programs leave their parts of the gradients that are sums over rows, steps or sequences.

    Attributes:
        by_channel: Those of parameters, (B, parts, rows, D): N rows for A, N each for B and C if they are constant,
            then one for D and one for the bias.
        by_step: Those of B and C that are not constant, (B, programs, 1 or 2, N, L), or None.
    """

    def __init__(self, scan: Scan, parts: int, programs: int):
        self.scan = scan
        self.constant = [scan.B_channels == 0, scan.C_channels == 0]
        self.by_channel = scan.new(scan.batch, parts, scan.states * (1 + sum(self.constant)) + 2, scan.channels)
        varying = 2 - sum(self.constant)
        shape = (scan.batch, programs // scan.batch, varying, scan.states, scan.length)
        self.by_step = scan.new(*shape) if varying else None

    def totals(self) -> tuple[Tensor | None, ...]:
        """Gradients of A, B, C, D and the bias."""
        scan = self.scan
        states = scan.states
        by_channel = self.by_channel.sum((0, 1))
        projections, constants, varying = [], 1, 0
        for like, constant in zip((scan.B, scan.C), self.constant, strict=True):
            if constant:
                projections.append(by_channel[constants * states : (constants + 1) * states].t())
                constants += 1
            else:
                projections.append(self._add(like, varying))
                varying += 1
        return (
            by_channel[:states].t(),
            *projections,
            None if scan.D is None else by_channel[-2],
            None if scan.bias is None else by_channel[-1],
        )

    def _add(self, like: Tensor, index: int) -> Tensor:
        """Gradient of B or C (B, [G,] N, L), in its type."""
        batch, programs, varying, states, length = self.by_step.shape
        groups = 1 if like.dim() == 3 else like.shape[1]
        size, parts = states * length, programs // groups
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        block = 256
        selective_scan_add_kernel[(batch * groups * cdiv(size, block),)](
            self.by_step[:, :, index],
            out,
            size,
            parts,
            parts * varying * size,
            varying * size,
            BLOCK=block,
            PARTS=4,
            num_warps=1,
        )
        return out


def _projection_strides(x: Tensor) -> tuple[int, ...]:
    """Strides (b, g, n, l) of B or C."""
    if x.dim() == 2:
        return 0, x.stride(0), x.stride(1), 0
    if x.dim() == 3:
        return x.stride(0), 0, x.stride(1), x.stride(2)
    return x.stride()


def steps_last(x: Tensor | None) -> Tensor | None:
    """`x` with its steps next to each other in memory, unless it is constant along them."""
    return x if x is None or x.dim() == 2 or x.stride(-1) <= 1 or x.shape[-1] == 1 else x.contiguous()


def strides_of(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
