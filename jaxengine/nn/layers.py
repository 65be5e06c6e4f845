"""Norms and weight products. Knows nothing of any model family."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxengine.nn.attention import ForwardContext


def linear(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    ctx: ForwardContext,
    bias: Float[Array, " O"] | None = None,
) -> Float[Array, "T O"]:
    """The only entry to a weight product: x · Wᵀ + b, accumulated in float32.

    Args:
      x: Activations.
      weight: Hugging Face orientation, [out, in].
      ctx: Decides the precision of the product.
      bias: Added in float32 before the result is rounded to `x.dtype`.
    """
    out = jax.lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=ctx.precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def rms_norm(
    x: Float[Array, "*T D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*T D"]:
    """Root mean square norm of the last axis, computed in float32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    x_f32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * (x_f32 * scale)).astype(x.dtype)


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

    def __call__(self, x: Float[Array, "T I"], ctx: ForwardContext) -> Float[Array, "T O"]:
        return linear(x, self.weight[...], ctx, None if self.bias is None else self.bias[...])


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
