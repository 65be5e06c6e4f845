"""Parts of a product added to the residual stream, and the norm of the sum."""

from pallas_kernels.add_norm.api import add_norm, num_parts

__all__ = ["add_norm", "num_parts"]
