"""The largest entries of rows short enough for one program each."""

from pallas_kernels.top_k.api import top_k

__all__ = ["top_k"]
