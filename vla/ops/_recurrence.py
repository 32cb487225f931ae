"""First-order linear recurrences in PyTorch, without a Python loop over all steps where that would be slow."""

import math

from torch import Tensor

# Below this many elements per step the cost of a step is its launch, so several chunks share one.
_WIDE_STEP = 4096


def linear_recurrence_(decay: Tensor, x: Tensor, initial: Tensor | None = None, reverse: bool = False) -> Tensor:
    """In place `x_t += decay_t * x_{t-1}` along dimension 0 (`x_{t+1}` with `reverse`), with `x_{-1} = initial`.

    Only products and sums of the given decays are formed, never quotients or differences of logarithms, so any
    decay in [0, 1] is safe, however strong or weak. Narrow steps are run as `sqrt(2 L)` chunks side by side: the states
    inside every chunk from zero, then the chunk boundaries one after the other, then the boundaries' contribution.

    Args:
        decay: (L, ...), contiguous; overwritten.
        x: (L, ...), contiguous; becomes the states.
        initial: State before the first step, (...).
        reverse: Run from the last step to the first.

    Returns:
        `x`.
    """
    length = x.shape[0]
    width = x[0].numel()
    chunks = 1 if width >= _WIDE_STEP else int(math.sqrt(2 * length))
    span = length // chunks
    if initial is not None:
        x[-1 if reverse else 0].addcmul_(decay[-1 if reverse else 0], initial)
    if chunks == 1 or span < 4:
        _sequential_(decay, x, reverse)
        return x

    # The steps that fill no chunk come last in the order of the recurrence.
    cut = length - chunks * span
    if reverse:
        main, rest = slice(cut, length), slice(0, cut + 1)
    else:
        main, rest = slice(0, length - cut), slice(length - cut - 1, length)
    decay_main, x_main = (t[main].unflatten(0, (chunks, span)) for t in (decay, x))
    decays, states = decay_main.unbind(1), x_main.unbind(1)
    order = range(span - 2, -1, -1) if reverse else range(1, span)
    last = 0 if reverse else span - 1
    before = 1 if reverse else -1
    for t in order:
        states[t].addcmul_(decays[t], states[t + before])
        decays[t].mul_(decays[t + before])
    ends, spans = states[last].unbind(0), decays[last].unbind(0)
    for c in range(chunks - 2, -1, -1) if reverse else range(1, chunks):
        ends[c].addcmul_(spans[c], ends[c + before])
    # The end of each chunk is final now; the others still miss what entered their chunk.
    if reverse:
        x_main[:-1, 1:].addcmul_(decay_main[:-1, 1:], x_main[1:, :1])
    else:
        x_main[1:, :-1].addcmul_(decay_main[1:, :-1], x_main[:-1, -1:])
    _sequential_(decay[rest], x[rest], reverse)
    return x


def _sequential_(decay: Tensor, x: Tensor, reverse: bool) -> None:
    decays, states = decay.unbind(0), x.unbind(0)
    before = 1 if reverse else -1
    for t in range(len(states) - 2, -1, -1) if reverse else range(1, len(states)):
        states[t].addcmul_(decays[t], states[t + before])
