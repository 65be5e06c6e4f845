"""Named settings of the filters: what tests, deviceless compiles and benchmarks run."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

type Setting = tuple[int, float, float]

TOP_P, TOP_K, MIN_P, JOINT, OFF = (
    (-1, 0.95, 0.0),
    (50, 1.0, 0.0),
    (-1, 1.0, 0.05),
    (50, 0.95, 0.05),
    (-1, 1.0, 0.0),
)
"""Settings (top_k, top_p, min_p) that are common."""

CORNERS: tuple[Setting, ...] = (
    TOP_P,
    TOP_K,
    MIN_P,
    JOINT,
    OFF,
    (1, 1.0, 0.0),
    (-1, 1e-6, 0.0),
    (-1, 0.5, 1.0),
    (-1, 0.9999, 0.0),
    (700, 0.8, 0.001),
    (2_000_000_000, 0.9, 0.0),
)
"""Settings at which something else decides, or nothing."""


def _text_like(rng: np.random.Generator, width: int) -> np.ndarray:
    ranks = rng.permutation(width) + 1.0
    return 5 - 1.3 * np.log(ranks) + 0.3 * rng.standard_normal(width)


def _one_above_all(rng: np.random.Generator, width: int) -> np.ndarray:
    logits = 0.6 * rng.standard_normal(width)
    logits[rng.integers(width)] = np.log(width)
    return logits


def _few_left(rng: np.random.Generator, width: int) -> np.ndarray:
    logits = np.full(width, -np.inf)
    logits[rng.integers(0, width, 40)] = rng.standard_normal(40)
    return logits


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "flat": lambda rng, width: 0.6 * rng.standard_normal(width),
    "text-like": _text_like,
    "spread": lambda rng, width: 3 * rng.standard_normal(width),
    "extreme": lambda rng, width: 200 * rng.standard_normal(width),
    "one-above-all": _one_above_all,
    "few-left": _few_left,
    "half-left": lambda rng, width: np.where(
        np.arange(width) < width // 2, rng.standard_normal(width), -np.inf
    ),
    "ties": lambda rng, width: np.round(2 * rng.standard_normal(width)) / 2,
    "all-equal": lambda rng, width: np.full(width, 1.5),
}
"""How the logits of a row lie. "flat" is what random weights of the 0.5B shape give."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One setting of the op.

    Attributes:
      name: Distribution and settings, then the batch.
      num_rows: Rows.
      vocab_size: Tokens.
      distributions: Names in `DISTRIBUTIONS`; each with all the settings, rows in turn.
      settings: (top_k, top_p, min_p).
    """

    name: str
    num_rows: int
    vocab_size: int = 151_936
    distributions: tuple[str, ...] = ("flat",)
    settings: tuple[Setting, ...] = (TOP_P,)

    @property
    def is_small(self) -> bool:
        """Whether a CPU serves it in a moment."""
        return self.num_rows * self.vocab_size <= 1 << 20

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Returns abstract arguments of the op."""
        rows = (self.num_rows,)
        return [
            jax.ShapeDtypeStruct((self.num_rows, self.vocab_size), jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.int32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ]

    def arrays(
        self, seed: int
    ) -> tuple[Float[Array, "B V"], Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
        """Returns random arguments of the op."""
        rng = np.random.default_rng(seed)
        pairs = [(d, s) for d in self.distributions for s in self.settings]
        pairs = [pairs[row % len(pairs)] for row in range(self.num_rows)]
        logits = [DISTRIBUTIONS[name](rng, self.vocab_size) for name, _ in pairs]
        top_k, top_p, min_p = zip(*(setting for _, setting in pairs), strict=True)
        return (
            jnp.asarray(np.stack(logits), jnp.float32),
            jnp.asarray(top_k, jnp.int32),
            jnp.asarray(top_p, jnp.float32),
            jnp.asarray(min_p, jnp.float32),
        )


_MIXED = (TOP_P, TOP_K, MIN_P, JOINT)

ARG_SPECS = (
    *(ArgSpec(name=f"flat-top-p-b{n}", num_rows=n) for n in (1, 16, 64, 256)),
    *(
        ArgSpec(name=f"text-like-top-p-b{n}", num_rows=n, distributions=("text-like",))
        for n in (1, 16, 64, 256)
    ),
    ArgSpec(name="flat-top-k-b256", num_rows=256, settings=(TOP_K,)),
    ArgSpec(name="flat-mixed-b256", num_rows=256, settings=_MIXED),
    ArgSpec(
        name="text-like-mixed-b256",
        num_rows=256,
        distributions=("text-like",),
        settings=_MIXED,
    ),
    ArgSpec(
        name="corners-151936",
        num_rows=len(DISTRIBUTIONS) * len(CORNERS),
        distributions=tuple(DISTRIBUTIONS),
        settings=CORNERS,
    ),
    ArgSpec(
        name="corners-50257",
        num_rows=len(DISTRIBUTIONS) * len(CORNERS),
        vocab_size=50_257,
        distributions=tuple(DISTRIBUTIONS),
        settings=CORNERS,
    ),
    ArgSpec(
        name="corners-5000",
        num_rows=len(DISTRIBUTIONS) * len(CORNERS),
        vocab_size=5_000,
        distributions=tuple(DISTRIBUTIONS),
        settings=CORNERS,
    ),
    ArgSpec(
        name="corners-60",
        num_rows=len(DISTRIBUTIONS) * len(CORNERS),
        vocab_size=60,
        distributions=tuple(DISTRIBUTIONS),
        settings=CORNERS,
    ),
)
