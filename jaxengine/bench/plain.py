"""The oracle of a bench: the whole text in one dense forward, without cache or kernel, in float32.

In the engine's dtype the same forward tells how far rounding alone, by XLA, goes from float32.

Teacher-forced: at every place it is fed what the engine drew before, so one early difference of
rounding costs one place, not all that follow.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel, Params
from jaxengine.nn.attention import ForwardContext, dense_attention

LOGITS_AT_ONCE = 128
"""Places whose logits exist at once."""

GROWTH = 4
"""From one padded length to the next: few programs to compile."""


class Judged(NamedTuple):
    """What the plain path says of every output token: arrays [n, ...], of numpy outside jit.

    Attributes:
      logprob: Its log-probability.
      listed: Log-probabilities of the ids that were listed beside it.
      best: The most likely id.
      margin: By how much its logit leads the next one's.
      rank: How many ids lead the token by more than the tolerance.
      mass: Their probability.
      peak: Log-probability of `best`.
    """

    logprob: Any
    listed: Any
    best: Any
    margin: Any
    rank: Any
    mass: Any
    peak: Any

    @property
    def logprobs(self) -> Any:
        """Of the token and of the listed ids: [n, 1 + K]."""
        return np.column_stack([self.logprob, self.listed])


class PlainModel:
    """A model's dense forward over one text."""

    def __init__(
        self, config: ModelConfig, params: Params, tolerance: float, dtype: str = "float32"
    ) -> None:
        """Args:
        config: The model's shape.
        params: The engine's arrays.
        tolerance: In nats.
        dtype: Of weights and activations in this forward.
        """
        self._dtype = jnp.dtype(dtype)
        self._model = BoundModel(MODELS[config.architecture], config, self._dtype)
        self._params = params
        self._judge = jax.jit(self._judge_padded)
        self._tolerance = tolerance

    def judge(self, prompt: list[int], output: list[int], listed: np.ndarray) -> Judged:
        """Reads a prompt with its output.

        Args:
          prompt: Its ids.
          output: The ids drawn after it.
          listed: Ids [n, K] to be judged at every place of the output.
        """
        text = prompt + output
        size = LOGITS_AT_ONCE
        while size < len(text):
            size *= GROWTH
        ids, wanted = np.zeros(size, np.int32), np.zeros(size, np.int32)
        others = np.zeros((size, listed.shape[1]), np.int32)
        where = slice(len(prompt) - 1, len(text) - 1)
        ids[: len(text)], wanted[where], others[where] = text, output, listed
        judged = self._judge(self._params, ids, wanted, others)
        return Judged(*(np.asarray(leaf)[where] for leaf in judged))

    def _judge_padded(
        self,
        params: Params,
        ids: Int[Array, " T"],
        wanted: Int[Array, " T"],
        listed: Int[Array, "T K"],
    ) -> Judged:
        ctx = ForwardContext(kernels="reference", attend=dense_attention(1))
        with jax.default_matmul_precision("highest"):
            params = jax.tree.map(lambda leaf: leaf.astype(self._dtype), params)
            model = self._model.bind(params)
            hidden, _ = model(ids, jnp.arange(len(ids)), None, None, ctx)

            def some(part: tuple[Array, Array, Array]) -> Judged:
                return self._judge_logits(model.logits(part[0], ctx), *part[1:])

            places = (hidden, wanted, listed)
            split = (len(ids) // LOGITS_AT_ONCE, LOGITS_AT_ONCE)
            parts = tuple(x.reshape(*split, *x.shape[1:]) for x in places)
            judged = jax.lax.map(some, parts)
        return jax.tree.map(lambda x: x.reshape(len(ids), *x.shape[2:]), judged)

    def _judge_logits(
        self, logits: Float[Array, "B V"], wanted: Int[Array, " B"], listed: Int[Array, "B K"]
    ) -> Judged:
        logprobs = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logprobs, wanted[:, None], axis=-1)
        best = jnp.argmax(logprobs, axis=-1)
        peak = logprobs.max(axis=-1)
        others = jnp.where(jnp.arange(logits.shape[1]) == best[:, None], -jnp.inf, logprobs)
        leads = logprobs > own + self._tolerance
        return Judged(
            logprob=own[:, 0],
            listed=jnp.take_along_axis(logprobs, listed, axis=-1),
            best=best,
            margin=peak - others.max(axis=-1),
            rank=leads.sum(axis=-1),
            mass=jnp.where(leads, jnp.exp(logprobs), 0.0).sum(axis=-1),
            peak=peak,
        )
