"""Causal attention of packed ragged queries over a paged KV cache."""

from pallas_kernels.ragged_prefill_attention.api import ragged_prefill_attention

__all__ = ["ragged_prefill_attention"]
