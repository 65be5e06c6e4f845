"""Two prompts, one text: how the logits of a request and of its companion are combined."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.sampling.builtin.common import LARGEST, number_in
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.sampler import Combine
from jaxengine.types import Param


def classifier_free_guidance() -> Combine:
    """Moves away from what the companion, a negative or empty prompt, would say.

    log p = u + `guidance_scale` (c - u), with c and u the log-probabilities after the prompt and
    after its companion. A scale of 1 is off.

    Source: Sanchez et al., Stay on topic with Classifier-Free Guidance, arXiv:2306.17806.
    """

    def apply(logits: Float[Array, "B G V"], ctx: SamplingContext) -> Float[Array, "B V"]:
        c, u = jax.nn.log_softmax(logits[:, 0]), jax.nn.log_softmax(logits[:, 1])
        return u + ctx.guidance_scale[:, None] * (c - u)

    check = number_in(0.0, LARGEST, "must be a non-negative finite number")
    return Combine(apply, {"guidance_scale": Param("float32", 1.0, check)})


def contrastive() -> Combine:
    """Prefers what the prompt makes likelier than its companion, a worse prompt, does.

    (1 + beta) e - beta a among tokens at least alpha times as likely as the likeliest, with e and
    a the logits after the prompt and after its companion, beta = `contrastive_beta` and alpha =
    `contrastive_alpha`. A beta of 0 is off.

    Source: Li et al., Contrastive Decoding, arXiv:2210.15097; in the form of O'Brien and Lewis,
    Contrastive Decoding Improves Reasoning in Large Language Models, arXiv:2309.09117.
    """

    def apply(logits: Float[Array, "B G V"], ctx: SamplingContext) -> Float[Array, "B V"]:
        expert, amateur = logits[:, 0], logits[:, 1]
        beta = ctx.contrastive_beta[:, None]
        bound = expert.max(axis=-1, keepdims=True) + jnp.log(ctx.contrastive_alpha)[:, None]
        contrast = jnp.where(expert < bound, -jnp.inf, (1 + beta) * expert - beta * amateur)
        return jnp.where(beta > 0, contrast, expert)

    params = {
        "contrastive_beta": Param(
            "float32", 0.0, number_in(0.0, LARGEST, "must be a non-negative finite number")
        ),
        "contrastive_alpha": Param(
            "float32", 0.1, number_in(0.0, 1.0, "must be a number in [0, 1]")
        ),
    }
    return Combine(apply, params)
