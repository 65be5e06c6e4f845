"""Norms and weight products. Knows nothing of any model family."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxengine.nn.attention import ForwardContext
from pallas_kernels.fused_linear.api import fused_linear, is_faster
from pallas_kernels.fused_linear.reference import rms_norm


def linear(
    x: Float[Array, "T I"],
    weight: Float[Array, "W I"],
    ctx: ForwardContext,
    *,
    norm: "RMSNorm | None" = None,
    bias: Float[Array, " W"] | None = None,
    glu: Callable[[Array], Array] | None = None,
    residual: Float[Array, "T O"] | None = None,
) -> Float[Array, "T O"]:
    """The only entry to a weight product: x · Wᵀ, accumulated in float32, and its neighbours.

    A neighbour is given here rather than applied outside so that one kernel can do both where
    that pays: residual + glu(gate) * up, where [gate, up] = norm(x) · Wᵀ + bias.

    Args:
      x: Activations.
      weight: Hugging Face orientation, [out, in]; with `glu` the gate's rows first.
      ctx: Decides which kernel it is.
      norm: Applied to `x`.
      bias: Added in float32.
      glu: Activation of the gate of a gated linear unit.
      residual: Added last.
    """
    # A weight that is split over devices is left to XLA, which knows how to add up the parts.
    is_whole = ctx.mesh is None or ctx.mesh.size == 1
    use_kernel = is_whole and is_faster(
        x, weight, is_gated=glu is not None, implementation=ctx.kernels
    )
    return fused_linear(
        x,
        weight,
        norm_weight=None if norm is None else norm.weight[...],
        eps=0.0 if norm is None else norm.eps,
        bias=bias,
        glu=glu,
        residual=residual,
        implementation=ctx.kernels if use_kernel else "reference",
    )


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return (0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """A weight product with logical axes; `weight` is [out, in]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        use_bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = nnx.Param(_normal(rngs, (out_features, in_features), dtype), axes=axes)
        self.bias = (
            nnx.Param(jnp.zeros((out_features,), dtype), axes=axes[:1]) if use_bias else None
        )

    def __call__(
        self,
        x: Float[Array, "T I"],
        ctx: ForwardContext,
        *,
        norm: "RMSNorm | None" = None,
        glu: Callable[[Array], Array] | None = None,
        residual: Float[Array, "T O"] | None = None,
    ) -> Float[Array, "T O"]:
        bias = None if self.bias is None else self.bias[...]
        return linear(x, self.weight[...], ctx, norm=norm, bias=bias, glu=glu, residual=residual)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight."""

    def __init__(
        self, features: int, *, eps: float, dtype: jnp.dtype, axes: tuple[str] = ("embed",)
    ) -> None:
        self.weight = nnx.Param(jnp.ones((features,), dtype), axes=axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return rms_norm(x, self.weight[...], self.eps)


class Embedding(nnx.Module):
    """Token embedding."""

    def __init__(self, vocab: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(_normal(rngs, (vocab, features), dtype), axes=("vocab", "embed"))

    def __call__(self, ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        return jnp.take(self.weight[...], ids, axis=0, mode="clip")


def project_to_vocab(
    hidden: Float[Array, "B D"], weight: Float[Array, "V D"], ctx: ForwardContext
) -> Float[Array, "B V"]:
    """Logits in float32, never rounded to the activations' dtype."""
    return jax.lax.dot_general(
        hidden,
        weight,
        (((1,), (1,)), ((), ())),
        precision=ctx.precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
