"""A weight product with what comes before and after it."""

from pallas_kernels.fused_linear.api import fused_linear

__all__ = ["fused_linear"]
