"""The sLSTM cell as one loop over time, with the weights and the outputs of the `xlstm` package.

The package's `vanilla` cell copies its recurrent matrix for every item of the batch at every step, and its
`cuda` cell needs a compiler at run time. Here one step is one batched matrix product over the heads, with
the new matrix multiplied from its place, and a dozen pointwise operations; the backward pass is written
out, so that all that does not recur is computed for all steps at once.

Source: xLSTM (arXiv 2405.04517), section 2.2; the cell of xlstm 2.0.6, `blocks/slstm/src/vanilla`.

Shapes: B items, S steps, N heads, D numbers a head, G = 4 gates in the order in which the package has them:
input, forget, cell input, output.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

GATES = 4


class SLSTMCell(nn.Module):
    """Takes the place of the package's `sLSTMCell` in its `sLSTMLayer`, with its parameters in `vanilla` layout.

    Attributes:
        _recurrent_kernel_: [N, G * D, D].
        _bias_: [G * N * D].
    """

    def __init__(self, recurrent_kernel: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        heads, rows, size = recurrent_kernel.shape
        if rows != GATES * size or bias.shape != (heads * rows,):
            raise ValueError(
                f"recurrent kernel {tuple(recurrent_kernel.shape)} and bias {tuple(bias.shape)}: "
                "need [heads, 4 * size, size] and [4 * heads * size]"
            )
        self._recurrent_kernel_ = nn.Parameter(recurrent_kernel.detach().clone())
        self._bias_ = nn.Parameter(bias.detach().clone())

    def forward(self, gates: torch.Tensor, state: None = None) -> tuple[torch.Tensor, None]:
        """Runs over whole sequences, from the zero state.

        Args:
            gates: [B, S, G * N * D], what the input gives to each gate before its activation.
            state: must be None; the cell does not go on from a state.

        Returns:
            y [B, N, S, D], and None where the package has the last state.
        """
        if state is not None:
            raise NotImplementedError("this cell always starts from the zero state")
        with torch.autocast(gates.device.type, enabled=False):
            y: torch.Tensor = _Recurrence.apply(
                gates.to(self._bias_.dtype), self._recurrent_kernel_, self._bias_, torch.is_grad_enabled()
            )
        return y.permute(2, 1, 0, 3), None


class _Recurrence(torch.autograd.Function):
    """(gates [B, S, G * N * D], kernel [N, G * D, D], bias [G * N * D]) -> y [S, N, B, D]."""

    @staticmethod
    def forward(
        ctx: Any, gates: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, with_gradient: bool
    ) -> torch.Tensor:
        heads, _, size = kernel.shape
        batch, steps, _ = gates.shape
        raw = gates.new_empty(steps, heads, batch, GATES, size)
        by_head = gates.reshape(batch, steps, GATES, heads, size).permute(1, 3, 0, 2, 4)
        torch.add(by_head, bias.view(GATES, heads, 1, size).permute(1, 2, 0, 3), out=raw)
        y = gates.new_empty(steps, heads, batch, size)
        keep = with_gradient and any(ctx.needs_input_grad)
        history = _run(raw, kernel, y, keep)
        if keep:
            ctx.save_for_backward(kernel, raw, y, history)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        kernel, raw, y, history = ctx.saved_tensors
        steps, heads, batch, _, size = raw.shape
        draw = _run_back(dy, kernel, raw, history)
        # Step t sees the y of step t - 1, and the first sees zeros.
        seen = y[:-1].transpose(0, 1).reshape(heads, -1, size)
        caused = draw[1:].transpose(0, 1).reshape(heads, -1, GATES * size)
        dkernel = torch.bmm(caused.transpose(1, 2), seen)
        dbias = draw.sum((0, 2)).transpose(0, 1).reshape(-1)
        dgates = draw.permute(2, 0, 3, 1, 4).reshape(batch, steps, -1)
        return dgates, dkernel, dbias, None


def _run(raw: torch.Tensor, kernel: torch.Tensor, y: torch.Tensor, keep: bool) -> torch.Tensor:
    """Adds the recurrent part to raw [S, N, B, G, D] and fills y [S, N, B, D].

    Returns:
        c, n and m (cell, normalizer and stabilizer) of all steps [S + 1, 3, N, B, D], or of the last one [1, ...].
    """
    steps, heads, batch, _, size = raw.shape
    history = raw.new_zeros(steps + 1 if keep else 1, 3, heads, batch, size)
    # From -inf, the first step takes its stabilizer from its input gate alone, as in the package.
    history[0, 2] = -torch.inf
    rows = history.unbind(0) if keep else history.unbind(0) * (steps + 1)
    weight = kernel.transpose(1, 2)
    last = None
    for t, (step, y_t) in enumerate(zip(raw.unbind(0), y.unbind(0), strict=True)):
        if last is not None:
            step.view(heads, batch, -1).baddbmm_(last, weight)
        i_raw, f_raw, z_raw, o_raw = step.unbind(2)
        (c, n, m), (c_new, n_new, m_new) = rows[t], rows[t + 1]
        f = logsigmoid(f_raw).add_(m)
        torch.maximum(i_raw, f, out=m_new)
        i = torch.sub(i_raw, m_new).exp_()
        f.sub_(m_new).exp_()
        torch.mul(f, c, out=c_new).addcmul_(i, torch.tanh(z_raw))
        torch.addcmul(i, f, n, out=n_new)
        torch.div(c_new, n_new, out=y_t).mul_(torch.sigmoid(o_raw))
        last = y_t
    return history


def _run_back(dy: torch.Tensor, kernel: torch.Tensor, raw: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """The gradient of raw [S, N, B, G, D] from that of y [S, N, B, D].

    y does not change with the stabilizer, so no gradient passes through it. At each step, the gradients of raw
    are those of y, c and n times factors that are known from the forward pass.
    """
    i_raw, f_raw, z_raw, o_raw = raw.unbind(3)
    c, n, m = history.unbind(1)
    i = torch.exp(i_raw - m[1:])
    f = torch.exp(logsigmoid(f_raw) + m[:-1] - m[1:])
    z, o = torch.tanh(z_raw), torch.sigmoid(o_raw)
    h = c[1:] / n[1:]
    y_to_cn = o / n[1:]
    y_to_cn = torch.stack((y_to_cn, -y_to_cn * h), 1)
    f_slope = f * torch.sigmoid(-f_raw)
    c_to_ifz = torch.stack((i * z, f_slope * c[:-1], i * (1 - z * z)), 3)
    n_to_if = torch.stack((i, f_slope * n[:-1]), 3)
    y_to_o = h * o * (1 - o)
    draw = torch.empty_like(raw)
    dcn = torch.zeros_like(y_to_cn[0])
    dc, dn = dcn.unsqueeze(-2)
    heads, batch = raw.shape[1:3]
    rows = [v.unbind(0) for v in (dy, draw, y_to_cn, c_to_ifz, n_to_if, y_to_o, f)]
    later = None
    for dy_t, draw_t, to_cn, to_ifz, to_if, to_o, f_t in zip(*(reversed(v) for v in rows), strict=True):
        total = dy_t if later is None else torch.baddbmm(dy_t, later, kernel)
        dcn.addcmul_(total, to_cn)
        torch.mul(dc, to_ifz, out=draw_t[:, :, :3])
        draw_t[:, :, :2].addcmul_(dn, to_if)
        torch.mul(total, to_o, out=draw_t[:, :, 3])
        dcn.mul_(f_t)
        later = draw_t.view(heads, batch, -1)
    return draw
