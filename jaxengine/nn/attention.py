"""Attention over the paged KV cache, and what a forward pass needs beside its inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.ragged_prefill_attention.api import ragged_prefill_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """Which tokens belong to which row, and where their keys and values live.

    Attributes:
      page_table: Page ids of every row, unused entries 0 (the null page).
      q_starts: Row r owns the packed tokens q_starts[r]:q_starts[r + 1].
      kv_lens: Tokens of every row after this call's are written; 0 for a dead row.
      write_pages: Page of every packed token; the null page for padding.
      write_offsets: Place of every packed token inside its page.
      is_decode: Every row has exactly one token (static).
    """

    page_table: Int[Array, "R P"]
    q_starts: Int[Array, " R_plus_1"]
    kv_lens: Int[Array, " R"]
    write_pages: Int[Array, " T"]
    write_offsets: Int[Array, " T"]
    is_decode: bool = field(metadata={"static": True})


type KVPages = Float[Array, "pages 2 K page_size H"]
type Attend = Callable[..., tuple[Float[Array, "T N H"], KVPages]]


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_pages: KVPages,
    meta: AttentionMetadata,
    ctx: "ForwardContext",
) -> tuple[Float[Array, "T N H"], KVPages]:
    """Writes this call's keys and values into their pages, then attends causally over the rows."""
    with jax.named_scope("write_kv"):
        kv = jnp.stack([k, v], axis=1).astype(kv_pages.dtype)
        kv_pages = kv_pages.at[meta.write_pages, :, :, meta.write_offsets].set(kv)
    scale = q.shape[-1] ** -0.5

    def kernel(
        q: Array, kv_pages: Array, page_table: Array, q_starts: Array, kv_lens: Array
    ) -> Array:
        if meta.is_decode:
            return paged_decode_attention(
                q, kv_pages, page_table, kv_lens, scale=scale, implementation=ctx.kernels
            )
        return ragged_prefill_attention(
            q, kv_pages, page_table, q_starts, kv_lens, scale=scale, implementation=ctx.kernels
        )

    heads = Spec(None, "tensor", None)
    per_shard = jax.shard_map(
        kernel,
        mesh=ctx.mesh,
        in_specs=(heads, Spec(None, None, "tensor"), Spec(), Spec(), Spec()),
        out_specs=heads,
        check_vma=False,
    )
    out = per_shard(q, kv_pages, meta.page_table, meta.q_starts, meta.kv_lens)
    return out, kv_pages


def dense_attention(num_rows: int) -> Attend:
    """Causal attention over `num_rows` packed rows of equal length, with a gradient and no cache.

    What `ForwardContext.attend` is in training.
    """

    def attend(
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        kv_pages: None,
        meta: None,
        ctx: "ForwardContext",
    ) -> tuple[Float[Array, "T N H"], None]:
        q_BSNH, k_BSKH, v_BSKH = (x.reshape(num_rows, -1, *x.shape[1:]) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q_BSNH, k_BSKH, v_BSKH, is_causal=True)
        return out.reshape(q.shape), kv_pages

    return attend


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """Static choices of a forward pass.

    Attributes:
      mesh: The devices; one is enough, but it is always there.
      kernels: Implementation asked of `pallas_kernels`; None is the best of the backend.
      attend: `attend(q, k, v, kv_pages, meta, ctx) -> (out, kv_pages)`; training swaps in a
        dense one.
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
