"""Count-based baselines: what next-token loss costs nothing to reach."""

import numpy as np
import numpy.typing as npt

from .windows import Tokens

_DISCOUNT = 0.75
_NO_TOKEN = 0  # the padding id, which never occurs in a training stream

Probabilities = npt.NDArray[np.float64]


class UnigramModel:
    """Token frequencies with add-one smoothing."""

    def __init__(self, stream: Tokens, vocab_size: int) -> None:
        counts = np.bincount(stream, minlength=vocab_size) + 1.0
        self._probabilities = counts / counts.sum()

    def probabilities(self, targets: Tokens) -> Probabilities:
        probabilities: Probabilities = self._probabilities[targets]
        return probabilities


class TrigramModel:
    """Interpolated absolute discounting over trigrams, bigrams and then `UnigramModel`.

    At each order `p(w | c) = max(n(cw) - d, 0) / n(c) + d * t(c) / n(c) * p_lower(w)`, where t(c)
    is the number of distinct continuations of the context (Ney, Essen and Kneser 1994); an unseen
    context uses the lower order alone.
    """

    def __init__(self, stream: Tokens, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._unigram = UnigramModel(stream, vocab_size)
        self._bigram = _Order(stream[:-1], stream[1:], vocab_size)
        self._trigram = _Order(stream[:-2] * vocab_size + stream[1:-1], stream[2:], vocab_size)

    def probabilities(self, before: Tokens, previous: Tokens, targets: Tokens) -> Probabilities:
        """Probability of each target after the tokens `before` and `previous`, all of one shape."""
        lower = self._unigram.probabilities(targets)
        lower = self._bigram.interpolate(previous, targets, lower)
        return self._trigram.interpolate(before * self._vocab_size + previous, targets, lower)


def unigram_nats(model: UnigramModel, window: Tokens) -> Probabilities:
    """Loss in nats of every token but the first of one window."""
    return -np.log(model.probabilities(window[1:]))


def trigram_nats(model: TrigramModel, window: Tokens) -> Probabilities:
    """Loss in nats of every token but the first of one window, from context inside it only."""
    before = np.concatenate(([_NO_TOKEN], window[:-2]))
    return -np.log(model.probabilities(before, window[:-1], window[1:]))


class _Order:
    """The counts of one n-gram order, contexts being numbers."""

    def __init__(self, contexts: Tokens, targets: Tokens, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._grams, self._gram_counts = np.unique(
            contexts * vocab_size + targets, return_counts=True
        )
        self._contexts, self._context_counts = np.unique(contexts, return_counts=True)
        self._continuations = np.bincount(
            np.searchsorted(self._contexts, self._grams // vocab_size),
            minlength=len(self._contexts),
        )

    def interpolate(self, contexts: Tokens, targets: Tokens, lower: Probabilities) -> Probabilities:
        context_counts = _lookup(self._contexts, self._context_counts, contexts)
        continuations = _lookup(self._contexts, self._continuations, contexts)
        gram_counts = _lookup(self._grams, self._gram_counts, contexts * self._vocab_size + targets)
        is_seen = context_counts > 0
        total = np.where(is_seen, context_counts, 1)
        discounted = np.maximum(gram_counts - _DISCOUNT, 0.0) / total
        return np.where(is_seen, discounted + _DISCOUNT * continuations / total * lower, lower)


def _lookup(keys: Tokens, values: Tokens, wanted: Tokens) -> Tokens:
    """`values` at the sorted `keys`, zero where a wanted key is missing."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
