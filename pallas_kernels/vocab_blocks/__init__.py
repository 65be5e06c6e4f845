"""Maxima and sums of exponentials over a vocabulary, by blocks of consecutive tokens."""

from pallas_kernels.vocab_blocks.api import block_sums, kept_sums
from pallas_kernels.vocab_blocks.blocks import (
    BLOCK,
    LOWEST,
    WIDE_BLOCK,
    BlockSums,
    in_blocks,
    tokens_of,
)
from pallas_kernels.vocab_blocks.reference import logsumexp, wide_sums

__all__ = [
    "BLOCK",
    "LOWEST",
    "WIDE_BLOCK",
    "BlockSums",
    "block_sums",
    "in_blocks",
    "kept_sums",
    "logsumexp",
    "tokens_of",
    "wide_sums",
]
