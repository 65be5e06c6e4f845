"""What the Pallas Triton kernels share: their limits, and arithmetic plain jnp lowers badly."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as pltriton

MIN_DOT_ROWS = 16
"""The fewest rows of a matrix product that Triton accepts."""


def check_head_dim(head_dim: int) -> None:
    """Raises NotImplementedError where the head dimension does not fit Triton's tiles."""
    if head_dim not in (16, 32, 64, 128, 256):
        raise NotImplementedError(f"head_dim {head_dim} is not a power of two from 16 to 256")


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product accumulated in float32; float32 operands are not rounded to tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def exp2_scaled(x: jax.Array, shift: jax.Array, *, scale: float, interpret: bool) -> jax.Array:
    """Returns `2 ** (x * scale - shift)` in float32.

    The compiler keeps products and sums apart and guards exp2 against denormals: six instructions
    where two do, in the loop that is bound by them.
    """
    if interpret:
        return jnp.exp2(x * scale - shift)
    shift = jnp.broadcast_to(shift, x.shape)
    (out,) = pltriton.elementwise_inline_asm(
        "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
        args=[x, jnp.full(x.shape, scale, jnp.float32), -shift],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return out


def exp_tempered(x: jax.Array, top: jax.Array, inverse: jax.Array, *, interpret: bool) -> jax.Array:
    """Returns exp((x - top) * inverse) in float32: three instructions, where exp alone is ten."""
    if interpret:
        return jnp.exp((x - top) * inverse)
    args = [jnp.broadcast_to(a, x.shape) for a in (x, top, inverse * np.float32(np.log2(np.e)))]
    (out,) = pltriton.elementwise_inline_asm(
        "{ .reg .f32 t; sub.rn.f32 t, $1, $2; mul.rn.f32 t, t, $3; ex2.approx.ftz.f32 $0, t; }",
        args=args,
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return out


def order_of_float(x: jax.Array) -> jax.Array:
    """Returns integers in the order of float32s; positive NaN is the largest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def float_of_order(order: jax.Array) -> jax.Array:
    """Returns the floats that `order_of_float` made integers of."""
    bits = jnp.where(order < 0, order ^ jnp.int32(0x7FFFFFFF), order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def inverses(temperature: jax.Array | None) -> jax.Array:
    """Returns 1 / temperature of each row, or a single 1 for all of them; for `inverse_of`.

    Beyond 1e-30 and 1e30 temperatures do alike, and their inverses are zero or infinite, which
    times an infinite or a zero difference of logits would be NaN.
    """
    if temperature is None:
        return jnp.ones(1, jnp.float32)  # a constant, where one a row would be a kernel's work
    return 1 / jnp.clip(temperature, 1e-30, 1e30)


def inverse_of(inverses_ref, row: jax.Array) -> jax.Array:
    """Reads the inverse of a row's temperature in a kernel."""
    return inverses_ref[row if inverses_ref.shape[0] > 1 else 0]
