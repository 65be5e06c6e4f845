"""The residual stream between layers, to which a product may still have to be added."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.nn.attention import ForwardContext
from jaxengine.nn.layers import Linear, RMSNorm
from pallas_kernels.add_norm import add_norm, num_parts
from pallas_kernels.fused_linear.api import is_faster, product_parts
from pallas_kernels.fused_linear.tuning import find_parts_config


class Residual(NamedTuple):
    """The stream as the sum of arrays.

    A product whose depth a GPU cuts into parts leaves them as they are: the kernel that adds them
    up then makes the norm that follows, too.

    Attributes:
      x: What has been added up.
      parts: Of the product to be added, in float32; None where there is none.
    """

    x: Float[Array, "T D"]
    parts: Float[Array, "S T D"] | None = None

    def total(self) -> Float[Array, "T D"]:
        """The sum."""
        if self.parts is None:
            return self.x
        return (self.x.astype(jnp.float32) + self.parts.sum(axis=0)).astype(self.x.dtype)

    def enter(
        self, norm: RMSNorm, ctx: ForwardContext
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"], RMSNorm | None]:
        """The sum, what a product takes of it, and the norm that product has yet to apply."""
        if self.parts is None:
            return self.x, self.x, norm
        weight = norm.weight[...]
        x, normed = add_norm(self.parts, self.x, weight, eps=norm.eps, implementation=ctx.kernels)
        return x, normed, None


def add_product(
    residual: Float[Array, "T D"],
    inner: Float[Array, "T F"],
    linear: Callable[..., Array],
    ctx: ForwardContext,
) -> Residual:
    """residual + linear(inner), in parts where that is faster: a `Linear`, or what stands in."""
    count = _num_parts(inner, linear, ctx)
    if count == 1:
        return Residual(linear(inner, ctx, residual=residual))
    assert isinstance(linear, Linear)
    weight = linear.weight[...]
    has_tiles = find_parts_config(inner) is not None
    parts = product_parts(
        inner,
        weight,
        num_parts=count,
        implementation=ctx.kernels if has_tiles else "reference",
    )
    return Residual(residual, parts)


def _num_parts(inner: Array, linear: Callable[..., Array], ctx: ForwardContext) -> int:
    is_whole = ctx.mesh is None or ctx.mesh.size == 1  # a split weight is left to XLA
    is_plain = isinstance(linear, Linear) and linear.bias is None
    if not (is_whole and is_plain and _has_kernel(ctx)):
        return 1
    weight = linear.weight[...]
    if is_faster(inner, weight, is_gated=False, implementation=ctx.kernels):
        return 1  # one kernel makes the whole product
    return num_parts(inner, weight)


def _has_kernel(ctx: ForwardContext) -> bool:
    if ctx.kernels is None:
        return jax.default_backend() == "gpu"
    return ctx.kernels in ("triton", "triton_interpret")
