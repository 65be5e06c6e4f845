"""The attention ops in float64 numpy, one query and head after another: slow, and plainly right."""

from typing import Any

import jax
import numpy as np

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Allowed error, absolute and relative, by dtype of the inputs."""


def assert_close(got: jax.Array, want: jax.Array | np.ndarray, *, equal_nan: bool = False):
    tolerance = TOLERANCE[str(got.dtype)]
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        np.asarray(want, np.float64),
        atol=tolerance,
        rtol=tolerance,
        equal_nan=equal_nan,
    )


def paged_decode_attention(
    q: Any,
    k: Any,
    v: Any,
    cos: jax.Array,
    sin: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """What every row's query finds, and the cache, NaN where nothing was written."""
    dtype = q.dtype
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q, k = (rotate(x, np.asarray(cos), np.asarray(sin)).astype(dtype) for x in (q, k))
    kv, table = np.asarray(kv_pages, np.float64), np.asarray(page_table)
    page_size, out = kv.shape[3], np.zeros(q.shape)
    for row, kv_len in enumerate(np.asarray(kv_lens)):
        if kv_len:
            page, offset = table[row, (kv_len - 1) // page_size], (kv_len - 1) % page_size
            kv[page, 0, :, offset], kv[page, 1, :, offset] = k[row], v[row]
            keys, values = row_tokens(kv, table[row], kv_len)
            out[row] = attend(np.asarray(q[row], np.float64), keys, values, scale)
    return out, kv


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Each pair (i, i + H/2) of a head as a complex number, turned by its angle."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


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
