"""CIDEr-D (Vedantam et al., 2015, arXiv 1411.5726): n-gram agreement weighted by how telling each n-gram is."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

SIGMA = 6.0  # words; of the penalty for another length (the paper's)
ORDERS = 4


def _ngrams(text: str) -> list[Counter]:
    """Counts of the 1- to 4-grams of the lower-cased words."""
    words = re.findall(r"\w+", text.lower())
    return [Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1)) for n in range(1, ORDERS + 1)]


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus CIDEr-D, 0 to 10. How telling an n-gram is comes from the references of this very corpus, so scores of
    different corpora do not compare, and a corpus of one sample scores 0."""
    refs = [[_ngrams(r) for r in given] for given in references]
    seen = Counter(gram for given in refs for gram in {g for ref in given for order in ref for g in order})
    log_size = math.log(len(refs))

    def weighted(order: Counter) -> dict[tuple[str, ...], float]:
        return {g: count * (log_size - math.log(max(seen[g], 1))) for g, count in order.items()}

    total = 0.0
    for answer, given in zip(answers, refs, strict=True):
        got = _ngrams(answer)
        for ref in given:
            # Length in bigrams, as the authors' code counts it.
            penalty = math.exp(-((sum(got[1].values()) - sum(ref[1].values())) ** 2) / (2 * SIGMA**2))
            for n in range(ORDERS):
                a, b = weighted(got[n]), weighted(ref[n])
                norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
                if norm:
                    total += penalty * sum(min(a[g], b[g]) * b[g] for g in a.keys() & b.keys()) / norm / len(given)
    return 10.0 * total / ORDERS / len(refs)
