"""The mLSTM cell by blocks of rows, with the weights and the outputs of the `xlstm` package.

The package writes out several matrices of [steps, steps] for each head, of which half is masked. Here a few
rows at a time are worked on, up to their last column, so that they stay in the cache; the backward pass
computes them again instead of keeping them. Any length will do: there is no mask of a fixed size.

Source: xLSTM (arXiv 2405.04517), section 2.3 and appendix A.3; xlstm 2.0.6, `blocks/mlstm/backends.py`.

Shapes: B items, S steps, N heads, D numbers a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, logsigmoid

# As in the package.
_EPS = 1e-6
_ROWS = 128
# Numbers in one block on a CPU: it and what is made of it stay in the second-level cache.
_CPU_BLOCK = 2**17
_WIDEST_GROUP = 64


class MLSTMCell(nn.Module):
    """Takes the place of the package's `mLSTMCell`, with its parameters.

    Args:
        cell: the package's; its `igate`, `fgate` and `outnorm` are taken over.
    """

    igate: nn.Linear
    fgate: nn.Linear
    outnorm: nn.Module

    def __init__(self, cell: Any, heads: int) -> None:
        super().__init__()
        self.igate, self.fgate, self.outnorm = cell.igate, cell.fgate, cell.outnorm
        self._heads = heads

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [B, S, N * D] -> [B, S, N * D]."""
        batch, steps, width = q.shape
        # Both gates at once, and without one tensor of queries, keys and values beside each other.
        weight = torch.cat((self.igate.weight, self.fgate.weight))
        of_q, of_k, of_v = weight.split(width, 1)
        bias = torch.cat((self.igate.bias, self.fgate.bias))
        gates = linear(q, of_q, bias) + linear(k, of_k) + linear(v, of_v)
        i_raw, f_raw = gates.transpose(1, 2).split(self._heads, 1)
        by_head = [x.view(batch, steps, self._heads, -1).transpose(1, 2) for x in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            dtype = self.igate.weight.dtype
            decay = logsigmoid(f_raw.to(dtype)).cumsum(-1)
            h: torch.Tensor = _Parallel.apply(*(x.to(dtype) for x in by_head), i_raw.to(dtype), decay)
        normed: torch.Tensor = self.outnorm(h)
        return normed.transpose(1, 2).reshape(batch, steps, width)


class _Parallel(torch.autograd.Function):
    """(q, k, v [B, N, S, D], input gate and summed log forget gate [B, N, S]) -> h [B, N, S, D].

    With F the summed log forget gate and g = i - F, row t weighs column s <= t by exp(g_s - M_t), where M_t is
    the largest g so far. The stabilizer of the row is m_t = F_t + M_t.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i_raw: torch.Tensor, decay: torch.Tensor
    ) -> torch.Tensor:
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        g = (i_raw - decay).flatten(0, 1)
        top, top_at = g.cummax(-1)
        floor = torch.exp(-(decay.flatten(0, 1) + top))
        h, total = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(g)
        for head, row, columns in _blocks(g):
            weights = torch.bmm(q[head, row], k[head, :columns].transpose(1, 2))
            weights *= _decays(g, top, head, row, columns)
            torch.sum(weights, -1, out=total[head, row])
            torch.bmm(weights, v[head, :columns], out=h[head, row])
        scale = shape[-1] ** -0.5
        total *= scale
        norm = torch.maximum(total.abs(), floor).add_(_EPS)
        h *= (scale / norm).unsqueeze(-1)
        ctx.save_for_backward(q, k, v, g, top, top_at, floor, total, norm, h)
        return h.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, g, top, top_at, floor, total, norm, h = ctx.saved_tensors
        shape, dh = dh.shape, dh.flatten(0, 1)
        scale = shape[-1] ** -0.5
        dnum = dh * (scale / norm).unsqueeze(-1)
        along = (dh * h).sum(-1)
        share = along / norm
        by_total = total.abs() >= floor
        dtotal = torch.where(by_total, -share * total.sign(), 0) * scale
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # What is left of the stabilizer's gradient, as it cancels but for the epsilon.
        dg = torch.zeros_like(g).scatter_add_(-1, top_at, -share * _EPS)
        for head, row, columns in _blocks(g):
            seen = (head, slice(columns))
            weights = torch.bmm(q[head, row], k[seen].transpose(1, 2))
            decays = _decays(g, top, head, row, columns)
            weights *= decays
            dweights = torch.baddbmm(dtotal[head, row].unsqueeze(-1), dnum[head, row], v[seen].transpose(1, 2))
            dv[seen].baddbmm_(weights.transpose(1, 2), dnum[head, row])
            dg[seen] += weights.mul_(dweights).sum(1)
            dweights *= decays
            torch.bmm(dweights, k[seen], out=dq[head, row])
            dk[seen].baddbmm_(dweights.transpose(1, 2), q[head, row])
        # floor / norm, in a form that holds where the floor has overflowed.
        ddecay = torch.where(by_total, 0, along - share * _EPS) - dg
        return dq.view(shape), dk.view(shape), dv.view(shape), dg.view(shape[:3]), ddecay.view(shape[:3])


def _blocks(g: torch.Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Heads, rows and number of columns of every block of the lower triangle of g's [heads, S, S]."""
    heads, steps = g.shape
    for start in range(0, steps, _ROWS):
        columns = min(start + _ROWS, steps)
        size = max(1, _CPU_BLOCK // (columns * (columns - start))) if g.device.type == "cpu" else heads
        for head in range(0, heads, size):
            yield slice(head, head + size), slice(start, columns), columns


def _decays(g: torch.Tensor, top: torch.Tensor, head: slice, row: slice, columns: int) -> torch.Tensor:
    """exp(g_s - M_t) of a block, and 0 above the diagonal, where it may have overflowed."""
    decays = torch.sub(g[head, None, :columns], top[head, row, None]).exp_()
    decays[:, :, row].tril_()
    return decays


class HeadwiseLinear(nn.Module):
    """Takes the place of the package's `LinearHeadwiseExpand` for small heads: several of them as one product.

    Args:
        weight: [heads, out, in] of one head each.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        heads, _, size = weight.shape
        self._group = max(n for n in range(1, heads + 1) if heads % n == 0 and n * size <= max(_WIDEST_GROUP, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, heads * in] -> [B, S, heads * out]."""
        heads, out, size = self.weight.shape
        groups, per = heads // self._group, self._group
        blocks = self.weight.new_zeros(groups, per, size, per, out)
        each = torch.arange(per, device=x.device)
        blocks[:, each, :, each] = self.weight.view(groups, per, out, size).permute(1, 0, 3, 2)
        rows = x.reshape(-1, groups, per * size).transpose(0, 1)
        y = torch.bmm(rows, blocks.view(groups, per * size, per * out))
        return y.transpose(0, 1).reshape(*x.shape[:-1], heads * out)
