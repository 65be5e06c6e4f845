"""Cuts packed ragged queries into blocks of one row each: the unit of work of every backend."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class QueryBlocks(NamedTuple):
    """A static number of blocks of consecutive query tokens; each block belongs to one row.

    Query token `t` of a block sits at absolute position `kv_end - end + t` and sees the positions
    up to and including its own. Blocks of padding tokens have `kv_end` 0; blocks that are not
    needed are empty.

    Attributes:
      row: Row of the page table.
      begin: First query token.
      end: One past the last query token.
      kv_end: Tokens of the row that the last query token of the block sees.
    """

    row: Int[Array, " blocks"]
    begin: Int[Array, " blocks"]
    end: Int[Array, " blocks"]
    kv_end: Int[Array, " blocks"]


def query_blocks(
    q_starts: Int[Array, " starts"], kv_lens: Int[Array, " R"], num_tokens: int, block_q: int
) -> QueryBlocks:
    """Assigns blocks of at most `block_q` tokens to rows, on the device, in the order of tokens.

    Padding tokens are cut like one more row, so that the blocks cover all `num_tokens`. Example
    with `block_q=4`, `q_starts=[0, 6, 7]`, `num_tokens=9`: the blocks hold the tokens 0:4, 4:6
    (row 0), 6:7 (row 1), 7:9 (padding), and the other `9 // 4 + 3 - 4 = 1` is empty.
    """
    num_rows = kv_lens.shape[0]
    num_blocks = num_tokens // block_q + num_rows + 1
    starts = q_starts
    ends = jnp.append(q_starts[1:], num_tokens)
    kv_lens = jnp.append(kv_lens, 0)
    last_block = jnp.cumsum((ends - starts + block_q - 1) // block_q)
    block = jnp.arange(num_blocks)
    row = jnp.searchsorted(last_block, block, side="right", method="compare_all")
    is_used = row <= num_rows
    row = jnp.minimum(row, num_rows)
    first_block = jnp.where(row > 0, last_block[row - 1], 0)
    begin = jnp.where(is_used, starts[row] + (block - first_block) * block_q, 0)
    end = jnp.where(is_used, jnp.minimum(begin + block_q, ends[row]), 0)
    kv_end = jnp.where(is_used & (row < num_rows), kv_lens[row] - (ends[row] - end), 0)
    row = jnp.minimum(row, num_rows - 1)
    return QueryBlocks(*(x.astype(jnp.int32) for x in (row, begin, end, kv_end)))
