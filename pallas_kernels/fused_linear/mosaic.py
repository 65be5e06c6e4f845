"""A weight product with its neighbours as one Pallas Mosaic GPU kernel, for many rows on Hopper."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import backend
from jaxtyping import Array, Float

from pallas_kernels.fused_linear import reference
from pallas_kernels.fused_linear.kernel_call import Glu
from pallas_kernels.fused_linear.tuning import ManyRowsConfig, find_config


@functools.partial(jax.jit, static_argnames=("eps", "glu", "config"))
def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    norm_weight: Float[Array, " K"] | None = None,
    bias: Float[Array, " W"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    eps: float = 0.0,
    glu: Glu | None = None,
    config: ManyRowsConfig | None = None,
) -> Float[Array, "M N"]:
    """Multiplies `x` by a weight, with what comes before and after; see `api.fused_linear`.

    Everything but the norm, which is computed before, is part of the kernel, in float32.

    Args:
      config: Tile parameters; None takes those of `tuning`.

    Raises:
      NotImplementedError: The GPU is no Hopper, the gate is not `jax.nn.silu`, the dtype is not
        bfloat16, the shape is no multiple of the tile, or a plain product is faster.
    """
    chosen = config or find_config(x, weight, is_gated=glu is not None)
    device = _device()
    reason = _why_not(x, weight, glu, chosen, device)
    if reason or not isinstance(chosen, ManyRowsConfig):
        raise NotImplementedError(f"{x.shape[0]} rows of {x.dtype} times {weight.shape}: {reason}")
    # JAX's Mosaic GPU changes the process's environment when it is imported.
    from pallas_kernels.fused_linear import mosaic_kernel

    if norm_weight is not None:
        x = reference.rms_norm(x, norm_weight, eps)
    return mosaic_kernel.call_kernel(
        x,
        weight,
        bias,
        residual,
        is_gated=glu is not None,
        config=chosen,
        num_multiprocessors=device.num_multiprocessors,
    )


class _Device(NamedTuple):
    kind: str
    num_multiprocessors: int


def _device() -> _Device:
    """The GPU that is compiled for: the one of the mesh, which may be absent, or the default."""
    if abstract := jax.sharding.get_abstract_mesh().abstract_device:
        return _Device(abstract.device_kind, abstract.num_cores or 0)
    device = backend.get_default_device()
    return _Device(device.device_kind, getattr(device, "core_count", 0))


def _why_not(
    x: jax.Array, weight: jax.Array, glu: Glu | None, config: Any, device: _Device
) -> str | None:
    if not re.search(r"\bG?H(20|100|200|800)\b", device.kind):
        return f"needs a Hopper GPU, not {device.kind}"
    if glu not in (None, jax.nn.silu):
        return f"the gate of a gated unit is jax.nn.silu here, not {glu}"
    if not isinstance(config, ManyRowsConfig):
        return "another kernel or a plain product is faster"
    if x.dtype != jnp.bfloat16 or not config.fits(x.shape[0], x.shape[1], weight.shape[0]):
        return f"must be bfloat16 and a multiple of the tile, {config}"
    return None
