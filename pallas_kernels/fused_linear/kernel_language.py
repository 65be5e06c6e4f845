"""The kernel of `jax_triton`. Importing this needs Triton."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def kernel(
    x_ptr,  # [M, DEPTH]
    w_ptr,  # [NUM_COLUMNS, DEPTH], gated twice as many
    norm_ptr,  # [DEPTH]
    bias_ptr,  # [NUM_COLUMNS], gated twice as many
    residual_ptr,  # [M, NUM_COLUMNS]
    out_ptr,  # [M, NUM_COLUMNS]
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    EPS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row times a few columns; sums stay spread over the threads until the end."""
    row = tl.program_id(0)
    stored = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(stored, NUM_COLUMNS - 1)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((1, BLOCK_K), tl.float32)
    for first in tl.static_range(0, DEPTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        inside = k < DEPTH
        w = tl.load(w_ptr + columns[:, None] * DEPTH + k, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * DEPTH + k, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
        sums += x * w
        if IS_GATED:
            up_row = (columns + NUM_COLUMNS)[:, None] * DEPTH
            up = tl.load(w_ptr + up_row + k, mask=inside, other=0.0).to(tl.float32)
            up_sums += x * up
    out = tl.sum(sums, axis=1)
    up_out = tl.sum(up_sums, axis=1)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares) / DEPTH + EPS)
        out *= scale
        up_out *= scale
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns).to(tl.float32)
        if IS_GATED:
            up_out += tl.load(bias_ptr + columns + NUM_COLUMNS).to(tl.float32)
    if IS_GATED:
        out = out * tl.sigmoid(out) * up_out
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + row * NUM_COLUMNS + columns).to(tl.float32)
    where = out_ptr + row * NUM_COLUMNS + stored
    tl.store(where, out.to(out_ptr.dtype.element_ty), mask=stored < NUM_COLUMNS)
