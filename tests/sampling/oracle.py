"""What each built-in should make of one row, from its paper or its first implementation: numpy in
float64, sorts and plain loops. Where transformers has it, test_builtins.py holds both together."""

from typing import Any

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    """In float64; -inf is probability 0."""
    x = x.astype(np.float64)
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def entropy(p: np.ndarray) -> float:
    return float(-sum(x * np.log(x) for x in p if x > 0))


def keep(logits: np.ndarray, kept: Any) -> np.ndarray:
    return np.where(kept, logits, -np.inf)


def keep_and_top(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return keep(logits, kept | (logits == logits.max()))


def temperature(logits: np.ndarray, text: Any, temperature: float) -> np.ndarray:
    return logits / temperature


def dynamic_temperature(
    logits: np.ndarray, text: Any, temperature: float, dynatemp_range: float, dynatemp_exponent=1.0
) -> np.ndarray:
    p = softmax(logits)
    share = entropy(p) / np.log(np.count_nonzero(p))
    low, high = max(0.0, temperature - dynatemp_range), temperature + dynatemp_range
    return logits / (low + (high - low) * share**dynatemp_exponent)


def top_k(logits: np.ndarray, text: Any, top_k: int) -> np.ndarray:
    return keep(logits, logits >= np.sort(logits)[-top_k])


def top_p(logits: np.ndarray, text: Any, top_p: float) -> np.ndarray:
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    kept = np.zeros(len(logits), bool)
    kept[order] = before < top_p
    return keep_and_top(logits, kept)


def min_p(logits: np.ndarray, text: Any, min_p: float) -> np.ndarray:
    p = softmax(logits)
    return keep(logits, p >= min_p * p.max())


def epsilon(logits: np.ndarray, text: Any, epsilon_cutoff: float) -> np.ndarray:
    return keep_and_top(logits, softmax(logits) >= epsilon_cutoff)


def eta(logits: np.ndarray, text: Any, eta_cutoff: float) -> np.ndarray:
    p = softmax(logits)
    return keep_and_top(logits, p >= min(eta_cutoff, eta_cutoff**0.5 * np.exp(-entropy(p))))


def typical(logits: np.ndarray, text: Any, typical_p: float) -> np.ndarray:
    p = softmax(logits)
    distance = np.abs(-np.log(p) - entropy(p))
    order = np.argsort(distance, kind="stable")
    num_kept = int(np.searchsorted(np.cumsum(p[order]), typical_p)) + 1
    kept = np.zeros(len(logits), bool)
    kept[order[:num_kept]] = True
    return keep(logits, kept)


def top_n_sigma(logits: np.ndarray, text: Any, top_n_sigma: float) -> np.ndarray:
    return keep(logits, logits >= logits.max() - top_n_sigma * np.std(logits.astype(np.float64)))


def p_less(logits: np.ndarray, text: Any, p_less: int) -> np.ndarray:
    p = softmax(logits)
    return keep(logits, p >= np.square(p).sum())


def top_h(logits: np.ndarray, text: Any, top_h: float) -> np.ndarray:
    order = np.argsort(-logits, kind="stable")[:100]
    p = softmax(logits[order])
    terms = -p * np.log(p)
    kept = np.zeros(len(logits), bool)
    kept[order] = np.cumsum(terms) <= top_h * terms.sum()
    return keep_and_top(logits, kept)


def xtc_hit(logits: np.ndarray, xtc_threshold: float) -> np.ndarray:
    """The logits when the coin says so."""
    order = np.argsort(-logits, kind="stable")
    num_viable = np.count_nonzero(softmax(logits) >= xtc_threshold)
    left = logits.copy()
    left[order[: max(num_viable - 1, 0)]] = -np.inf
    return left


def mirostat_v2(
    logits: np.ndarray, text: Any, mirostat_tau: float, mirostat_eta: float = 0.1
) -> np.ndarray:
    """At the first token, where mu is 2 tau."""
    return keep_and_top(logits, -np.log2(softmax(logits)) <= 2 * mirostat_tau)


def additive_penalties(
    logits: np.ndarray, text: Any, frequency_penalty: float, presence_penalty: float
) -> np.ndarray:
    counts = np.bincount(text, minlength=len(logits))
    return logits - frequency_penalty * counts - presence_penalty * (counts > 0)


def logit_bias(
    logits: np.ndarray, text: Any, logit_bias_ids: Any, logit_bias_values: Any
) -> np.ndarray:
    out = logits.copy()
    for token, bias in zip(logit_bias_ids, logit_bias_values, strict=True):
        out[token] += bias
    return out


def repetition_penalty(logits: np.ndarray, text: Any, repetition_penalty: float) -> np.ndarray:
    out = logits.copy()
    for token in set(text):
        out[token] *= repetition_penalty if out[token] < 0 else 1 / repetition_penalty
    return out


def dry(
    logits: np.ndarray,
    text: Any,
    dry_multiplier: float,
    dry_base: float = 1.75,
    dry_allowed_length: int = 2,
    dry_penalty_last_n: int = -1,
    dry_sequence_breakers: Any = (),
) -> np.ndarray:
    text = list(text) if dry_penalty_last_n < 0 else list(text)[-dry_penalty_last_n:]
    longest: dict[int, int] = {}
    for place in range(1, len(text)):
        n = 0
        while n < place and text[place - 1 - n] == text[-1 - n] not in dry_sequence_breakers:
            n += 1
        longest[text[place]] = max(longest.get(text[place], 0), n)
    out = logits.astype(np.float64)
    for token, n in longest.items():
        if n >= dry_allowed_length and token not in dry_sequence_breakers:
            out[token] -= dry_multiplier * dry_base ** (n - dry_allowed_length)
    return out


def no_repeat_ngram(logits: np.ndarray, text: Any, no_repeat_ngram_size: int) -> np.ndarray:
    n, text = no_repeat_ngram_size, list(text)
    seen = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    tail = text[len(text) - n + 1 :]
    return keep(logits, [(*tail, token) not in seen for token in range(len(logits))])


def bad_words(logits: np.ndarray, text: Any, bad_words: Any) -> np.ndarray:
    out = logits.copy()
    for *before, last in bad_words:
        if list(text)[len(text) - len(before) :] == before:
            out[last] = -np.inf
    return out


def allowed_tokens(logits: np.ndarray, text: Any, allowed_token_ids: Any) -> np.ndarray:
    return keep(logits, np.isin(np.arange(len(logits)), allowed_token_ids))


def forced_tokens(logits: np.ndarray, text: Any, forced_token_ids: Any) -> np.ndarray:
    """At the first token."""
    is_next = np.arange(len(logits)) == forced_token_ids[0]
    return np.where(is_next, 0.0, -np.inf)


def watermark(
    logits: np.ndarray, text: Any, watermark_delta: float, gamma: float = 0.25, key: int = 15485863
) -> np.ndarray:
    green = [is_green(int(text[-1]), token, gamma, key) for token in range(len(logits))]
    return logits + watermark_delta * np.array(green)


def contrastive(
    expert: np.ndarray, amateur: np.ndarray, contrastive_beta: float, contrastive_alpha: float
) -> np.ndarray:
    if not contrastive_beta:
        return expert
    contrast = (1 + contrastive_beta) * expert - contrastive_beta * amateur
    return keep(contrast, softmax(expert) >= contrastive_alpha * softmax(expert).max())


def is_green(before: int, token: int, gamma: float, key: int) -> bool:
    """The hash in Python's own integers."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    return mixed(mixed(before ^ key) ^ token) < gamma * 2**32
