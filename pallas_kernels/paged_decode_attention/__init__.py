"""Attention of one query token per row over a paged KV cache."""

from pallas_kernels.paged_decode_attention.api import paged_decode_attention

__all__ = ["paged_decode_attention"]
