"""The lowest logit that top-k, top-p and min-p keep: the op that callers use."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, paging
from pallas_kernels.filter_threshold import reference, triton
from pallas_kernels.vocab_blocks import BlockSums

IMPLEMENTATIONS = {
    "reference": reference.filter_threshold,
    "triton": triton.filter_threshold,
    "triton_interpret": functools.partial(triton.filter_threshold, interpret=True),
}


def filter_threshold(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    *,
    sums: BlockSums | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, " B"]:
    """Finds the threshold of each row: what passes all three filters is at least as large.

    Each filter judges the whole distribution softmax(logits / temperature). Tokens equal to a
    threshold are kept. Where probabilities are summed, implementations may differ by rounding: by
    a token whose cumulative probability is within 1e-5 of top_p. The result of a row does not
    depend on the other rows.

    Args:
      logits: -inf marks removed tokens. A row with NaN has any threshold.
      top_k: The k most likely tokens pass; below 1 or from V on all do.
      top_p: The smallest set of the most likely tokens whose probability reaches p passes; from
        1 on all do.
      min_p: Tokens at least `min_p` times as likely as the most likely pass; in [0, 1].
      sums: Those of the logits' blocks, and their temperature, where they are known; else it is 1.
      implementation: "reference", "triton" or "triton_interpret"; None takes the best one for
        the current backend.

    Returns:
      A logit of each row, before its temperature; -inf where all tokens pass.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The implementation that was asked for cannot serve these shapes.
    """
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(f"`logits` must be float32 [B, V]. Got {logits.dtype}{logits.shape}.")
    rows = (logits.shape[0],)
    paging.check_int32("top_k", top_k, rows)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value.shape != rows or value.dtype != jnp.float32:
            raise ValueError(f"`{name}` must be float32{rows}. Got {value.dtype}{value.shape}.")
    return dispatch.call(
        "filter_threshold", IMPLEMENTATIONS, implementation, logits, top_k, top_p, min_p, sums=sums
    )
