"""Device functions that several operators' kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus2(s):
    """`log2(1 + 2^s)`: softplus with the factor log2(e) on both sides, where the GPU's own exponentials are.

    Near 0 the logarithm of `1 + p` has no digits of a small `p` left; its series has.
    """
    p = tl.exp2(tl.minimum(s, 126.0))
    near = p * (1.4426950408889634 + p * (-0.7213475204444817 + p * (0.4808983469629878 - p * 0.36067376022224085)))
    return tl.maximum(tl.where(p < 0.03125, near, tl.log2(1.0 + p)), s)


@triton.jit
def compose(decay_first, state_first, decay_second, state_second):
    """Two steps `h -> decay * h + state` of a linear recurrence as one, for `tl.associative_scan`."""
    return decay_first * decay_second, decay_second * state_first + state_second
