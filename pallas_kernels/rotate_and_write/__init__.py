"""Rotary position embedding of packed new tokens, whose keys and values go to their pages."""

from pallas_kernels.rotate_and_write.api import rotate_and_write

__all__ = ["rotate_and_write"]
