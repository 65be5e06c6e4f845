"""The attention ops in float64 numpy, one query and head after another: slow, and plainly right."""

import jax
import numpy as np

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Allowed error, absolute and relative, by dtype of the inputs."""


def assert_close(got: jax.Array, want: jax.Array | np.ndarray):
    tolerance = TOLERANCE[str(got.dtype)]
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        np.asarray(want, np.float64),
        atol=tolerance,
        rtol=tolerance,
        equal_nan=False,
    )


def paged_decode_attention(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, kv_lens: jax.Array, scale: float
) -> np.ndarray:
    queries, kv = np.asarray(q, np.float64), np.asarray(kv_pages, np.float64)
    out = np.zeros(q.shape)
    for row, kv_len in enumerate(np.asarray(kv_lens)):
        if kv_len:
            k, v = row_tokens(kv, np.asarray(page_table)[row], kv_len)
            out[row] = attend(queries[row], k, v, scale)
    return out


def ragged_prefill_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    q_starts: jax.Array,
    kv_lens: jax.Array,
    scale: float,
) -> np.ndarray:
    queries, kv = np.asarray(q, np.float64), np.asarray(kv_pages, np.float64)
    starts = np.asarray(q_starts)
    out = np.zeros(q.shape)
    for row, kv_len in enumerate(np.asarray(kv_lens)):
        k, v = row_tokens(kv, np.asarray(page_table)[row], kv_len)
        for token in range(starts[row], starts[row + 1]):
            visible = kv_len - (starts[row + 1] - token) + 1
            out[token] = attend(queries[token], k[:visible], v[:visible], scale)
    return out


def row_tokens(kv: np.ndarray, pages: np.ndarray, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of one row, each [tokens, K, H]."""
    position = np.arange(kv_len)
    page_size = kv.shape[3]
    tokens = kv[pages[position // page_size], :, :, position % page_size]
    return tokens[:, 0], tokens[:, 1]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention of one token: q [N, H], k and v [tokens, K, H]."""
    out = np.zeros(q.shape)
    group = q.shape[0] // k.shape[1]
    for head in range(q.shape[0]):
        scores = scale * k[:, head // group] @ q[head]
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, head // group] / weights.sum()
    return out
