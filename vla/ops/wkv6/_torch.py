"""Bidirectional WKV6 in chunks: matrix products between chunks, all pairs of tokens inside one.

Decays are only ever multiplied, never divided or subtracted as logarithms, so that none is too strong: a pair's decay
is the running product of those between its tokens. See README.md for the derivation of the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype

_CHUNK = 16
# Elements of a (chunks, tokens, tokens, N) tensor of pairs: a handful of these stay in a CPU's cache.
_PAIR_ELEMENTS = 1 << 19


class Chunks:
    """The sequences cut into chunks, G = (batch, head) sequences of n chunks of l tokens, padded with decay 1.

    Args:
        r, k, v, w: (B, T, C).
        u: (heads, N).
    """

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor):
        self.dtype = state_dtype(r, k, v, w, u)
        self.heads, self.size = u.shape
        self.batch, self.length = r.shape[:2]
        self.chunk = min(_CHUNK, self.length)
        self.count = -(-self.length // self.chunk)
        self.r, self.k, self.v = self.cut(r), self.cut(k), self.cut(v)
        self.u = u.to(self.dtype).repeat(self.batch, 1)[:, None, None]
        # Beyond this bound the decay is 0 either way, and its derivative's factor exp(w) stays finite.
        self.rate = torch.exp(w.to(self.dtype).clamp(max=80))
        decay = self.cut(torch.exp(-self.rate), 1.0)
        #: Product of the decays in the chunk before each token, after it, and of all, (G, n, l or 1, N).
        self.from_start = F.pad(decay[:, :, :-1], (0, 0, 1, 0), value=1).cumprod(2)
        self.to_end = F.pad(decay[:, :, 1:], (0, 0, 0, 1), value=1).flip(2).cumprod(2).flip(2)
        self.decay, self.total = decay, self.from_start[:, :, -1:] * decay[:, :, -1:]

    def cut(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """(B, T, C) -> (G, n, l, N)."""
        x = x.to(self.dtype).unflatten(2, (self.heads, self.size)).transpose(1, 2).flatten(0, 1)
        x = F.pad(x, (0, 0, 0, self.count * self.chunk - self.length), value=padding)
        return x.unflatten(1, (self.count, self.chunk))

    def join(self, x: Tensor) -> Tensor:
        """(G, n, l, N) -> (B, T, C)."""
        x = x.flatten(1, 2)[:, : self.length].unflatten(0, (self.batch, self.heads))
        return x.transpose(1, 2).flatten(2)

    def states(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of decayed outer products a_i b_i^T of all chunks before, and after, each chunk, (G, n, N, N)."""
        past = (a * self.to_end).transpose(-1, -2) @ b
        future = (a * self.from_start).transpose(-1, -2) @ b
        total = self.total.transpose(-1, -2)
        past = torch.cat((torch.zeros_like(past[:, :1]), past[:, :-1]), dim=1)
        future = torch.cat((future[:, 1:], torch.zeros_like(future[:, :1])), dim=1)
        for c in range(1, self.count):
            past[:, c].addcmul_(total[:, c - 1], past[:, c - 1])
            future[:, -1 - c].addcmul_(total[:, -c], future[:, -c])
        return past, future

    def slabs(self) -> list[slice]:
        """Groups of chunks, as slices of the flattened G * n, small enough for their pairs of tokens."""
        chunks = self.r.shape[0] * self.count
        step = max(1, _PAIR_ELEMENTS // (self.chunk**2 * self.size))
        return [slice(i, i + step) for i in range(0, chunks, step)]

    def pair_decay(self, slab: slice) -> Tensor:
        """Product of the decays strictly between two tokens, 1 for a token and itself: (chunks, l, l, N), symmetric."""
        decay = self.decay.flatten(0, 1)[slab]
        pairs = decay.new_ones(decay.shape[0], self.chunk, self.chunk, self.size)
        for t in range(2, self.chunk):
            torch.mul(pairs[:, t - 1, : t - 1], decay[:, t - 1, None], out=pairs[:, t, : t - 1])
            pairs[:, : t - 1, t] = pairs[:, t, : t - 1]
        return pairs

    def bonus(self, slab: slice) -> Tensor:
        """u of each chunk of a slab, (chunks, 1, N)."""
        return self.u.expand(-1, self.count, -1, -1).flatten(0, 1)[slab]

    def forward(self) -> Tensor:
        past, future = self.states(self.k, self.v)
        y = (self.r * self.from_start) @ past + (self.r * self.to_end) @ future
        flat = y.flatten(0, 1)
        r, k, v = (x.flatten(0, 1) for x in (self.r, self.k, self.v))
        for slab in self.slabs():
            pairs = self.pair_decay(slab)
            pairs.diagonal(dim1=1, dim2=2).copy_(self.bonus(slab).transpose(1, 2).expand(-1, -1, self.chunk))
            score = pairs.mul_(r[slab].unsqueeze(2)).mul_(k[slab].unsqueeze(1)).sum(-1)
            flat[slab].baddbmm_(score, v[slab])
        return self.join(y)

    def backward(self, gy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of r, k, v, w (B, T, C) and u (heads, N)."""
        gy = self.cut(gy)
        past, future = self.states(self.k, self.v)
        g_past, g_future = self.states(self.r, gy)

        # A token's partners in other chunks meet it at the boundaries of its own.
        r_past = self.from_start * (gy @ past.transpose(-1, -2))
        r_future = self.to_end * (gy @ future.transpose(-1, -2))
        k_future = self.to_end * (self.v @ g_future.transpose(-1, -2))
        k_past = self.from_start * (self.v @ g_past.transpose(-1, -2))
        gr, gk = r_past + r_future, k_past + k_future
        gv = (self.k * self.to_end) @ g_future + (self.k * self.from_start) @ g_past

        # The log-decay of a token has a part in every pair around it: both in other chunks, one, or none.
        g_log = (self.total * (past * g_future + future * g_past).sum(-1).unsqueeze(-2)).repeat(1, 1, self.chunk, 1)
        before = torch.ones(self.chunk, self.chunk, dtype=self.dtype, device=gy.device).tril(-1)
        g_log += before.T @ (self.r * r_past + self.k * k_past) + before @ (self.r * r_future + self.k * k_future)

        gu = torch.zeros_like(self.u).expand(-1, self.count, -1, -1).flatten(0, 1).contiguous()
        flat = [x.flatten(0, 1) for x in (self.r, self.k, self.v, gy)]
        g_flat = [x.flatten(0, 1) for x in (gr, gk, gv, g_log)]
        for slab in self.slabs():
            self._backward_pairs(slab, before, *(x[slab] for x in flat), *(x[slab] for x in g_flat), gu[slab])
        gu = gu.unflatten(0, (self.batch, self.heads, self.count)).sum((0, 2, 3))
        return self.join(gr), self.join(gk), self.join(gv), -self.rate * self.join(g_log), gu

    def _backward_pairs(self, slab, before, r, k, v, gy, gr, gk, gv, g_log, gu) -> None:
        """Adds the gradients from the pairs inside the chunks of a slab; tensors (chunks, l, N)."""
        pairs = self.pair_decay(slab)
        diagonal = pairs.diagonal(dim1=1, dim2=2)
        diagonal.copy_(self.bonus(slab).transpose(1, 2).expand(-1, -1, self.chunk))
        g_score = gy @ v.transpose(1, 2)
        score = (pairs * r.unsqueeze(2)).mul_(k.unsqueeze(1)).sum(-1)
        gv.baddbmm_(score.transpose(1, 2), gy)
        gu += (g_score.diagonal(dim1=1, dim2=2).unsqueeze(-1) * r * k).sum(1, keepdim=True)

        weighted = pairs.mul_(g_score.unsqueeze(-1))
        with_r = weighted * r.unsqueeze(2)
        gk += with_r.sum(1)
        gr += (weighted * k.unsqueeze(1)).sum(2)
        # Of every pair, to the tokens strictly between its two.
        products = with_r.mul_(k.unsqueeze(1))
        products = products + products.transpose(1, 2)
        earlier = (before @ products.flatten(2)).unflatten(2, products.shape[2:])
        g_log += (earlier * before.T.unsqueeze(-1)).sum(2)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    return Chunks(r, k, v, w, u).forward().to(v.dtype).contiguous()


def backward(grads: list[Tensor], r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    return Chunks(r, k, v, w, u).backward(grads[0])
