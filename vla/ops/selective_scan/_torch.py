"""Vectorised selective scan: segments of bounded size, each a linear recurrence over the time-first layout."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype
from .._recurrence import linear_recurrence_

# Elements of one (steps, S, N, D) state tensor: a handful of these stay in a CPU's cache.
_SEGMENT_ELEMENTS = 1 << 19


class TimeFirst:
    """A selective scan in the layout of the recurrence: steps first, channels last and contiguous.

    S counts sequences, D all channels; B and C have G groups of D // G channels each.

    Args:
        u: Input, (L, S, D).
        dt: Time step after bias and softplus, (L, S, D).
        A: Diagonal of the state matrix, (N, D).
        B: Input projection, (L or 1, S or 1, N, G).
        C: Output projection, (L or 1, S or 1, N, G).
    """

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.u, self.dt, self.A, self.B, self.C = u, dt, A, B, C
        self.length, self.sequences, self.channels = u.shape
        self.states = A.shape[0]

    def segments(self) -> list[slice]:
        step = self.sequences * self.channels * self.states
        size = max(16, _SEGMENT_ELEMENTS // max(1, step))
        return [slice(t, min(t + size, self.length)) for t in range(0, self.length, size)]

    def _at(self, projection: Tensor, segment: slice) -> Tensor:
        """B or C of a segment as (l or 1, S or 1, N, G, 1)."""
        return (projection if projection.shape[0] == 1 else projection[segment]).unsqueeze(-1)

    def _by_group(self, x: Tensor, projection: Tensor) -> Tensor:
        """(l, S, N, D) -> (l, S, N, G, D // G)."""
        groups = projection.shape[-1]
        return x.unflatten(-1, (groups, self.channels // groups))

    def decay(self, segment: slice) -> Tensor:
        return (self.dt[segment].unsqueeze(2) * self.A).exp_()

    def run(self, segment: slice, decay: Tensor, initial: Tensor | None) -> Tensor:
        """States (l, S, N, D) of a segment; `decay` is overwritten."""
        x = self.dt[segment] * self.u[segment]
        h = self._by_group(x.unsqueeze(2), self.B) * self._at(self.B, segment)
        return linear_recurrence_(decay, h.flatten(-2), initial)

    def read(self, segment: slice, h: Tensor) -> Tensor:
        """Outputs (l, S, D) from the states of a segment."""
        return (self._by_group(h, self.C) * self._at(self.C, segment)).sum(2).flatten(-2)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Outputs (L, S, D) and the last state (S, N, D)."""
        y = torch.empty_like(self.u)
        state = None
        for segment in self.segments():
            h = self.run(segment, self.decay(segment), state)
            y[segment] = self.read(segment, h)
            state = h[-1]
        return y, state

    def boundaries(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Segments from the last to the first, each with the state that enters it."""
        segments = self.segments()
        entering = [None]
        for segment in segments[:-1]:
            entering.append(self.run(segment, self.decay(segment), entering[-1])[-1].clone())
        return zip(reversed(segments), reversed(entering), strict=True)

    def backward(self, gy: Tensor, g_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of u, dt, A, B, C, from those of the outputs (L, S, D) and the last state (S, N, D)."""
        gu, gdt = torch.empty_like(self.u), torch.empty_like(self.dt)
        gA = torch.zeros_like(self.A)
        gB, gC = torch.zeros_like(self.B), torch.zeros_like(self.C)
        carry = g_state
        for segment, entering in self.boundaries():
            u, dt = self.u[segment], self.dt[segment]
            decay = self.decay(segment)
            h = self.run(segment, decay.clone(), entering)
            g_out = gy[segment]
            self._accumulate(gC, segment, self._by_group(h * g_out.unsqueeze(2), self.C))

            # Adjoint states: g_t = C_t gy_t + decay_{t+1} g_{t+1}.
            g = (self._by_group(g_out.unsqueeze(2), self.C) * self._at(self.C, segment)).flatten(-2)
            if carry is not None:
                g[-1] += carry
            following = torch.empty_like(decay)
            following[:-1] = decay[1:]
            following[-1] = 0
            linear_recurrence_(following, g, reverse=True)
            carry = decay[0] * g[0]

            x = dt * u
            self._accumulate(gB, segment, self._by_group(g * x.unsqueeze(2), self.B))
            gx = (self._by_group(g, self.B) * self._at(self.B, segment)).sum(2).flatten(-2)
            gu[segment] = gx * dt
            # h_{t-1}, reusing the memory of h.
            h = h.roll(1, 0)
            h[0] = 0 if entering is None else entering
            g_log_decay = g.mul_(h).mul_(decay)
            gdt[segment] = gx * u + (g_log_decay * self.A).sum(2)
            gA += (g_log_decay * dt.unsqueeze(2)).sum((0, 1))
        return gu, gdt, gA, gB, gC

    def _accumulate(self, grad: Tensor, segment: slice, products: Tensor) -> None:
        """Adds (l, S, N, G, D // G) products to a projection's gradient, summed over what it was broadcast along."""
        part = grad if grad.shape[0] == 1 else grad[segment]
        part += products.sum(-1).sum_to_size(part.shape)


def time_step(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Biased time step, through softplus if asked; channels last."""
    delta = delta if bias is None else delta + bias
    return F.softplus(delta) if softplus else delta


def time_step_gradient(g: Tensor, delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Gradient of `time_step` with respect to the biased time step."""
    if not softplus:
        return g
    return g * torch.sigmoid(delta if bias is None else delta + bias)


def _projection(x: Tensor, dtype: torch.dtype) -> Tensor:
    """B or C in any accepted form -> (L or 1, S or 1, N, G)."""
    if x.dim() == 2:
        return x.t()[None, None].to(dtype)
    if x.dim() == 3:
        x = x[:, None]
    return x.permute(3, 0, 2, 1).to(dtype)


def _projection_gradient(g: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 2:
        return g[0, 0].t()
    g = g.permute(1, 3, 2, 0)
    return g[:, 0] if like.dim() == 3 else g


def _time_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D, L) -> (L, B, D), contiguous."""
    return x.permute(2, 0, 1).to(dtype).contiguous()


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(u)
    bias = None if delta_bias is None else delta_bias.to(dtype)
    u_ = _time_first(u, dtype)
    dt = time_step(_time_first(delta, dtype), bias, delta_softplus)
    A = A.t().to(dtype)
    y, state = TimeFirst(u_, dt, A, _projection(B, dtype), _projection(C, dtype)).forward()
    if D is not None:
        y.addcmul_(u_, D.to(dtype))
    if z is not None:
        y.mul_(F.silu(_time_first(z, dtype)))
    return y.permute(1, 2, 0).to(u.dtype).contiguous(), state.transpose(1, 2).contiguous()


def backward(
    grads: list[Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    dtype = state_dtype(u)
    bias = None if delta_bias is None else delta_bias.to(dtype)
    u_, delta_ = _time_first(u, dtype), _time_first(delta, dtype)
    scan = TimeFirst(
        u_, time_step(delta_, bias, delta_softplus), A.t().to(dtype), _projection(B, dtype), _projection(C, dtype)
    )
    gy = _time_first(grads[0], dtype)
    g_z = None
    if z is not None:
        z_ = _time_first(z, dtype)
        gate = torch.sigmoid(z_)
        y, _ = scan.forward()
        if D is not None:
            y.addcmul_(u_, D.to(dtype))
        g_z = (gy * y * gate * (1 + z_ * (1 - gate))).permute(1, 2, 0)
        gy = gy * z_ * gate
    gu, gdt, gA, gB, gC = scan.backward(gy, grads[1].transpose(1, 2).to(dtype))
    g_D = None
    if D is not None:
        g_D = (gy * u_).sum((0, 1))
        gu.addcmul_(gy, D.to(dtype))
    g_delta = time_step_gradient(gdt, delta_, bias, delta_softplus)
    g_bias = None if bias is None else g_delta.sum((0, 1))
    return (
        gu.permute(1, 2, 0),
        g_delta.permute(1, 2, 0),
        gA.t(),
        _projection_gradient(gB, B),
        _projection_gradient(gC, C),
        g_D,
        g_z,
        g_bias,
    )
