"""A weight product with its neighbours as one Pallas Triton kernel, for very few rows.

With few rows a product is bound by reading its weight, and a kernel's start costs about as much as
reading a megabyte: so the norm before it and whatever follows run in the same kernel, and every
program reads its columns of the weight once, over the whole depth. Nothing is summed across
programs: a result does not depend on the order in which they ran.

The norm's row scale is a factor of the whole row, so it is applied after the product, and its sum
of squares is taken from the same tiles of `x`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels.fused_linear.kernel_call import Glu, Neighbours, call_kernel
from pallas_kernels.fused_linear.tuning import RowConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call."""

    num_rows: int
    depth: int
    num_columns: int
    eps: float
    glu: Glu | None
    config: RowConfig

    def column_ids(self, program: jax.Array) -> list[jax.Array]:
        """Rows of the weight that a program needs: its columns', with a gate the gates' first.

        Past the last column it is the last one again, whose result is not stored.
        """
        config = self.config
        columns = program * config.block_n + jnp.arange(config.block_n)
        columns = jnp.minimum(columns, self.num_columns - 1)
        return [columns] if self.glu is None else [columns, columns + self.num_columns]

    def depth_mask(self, depth: jax.Array) -> jax.Array | None:
        return None if self.depth % self.depth_step == 0 else depth < self.depth

    @property
    def depth_step(self) -> int:
        return self.config.block_k * self.config.num_loads


def _load(ref, mask: jax.Array | None) -> jax.Array:
    return pltriton.load(ref, mask=mask, other=None if mask is None else 0.0)


def _finish(
    sums: list[jax.Array],  # [..., block_n] each, float32
    square_sum: jax.Array | None,  # [...] of x, with a norm
    columns: list[jax.Array],
    bias_ref,
    call: _Call,
) -> jax.Array:
    """What follows the product, but for the residual."""
    if square_sum is not None:
        scale = jax.lax.rsqrt(square_sum / call.depth + call.eps)
        sums = [s * scale for s in sums]
    if bias_ref is not None:
        sums = [
            s + pltriton.load(bias_ref.at[c]).astype(jnp.float32)
            for s, c in zip(sums, columns, strict=True)
        ]
    return sums[0] if call.glu is None else call.glu(sums[0]) * sums[1]


def _kernel(x_ref, w_ref, norm_ref, bias_ref, residual_ref, out_ref, *, call: _Call):
    """All rows, one after another, times a few columns; sums stay spread over the threads."""
    config = call.config
    columns = call.column_ids(pl.program_id(0))
    rows = range(call.num_rows)
    tile = (config.block_n, config.block_k)

    def group(i, carry):
        sums, squares = carry
        depths = [
            i * call.depth_step + j * config.block_k + jnp.arange(config.block_k)[None, :]
            for j in range(config.num_loads)
        ]
        # All of the weight first: what the rows need is in the caches.
        weights = [
            [_load(w_ref.at[c[:, None], k], call.depth_mask(k)) for c in columns] for k in depths
        ]
        for k, parts in zip(depths, weights, strict=True):
            mask = call.depth_mask(k)
            norm = None if norm_ref is None else _load(norm_ref.at[k], mask).astype(jnp.float32)
            parts = [part.astype(jnp.float32) for part in parts]
            xs = [_load(x_ref.at[row, k], mask).astype(jnp.float32) for row in rows]
            if norm is not None:
                squares = [s + x * x for s, x in zip(squares, xs, strict=True)]
                xs = [x * norm for x in xs]
            sums = [
                [s + x * part for s, part in zip(row_sums, parts, strict=True)]
                for row_sums, x in zip(sums, xs, strict=True)
            ]
        return sums, squares

    num_groups = pl.cdiv(call.depth, call.depth_step)
    carry = (
        [[jnp.zeros(tile, jnp.float32) for _ in columns] for _ in rows],
        [jnp.zeros((1, config.block_k), jnp.float32) for _ in rows],
    )
    if num_groups == 1:
        sums, squares = group(0, carry)
    else:
        sums, squares = jax.lax.fori_loop(0, num_groups, group, carry)
    stored = pl.program_id(0) * config.block_n + jnp.arange(config.block_n)
    for row in rows:
        out = _finish(
            [s.sum(axis=1) for s in sums[row]],
            None if norm_ref is None else squares[row].sum(),
            columns,
            bias_ref,
            call,
        )
        if residual_ref is not None:
            out += pltriton.load(residual_ref.at[row, columns[0]]).astype(jnp.float32)
        out = out.astype(out_ref.dtype)
        pltriton.store(out_ref.at[row, stored], out, mask=stored < call.num_columns)


def call(
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    neighbours: Neighbours,
    *,
    eps: float,
    glu: Glu | None,
    config: RowConfig,
    interpret: bool,
) -> Float[Array, "M N"]:
    """Runs the kernel; see `triton.fused_linear`."""
    num_rows, depth = x.shape
    num_columns = weight.shape[0] // (1 if glu is None else 2)
    call = _Call(
        num_rows=num_rows, depth=depth, num_columns=num_columns, eps=eps, glu=glu, config=config
    )
    return call_kernel(
        lambda *refs: _kernel(*refs, call=call),
        x,
        weight,
        neighbours,
        num_columns=num_columns,
        grid=pl.cdiv(num_columns, config.block_n),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
    )
