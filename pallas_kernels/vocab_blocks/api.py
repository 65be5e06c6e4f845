"""Maximum and sum of exponentials of every block of tokens: the op that callers use."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.vocab_blocks import reference, triton
from pallas_kernels.vocab_blocks.blocks import BlockSums

IMPLEMENTATIONS = {
    "reference": reference.block_sums,
    "triton": triton.block_sums,
    "triton_interpret": functools.partial(triton.block_sums, interpret=True),
}
KEPT_IMPLEMENTATIONS = {
    "reference": reference.kept_sums,
    "triton": triton.kept_sums,
    "triton_interpret": functools.partial(triton.kept_sums, interpret=True),
}


def block_sums(
    x: Float[Array, "B V"],
    temperature: Float[Array, " B"] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
) -> BlockSums:
    """Maximum and sum of exponentials of every block, for a stable softmax, in one pass.

    Args:
      x: Logits; -inf is a token that was removed.
      temperature: Of each row, positive; None is 1.
      implementation: "triton" reads what lies in memory; with "reference" XLA fuses into the pass
        what computes `x`. Or "triton_interpret"; None takes the best one for what lies in memory on
        the current backend.

    Raises:
      ValueError: `x` is not float32 [B, V].
    """
    if x.ndim != 2 or x.dtype != jnp.float32:
        raise ValueError(f"`x` must be float32 [B, V]. Got {x.dtype}{x.shape}.")
    return dispatch.call("block_sums", IMPLEMENTATIONS, implementation, x, temperature)


def kept_sums(
    x: Float[Array, "B V"],
    sums: BlockSums,
    lowest: Float[Array, " B"],
    *,
    implementation: dispatch.Implementation | None = None,
) -> BlockSums:
    """Maximum and sum of exponentials of what is left of every block.

    Only blocks that lose a part of their tokens need to be read. NaN is left.

    Args:
      x: Logits.
      sums: Those of `x`.
      lowest: The lowest logit that is left in each row, before its temperature; -inf leaves all.
      implementation: "reference", "triton" or "triton_interpret"; None takes the best one for
        the current backend.
    """
    return dispatch.call("kept_sums", KEPT_IMPLEMENTATIONS, implementation, x, sums, lowest)
