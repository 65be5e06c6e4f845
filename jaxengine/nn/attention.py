"""Attention over the paged KV cache, and what a forward pass needs beside its inputs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, Int

from jaxengine.nn.rope import Rotation, rotate
from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.ragged_prefill_attention.api import ragged_prefill_attention
from pallas_kernels.rotate_and_write.api import rotate_and_write


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """Which tokens belong to which row, and where their keys and values live.

    Attributes:
      page_table: Page ids of every row, unused entries 0 (the null page).
      q_starts: Row r owns the packed tokens q_starts[r]:q_starts[r + 1].
      kv_lens: Tokens of every row after this call's are written; 0 for a dead row.
      write_pages: Page of every packed token; the null page for padding. None in a decode step,
        where a row's length says it.
      write_offsets: Place of every packed token inside its page; likewise.
      is_decode: Every row has exactly one token (static).
    """

    page_table: Int[Array, "R P"]
    q_starts: Int[Array, " R_plus_1"]
    kv_lens: Int[Array, " R"]
    write_pages: Int[Array, " T"] | None = None
    write_offsets: Int[Array, " T"] | None = None
    is_decode: bool = field(metadata={"static": True})


type KVPages = Float[Array, "pages 2 K page_size H"]
type Attend = Callable[..., tuple[Float[Array, "T N H"], KVPages]]


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    angles: Rotation,
    kv_pages: KVPages,
    meta: AttentionMetadata,
    ctx: "ForwardContext",
) -> tuple[Float[Array, "T N H"], KVPages]:
    """Rotates queries and keys, writes keys and values into their pages, attends causally."""
    scale = q.shape[-1] ** -0.5
    heads, pages = Spec(None, "tensor", None), Spec(None, None, "tensor")
    if meta.is_decode:
        step = functools.partial(paged_decode_attention, scale=scale, implementation=ctx.kernels)
        in_specs = (heads, heads, heads, Spec(), Spec(), pages, Spec(), Spec())
        return _per_shard(step, ctx, in_specs, (heads, pages))(
            q, k, v, *angles, kv_pages, meta.page_table, meta.kv_lens
        )
    write = functools.partial(rotate_and_write, implementation=ctx.kernels)
    in_specs = (heads, heads, heads, Spec(), Spec(), pages, Spec(), Spec())
    q, kv_pages = _per_shard(write, ctx, in_specs, (heads, pages))(
        q, k, v, *angles, kv_pages, meta.write_pages, meta.write_offsets
    )
    attend = functools.partial(ragged_prefill_attention, scale=scale, implementation=ctx.kernels)
    in_specs = (heads, pages, Spec(), Spec(), Spec())
    out = _per_shard(attend, ctx, in_specs, heads)(
        q, kv_pages, meta.page_table, meta.q_starts, meta.kv_lens
    )
    return out, kv_pages


def _per_shard(
    kernel: Callable[..., Any], ctx: "ForwardContext", in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A kernel sees the heads of its own device alone."""
    return jax.shard_map(
        kernel, mesh=ctx.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def dense_attention(num_rows: int) -> Attend:
    """Causal attention over `num_rows` packed rows of equal length, with a gradient and no cache.

    What `ForwardContext.attend` is in training.
    """

    def attend(
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        angles: Rotation,
        kv_pages: Any,
        meta: Any,
        ctx: "ForwardContext",
    ) -> tuple[Float[Array, "T N H"], Any]:
        packed = (rotate(q, angles), rotate(k, angles), v)
        q_BSNH, k_BSKH, v_BSKH = (x.reshape(num_rows, -1, *x.shape[1:]) for x in packed)
        out = jax.nn.dot_product_attention(q_BSNH, k_BSKH, v_BSKH, is_causal=True)
        return out.reshape(q.shape), kv_pages

    return attend


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """Static choices of a forward pass.

    Attributes:
      mesh: The devices; one is enough, but it is always there.
      kernels: Implementation asked of `pallas_kernels`; None is the best of the backend.
      attend: `attend(q, k, v, angles, kv_pages, meta, ctx) -> (out, kv_pages)`, with queries and
        keys not yet rotated; training swaps in a dense one.
      see: `see(i, x)` is shown the residual stream [T, D] while it is traced: i = 0 is what goes
        into the first layer, i = 1 what comes out of it, and so on.
    """

    mesh: Mesh | None = None
    kernels: Implementation | None = None
    attend: Attend = paged_attention
    see: Callable[[int, Array], None] = lambda i, x: None

    def precision(self, dtype: jnp.dtype) -> jax.lax.Precision:
        """float32 means float32: without this a GPU would multiply in tf32."""
        is_f32 = dtype == jnp.float32
        return jax.lax.Precision.HIGHEST if is_f32 else jax.lax.Precision.DEFAULT
