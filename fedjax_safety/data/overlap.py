"""Counts the prompts that attack, defense and evaluation sets share.

A repair tuned on the attack's own prompts, or on those it is measured with,
looks better than it is.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

from fedjax_safety import _validate

_WORD = re.compile(r'\w+')


def audit(
  sets: Mapping[str, Sequence[str]], *, ngram: int = 8
) -> list[dict[str, str | int | float]]:
  """Compares every pair of prompt sets.

  Exact matches ignore case and the amount of white space. N-grams ignore
  punctuation too; a prompt of fewer words can only match exactly, and so can
  one in a script that does not separate words.

  Args:
    sets: prompts by name of the set.
    ngram: number of consecutive words, n.

  Returns:
    One row a pair, in the order of `sets`: names `a` and `b`; `size_a` and
    `size_b`, prompts in each; `exact`, distinct prompts found in both;
    `exact_share_a` and `exact_share_b`, fractions of each set's prompts that
    occur in the other; `ngram`; `ngram_share_b`, fraction of b's prompts that
    match one of a exactly or share n consecutive words with one.

  Raises:
    ValueError: a set is empty or `ngram` is not positive.
  """
  _validate.positive(ngram=ngram)
  for name, prompts in sets.items():
    if not prompts:
      raise ValueError(f'the prompt set {name!r} is empty; leave it out')
  texts = {name: [_normal(p) for p in sets[name]] for name in sets}
  grams = {name: [_grams(t, ngram) for t in texts[name]] for name in sets}
  rows = []
  for a, b in itertools.combinations(sets, 2):
    in_a, in_b = set(texts[a]), set(texts[b])
    grams_a = set().union(*grams[a])
    shared = [
      text in in_a or not grams_a.isdisjoint(own)
      for text, own in zip(texts[b], grams[b], strict=True)
    ]
    rows.append(
      {
        'a': a,
        'b': b,
        'size_a': len(texts[a]),
        'size_b': len(texts[b]),
        'exact': len(in_a & in_b),
        'exact_share_a': _share([text in in_b for text in texts[a]]),
        'exact_share_b': _share([text in in_a for text in texts[b]]),
        'ngram': ngram,
        'ngram_share_b': _share(shared),
      }
    )
  return rows


def _normal(text: str) -> str:
  """Returns a text in one case with single spaces."""
  return ' '.join(text.casefold().split())


def _grams(text: str, n: int) -> frozenset[str]:
  """Returns the runs of n words of a normalized text."""
  words = _WORD.findall(text)
  return frozenset(
    ' '.join(words[i : i + n]) for i in range(len(words) - n + 1)
  )


def _share(hits: Sequence[bool]) -> float:
  """Returns the fraction of true values."""
  return sum(hits) / len(hits)
