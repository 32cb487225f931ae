"""What the line scan's GPU kernels share: special functions, and choices between sweeps."""

import triton
import triton.language as tl

from .._triton import PTX

# The least sum of sigmoids that divides them.
_MIN_TOTAL = tl.constexpr(1e-7)
# Logits are multiplied by -log2(e) and clamped where a sigmoid is 2.4e-13, so that products of three stay finite.
_STEEPEST = tl.constexpr(41.9)
# In place of a logit whose neighbour does not exist.
_CLOSED = tl.constexpr(1e3)


# Both without Triton's care for denormal numbers, which do not occur here: a third of the gates' instructions.
@triton.jit
def _exp2(x):
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def _inverse(x):
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1 / x


@triton.jit
def _halves(h):
    """A float32 tile as the sum of two bfloat16 tiles, good to 16 bits."""
    high = (h.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (h - high).to(tl.bfloat16)


@triton.jit
def _pick(k, v0, v1, v2, v3):
    """The k-th of four numbers."""
    return tl.where(k == 0, v0, tl.where(k == 1, v1, tl.where(k == 2, v2, v3)))
