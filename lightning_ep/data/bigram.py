"""The baseline that a language model has to beat: a discounted bigram model."""

import numpy as np


def bigram_cross_entropy(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy of an interpolated Kneser-Ney bigram model on the predictions that a causal language model makes.

    With ``c`` the counts of pairs in ``train`` and the discount ``D = n1 / (n1 + 2 n2)`` from the numbers of pairs seen
    once and twice,

    ``p(w | v) = max(c(v, w) - D, 0) / c(v) + D * |{x: c(v, x) > 0}| / c(v) * p_low(w)``,

    where ``p_low(w)`` is the share of distinct pairs that end in ``w``, discounted by ``D`` in favour of the uniform
    distribution so that no token has probability zero. A ``v`` that is not in ``train`` leaves ``p_low(w)``. See Chen
    and Goodman (1999), "An empirical study of smoothing techniques for language modeling".

    Args:
        train: Windows to count, integers ``[N, S]``.
        validation: Windows to predict, integers ``[M, S]``. Each predicts its positions 1 to ``S - 1`` from the token
            before, as a causal language model does whose labels are its inputs.
        vocab_size: Number of different tokens, more than the largest id.

    Returns:
        Nats per token.
    """
    pairs, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5  # nothing to estimate it from: any value between 0 and 1

    endings = np.bincount(second, minlength=vocab_size)
    spread = discount * np.count_nonzero(endings) / vocab_size
    p_low = (np.maximum(endings - discount, 0) + spread) / len(pairs)

    total = np.bincount(first, weights=counts, minlength=vocab_size)
    distinct = np.bincount(first, minlength=vocab_size)
    # the weight of p_low; 1 for a token that never came first
    backoff = np.divide(discount * distinct, total, out=np.ones(vocab_size), where=total > 0)

    wanted = _pairs(validation, vocab_size)
    v, w = wanted // vocab_size, wanted % vocab_size
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    p = np.maximum(seen - discount, 0) / np.maximum(total[v], 1) + backoff[v] * p_low[w]
    return float(-np.log(p).mean())


def _pairs(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Number the pairs of neighbours inside each window ``[N, S]``: int64 ``[N * (S - 1)]``, ``first * V + second``."""
    windows = windows.astype(np.int64)
    return (windows[:, :-1] * vocab_size + windows[:, 1:]).ravel()
