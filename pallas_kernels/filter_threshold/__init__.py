"""The lowest logit that top-k, top-p and min-p keep."""

from pallas_kernels.filter_threshold.api import filter_threshold

__all__ = ["filter_threshold"]
