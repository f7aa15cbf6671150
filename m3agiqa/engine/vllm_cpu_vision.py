"""Attention of image encoders on a CPU, by the kernel that vLLM has for its language models.

vLLM leaves it to torch, whose matrix products are MKL's; on AMD these use half of the vectors' width. Loaded by
the workers of a vLLM engine, where `vllm_plugins.py` sees that it pays.
"""

import torch
from torch.nn.functional import pad
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

# vLLM's kernel reads keys and values in blocks, as they are in its cache.
_BLOCK = 32
_SIZES = sorted(CPUAttentionBackend.get_supported_head_sizes())


class CpuVisionAttention(MMEncoderAttention):
    """Takes the place of vLLM's own class in every model that is made after `register`."""

    def forward_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | None = None,
        sequence_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's: queries [images, tokens, heads (x) head size], keys and values alike; the same shape back."""
        images, length = query.shape[:2]
        if self.head_size > _SIZES[-1] or key.shape[1] != length or query.dtype not in (torch.float32, torch.bfloat16):
            return super().forward_cpu(query, key, value, cu_seqlens, max_seqlen, sequence_lengths)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, images * length + 1, length)
        q, k, v = (x.reshape(images * length, -1, self.head_size) for x in (query, key, value))
        return attend(q, k, v, cu_seqlens.to(torch.int32), self.scale).reshape(query.shape)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of each token to all tokens of its own sequence.

    Args:
        q: queries [tokens, heads, head size], float32 or bfloat16.
        k: keys [tokens, key heads, head size]; each serves an equal number of the heads.
        v: values, as the keys.
        starts: where each sequence begins, and the number of tokens [sequences + 1], int32.
        scale: of the products of queries and keys.

    Returns:
        [tokens, heads, head size].
    """
    size = q.shape[2]
    room = next(known for known in _SIZES if known >= size)
    if room > size:
        # Zeros add nothing to the products, and what they make of the values is cut off.
        q, k, v = (pad(x, (0, room - size)) for x in (q, k, v))
    lengths = starts.diff()
    blocks = (lengths + _BLOCK - 1) // _BLOCK
    firsts = (blocks.cumsum(0) - blocks).to(torch.int32)
    total = int(blocks.sum())
    table = (firsts[:, None] + torch.arange(int(blocks.max()), dtype=torch.int32)).clamp_(max=total - 1)
    slots = torch.arange(len(k)) + torch.repeat_interleave(firsts * _BLOCK - starts[:-1], lengths)
    # What stands behind a sequence's end has no weight, but must be a number.
    keys, values = k.new_zeros(2, total, k.shape[1], _BLOCK, room)
    isa = _get_attn_isa(q.dtype, _BLOCK, room)
    ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths), num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=room, seq_lens=lengths,
        dtype=q.dtype, query_start_loc=starts, causal=False, sliding_window_size=-1, isa=isa, enable_kv_split=False,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype)
    ops.cpu_attention_with_kv_cache(
        query=q, key_cache=keys, value_cache=values, output=out, query_start_loc=starts, seq_lens=lengths, scale=scale,
        causal=False, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0, scheduler_metadata=plan,
        s_aux=None,
    )  # fmt: skip
    return out[..., :size]


def register() -> None:
    """Makes vLLM build `CpuVisionAttention` where a model asks for its `MMEncoderAttention`."""
    MMEncoderAttention.register_oot(CpuVisionAttention, name=MMEncoderAttention.__name__)
