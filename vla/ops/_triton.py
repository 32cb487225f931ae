"""How kernels are launched, and device functions that several operators' kernels share."""

import copy
import dis
import math
import os
from collections.abc import Callable
from functools import partial, update_wrapper

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _ahead, _replay
from ._registry import triton_version
from ._steps import Places, Step


class Kernel:
    """A Triton kernel that Python launches, `kernel[grid](...)`; a recording takes note of that."""

    def __init__(self, function: Callable, **options):
        self.jit = triton.jit(function, **options)
        update_wrapper(self, function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        _hash(self.jit)
        compilation = _ahead.current()
        if compilation is not None:
            return partial(compilation.add, self)
        recording = _replay.current()
        return self.jit[grid] if recording is None else partial(self._record, recording, grid)

    def compile(self, *args, **kwargs):
        """What would be launched with these arguments, compiled."""
        _hash(self.jit)
        return self.jit.warmup(*args, grid=(1,), **kwargs)

    def _record(self, recording: _replay.Recording, grid: tuple[int, ...], *args, **kwargs) -> None:
        with _disable_current_modes():
            binary = self.jit[grid](*args, **kwargs)
        if binary is None:  # interpreted
            recording.complete = False
            return
        arguments = [*args, *(kwargs[name] for name in self.jit.arg_names[len(args) :])]
        recording.launches = True
        recording.steps.append(_Launch(binary, grid, arguments, recording.places(arguments)))


def _hash(function) -> None:
    """Gives a Triton function the name that it has in Triton's cache on disk.

    Triton leaves the constants of a function that it calls out of that if this one has no name yet: what is compiled
    would be found again only where kernels are launched in the same order.
    """
    if getattr(function, "hash", "") is None:  # not yet, and not interpreted
        for instruction in dis.get_instructions(function.fn):
            called = function.fn.__globals__.get(instruction.argval) if instruction.opname == "LOAD_GLOBAL" else None
            if isinstance(called, triton.JITFunction):
                _hash(called)
        function.cache_key  # noqa: B018  sets it


class _Launch(Step):
    """A compiled kernel on its grid.

    Triton's launch looks at every argument to find the binary that is compiled for the like. This is what it does then.

    Args:
        binary: What Triton's launch returned.
        grid: Numbers of programs, up to three.
        arguments: All that the kernel has, constants too.
        places: See `Recording.places`.
    """

    is_launch = True

    def __init__(self, binary, grid: tuple[int, ...], arguments: list, places: list[tuple[int, int, int]]):
        grid = (*grid, 1, 1)[:3]
        self.launch = binary[grid]
        self.run = binary.run
        # What `launch` would put before the arguments if there were no hooks.
        head = [*grid, None, binary.function, binary.packed_metadata, None, None, None]
        self.length = len(head)
        self.arguments = [*head, *(None if isinstance(x, Tensor) else x for x in arguments)]
        self.places = [(self.length + i, slot, offset) for i, slot, offset in places]

    def slots(self) -> list[int]:
        return [slot for _, slot, _ in self.places]

    def repeat(self, slots: list[Tensor], pointers: list[int], stream: int) -> None:
        arguments = self.arguments.copy()
        for i, slot, offset in self.places:
            arguments[i] = pointers[slot] + offset
        if _RUN_IS_KNOWN and not _has_hooks():
            arguments[_STREAM] = stream
            self.run(*arguments)
        else:
            self.launch(*arguments[self.length :], stream=stream)

    def bind(self, places: Places) -> bool:
        if not _RUN_IS_KNOWN or not places.stay(self.slots()):
            return False
        arguments = self.arguments.copy()
        for i, slot, offset in self.places:
            arguments[i] = places.pointers[slot] + offset
        arguments[_STREAM] = places.stream
        places.steps.append(_in_short(self.run, arguments))
        return True

    def is_watched(self) -> bool:
        return _has_hooks()


def _in_short(run: Callable, arguments: list) -> Callable[[], object]:
    """`run(*arguments)` without arguments: of Triton's launcher in Python, the call that it ends with."""
    sizes = (getattr(run, f"{kind}_scratch_size", None) for kind in ("global", "profile"))
    if not hasattr(run, "launch") or any(size != 0 for size in sizes):  # memory to allocate for each launch
        return partial(run, *arguments)
    calls: list[tuple] = []
    listening = copy.copy(run)
    listening.launch = lambda *args: calls.append(args)
    listening(*arguments)
    return partial(run.launch, *calls[0]) if len(calls) == 1 else partial(run, *arguments)


# Versions of Triton whose `CompiledKernel.run` takes what `_Launch` gives it; `CompiledKernel.__getitem__` is public.
_RUN_IS_KNOWN = (3, 4) <= triton_version() <= (3, 8)
_STREAM = 3


def _has_hooks() -> bool:
    """Whether somebody, like a profiler, wants to know of every launch."""
    # A hook or None in Triton 3.4, later a chain of hooks.
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


triton.knobs.compilation.listener = partial(_ahead.listen, triton.knobs.compilation.listener)


def kernel(function: Callable | None = None, **options) -> Callable:
    """Decorator like `triton.jit`, with its options, of functions that Python launches. Those they call need none."""
    return partial(Kernel, **options) if function is None else Kernel(function, **options)


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
def reciprocal(x):
    """1 / x of positive numbers, in 2 instructions where a division takes 8 and is no more exact than 2e-7 either."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def mean_of_rows(tiles, SIZE: tl.constexpr):
    """Means (M, 1) of rows of SIZE numbers, which are tiles side by side, (M, ..), and zeros."""
    total = tl.sum(tiles[0], 1)
    for i in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[i], 1)
    # A product with a rounded reciprocal, or a division which is not exact, gives a row of equal numbers a variance.
    if SIZE & (SIZE - 1) == 0:
        total *= 1.0 / SIZE
    else:
        total = tl.div_rn(total, SIZE)
    return total[:, None]


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
def normal_tail(a):
    """Probability of more than a >= 0 in a normal distribution.

    2 to the power of a polynomial, that which makes the largest error of a times the probability smallest (7e-7): the
    exponential is the only operation that is not a multiply-add.
    """
    p = 0.00719424677916423 - 0.00048760740339161854 * a
    p = -0.05213135594882522 + p * a
    p = -0.4596203768090395 + p * a
    p = -1.1509821430367992 + p * a
    return tl.exp2(-1.0000051087301474 + p * a)


@triton.jit
def gelu(s):
    """GELU with the exact distribution function."""
    a = tl.abs(s)
    return tl.maximum(s, 0.0) - a * normal_tail(a)


@triton.jit
def gelu_slope(s):
    """Derivative of `gelu`."""
    tail = normal_tail(tl.abs(s))
    density = tl.exp2(s * s * (-0.5 * LOG2E) - 1.3257480647361593)
    return tl.where(s < 0.0, tail, 1.0 - tail) + s * density


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
def rounded_product(a, b):
    """a * b in float32, for a sum in which a thread has a single term.

    The addition to another thread's must not become one instruction with the product, which would be exact in the own
    term and rounded in the other: threads that share a sum would have different last digits, and race to store it.
    """
    return tl.fma(a, b, 0.0)


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
def _one_round():
    """1, which LLVM knows, so that it leaves no loop; the stages of the compiler before it do not."""
    return tl.where(tl.num_programs(0) > 0, 1, 0)


@triton.jit
def load_apart(pointers, mask=None, other=None):
    """`tl.load` of one of many tensors, which the compiler looks at apart from the others.

    Before Triton chooses the layout of a load or a store, it follows everything that hangs together with it, from the
    operation which its pointers come from and from each one that it meets: the time grows with the cube of a kernel's
    length. Pointers that a loop hands on come from no operation. The layout then is the one for this tensor alone, the
    same if a thread has a single element or all tensors have neighbours of one size.
    """
    out = tl.zeros(pointers.shape, pointers.dtype.element_ty)
    for _ in tl.range(0, _one_round(), num_stages=1):
        out = tl.load(pointers, mask, other)
        pointers += 16  # after which addresses would be as even
    return out


@triton.jit
def store_apart(pointers, value, mask=None):
    """`tl.store`, see `load_apart`."""
    for _ in tl.range(0, _one_round(), num_stages=1):
        tl.store(pointers, value, mask)
        pointers += 16


@triton.jit
def last_first():
    """Number of a program, where the last one is to have what comes first.

    For maps which the kernel before, a library's product, has written from the first pixel to the last: what it wrote
    last is in the cache still, and read before it has to leave. So it is for the kernel behind.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


# Columns of the narrowest product: 8 as tensor cores have them, which Triton before 3.6 does not multiply.
NARROWEST = tl.constexpr(8 if triton_version() >= (3, 6) else 16)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# dtypes of 16 bits as kernels have them.
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Whether kernels may name NVIDIA's instructions.
PTX = tl.constexpr(torch.version.cuda is not None and not INTERPRETED.value)


def at_most(registers: int | None) -> dict:
    """Launch option that gives a thread at most so many registers, where a compiler has one: NVIDIA's."""
    return {} if registers is None or torch.version.cuda is None else {"maxnreg": registers}


@triton.jit
def dot(a, b):
    """a @ b in float32 from operands of 16 bits as they are."""
    if INTERPRETED:
        # Triton's interpreter multiplies the bits of bfloat16.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, total):
    """total + a @ b, see `dot`."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=total, input_precision="ieee")


@triton.jit
def unpack(pairs, dtype: tl.constexpr):
    """Pairs of neighbouring numbers of 16 bits, integers (S, C), in float32 (S, 2 * C): fewer instructions a number."""
    if dtype == tl.bfloat16:
        # The upper half of the same number in float32.
        low, high = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.join(low, high).reshape(pairs.shape[0], 2 * pairs.shape[1])


@triton.jit
def pack(low, high, dtype: tl.constexpr):
    """Two float32 numbers rounded to 16 bits as one integer, the inverse of `unpack`."""
    if PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    elif PTX:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, True, 1)
    else:
        low = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        high = high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 65535) | (high << 16)


def starts_at_pair(x: Tensor) -> bool:
    """Whether numbers of 16 bits can be seen as integers: they begin at a multiple of 4 bytes, in their storage too."""
    return _ahead.address(x) % 4 == 0 and x.storage_offset() % 2 == 0


# Rows may be a tuple of one or two tiles, of LEAD and REST columns, as their length need not be a power of two, as a
# tile's width must. Columns outside are zero.


def lead_and_rest(size: int) -> tuple[int, int]:
    """LEAD and REST for rows of `size` numbers, powers of two from 16 on; REST may be 0."""
    whole = max(16, next_power_of_2(size))
    lead = whole // 2
    if lead < 16 or size <= lead or size > lead + lead // 2:
        return whole, 0
    return lead, max(16, next_power_of_2(size - lead))


@triton.jit
def tile_columns(i, LEAD: tl.constexpr, REST: tl.constexpr):
    """Numbers of the columns of tile i."""
    return tl.arange(0, LEAD) if i == 0 else LEAD + tl.arange(0, REST)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, LEAD: tl.constexpr, REST: tl.constexpr):
    """Tiles of zeros in float32."""
    tiles = (tl.zeros((ROWS, LEAD), tl.float32),)
    if REST:
        tiles = tiles + (tl.zeros((ROWS, REST), tl.float32),)
    return tiles


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


@kernel(do_not_specialize=["count", "size"])
def sum_parts_kernel(parts, sums, count, size, factor, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """Sums (..., size) of partial sums (..., count, size), in a fixed order, times a factor."""
    blocks = tl.cdiv(size, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    entry = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for first in range(0, count, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[:, None]
        row = batch * count + part
        total += tl.load(parts + row * size + entry, (part < count) & (entry < size), 0.0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + batch * size + entry, (tl.sum(total, 0) * factor).to(sums.dtype.element_ty), entry < size)


def sum_parts(parts: Tensor, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums over the last but one dimension of float32 numbers, times a factor."""
    *batch, count, size = parts.shape
    sums = parts.new_empty(*batch, size, dtype=dtype)
    block = 8 if size < 2**14 else 32  # neighbours in one sector of memory, or in one line of the cache
    sum_parts_kernel[(math.prod(batch) * cdiv(size, block),)](
        parts, sums, count, size, factor, BLOCK_P=128, BLOCK=block
    )
    return sums


@kernel
def sum_maps_kernel(maps, total, count, size, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum (size,) of maps (count, size)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    way = tl.cast(size, tl.int64)
    value = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            n = first + j
            value += tl.load(maps + n * way + at, (n < count) & (at < size), 0.0).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), at < size)


def sum_maps(maps: Tensor, total: Tensor) -> None:
    """Writes the sum of a few large maps, over the first dimension and taken in float32 in a fixed order."""
    size = total.numel()
    sum_maps_kernel[(cdiv(size, 1024),)](maps, total, len(maps), size, AT_ONCE=4, BLOCK=1024)
