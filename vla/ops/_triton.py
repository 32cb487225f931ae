"""Device functions that several operators' kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Triton's own may also be called in kernels, and take the host microseconds for that.
def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up, of numbers from 0 and from 1 on."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, 1 or more."""
    return 1 << (n - 1).bit_length()


@triton.jit
def softplus2(s):
    """`log2(1 + 2^s)`: softplus with the factor log2(e) on both sides, for the GPU's own exponential.

    `max(s, 0) + log2(1 + p)` with `p = 2^-|s|` in (0, 1], the logarithm as `p` times a polynomial: exact to 4e-7 of the
    result however small it is, and cheaper than Triton's `log2`, which is not the GPU's own.
    """
    p = tl.exp2(-tl.abs(s))
    series = 0.0636078417301178 - 0.012319459579885006 * p
    series = -0.15535180270671844 + series * p
    series = 0.25600966811180115 + series * p
    series = -0.3533948063850403 + series * p
    series = 0.48006370663642883 + series * p
    series = -0.7213100790977478 + series * p
    series = 1.4426947832107544 + series * p
    return tl.maximum(s, 0.0) + p * series


@triton.jit
def compose(decay_first, state_first, decay_second, state_second):
    """Two steps `h -> decay * h + state` of a linear recurrence as one, for `tl.associative_scan`."""
    return decay_first * decay_second, decay_second * state_first + state_second


@triton.jit
def _second(first, second):
    return second


@triton.jit
def settle(tile):
    """The same tile, laid out as loads from memory are instead of as the tensor cores left it.

    Triton lets the layout of `tl.dot`'s result spread over all that follows, which puts neighbouring rows in different
    lanes. A scan stops that; this one hands every element through.
    """
    return tl.associative_scan(tile, 0, _second)


@triton.jit
def pick(tile, index, i):
    """Row i of a float32 tile along axis 0, whose positions are `index`.

    The sum is one of integers: where the rows are a thread's own registers, the compiler sees that only one is not 0.
    """
    bits = tl.where(index == i, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    """The same tensor COUNT times in a tuple."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (value,)
    return out


@triton.jit
def leading(x):
    """The leading 11 bits of a float32 number, as many as TF32 has."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32 from operands in bfloat16 ("bf16"), TF32 ("tf32"), or TF32 numbers and their rests ("tf32x3").

    The last is written out because Triton 3.1 and 3.2 fail to compile `tl.dot`'s own among other products.
    """
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "tf32":
        return tl.dot(a, b, input_precision="tf32")
    a_lead, b_lead = leading(a), leading(b)
    out = tl.dot(a - a_lead, b_lead, input_precision="tf32")
    out = tl.dot(a_lead, b - b_lead, out, input_precision="tf32")
    return tl.dot(a_lead, b_lead, out, input_precision="tf32")


def product_precision(*operands: Tensor) -> str:
    """`PRECISION` for operands that come as they are and as products with numbers up to 1.

    bfloat16 if they all are, TF32 if they are of 16 bits (float16's range is too small for sums over a sequence), else
    three TF32 products for one in float32.
    """
    if all(x.dtype == torch.bfloat16 for x in operands):
        # Triton's interpreter cannot multiply bfloat16.
        return "bf16" if operands[0].device.type != "cpu" else "tf32"
    return "tf32" if all(x.dtype.itemsize == 2 for x in operands) else "tf32x3"


def as_rows(x: Tensor) -> Tensor:
    """Map (..., C) as rows (..., C) of neighbouring channels, a copy unless its pixels lie at equal distances."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])
