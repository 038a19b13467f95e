"""What is kept of the pairs that a model wrote: filters by name, and counts.

The paper filtered nothing. Every filter is counted, whether it is applied or
not, so that the difference can be seen; but for `agreement`, for which further
answers are written only where it is applied.
"""

import collections
import re
from collections.abc import Collection, Iterable
from typing import Any

from fedjax_safety import _validate
from fedjax_safety.evaluation import rules

NONE = 'none'
AGREEMENT = 'agreement'
# Requests are looked at by the first two, answers by the others.
FILTERS = ('evaluation', 'distinct', 'answered', 'refusal', AGREEMENT)
_REFUSAL_RULE = 'openfedllm36'


def check(names: tuple[str, ...], setting: str) -> None:
  """Raises unless names are those of filters, or `none` alone."""
  for name in names:
    _validate.one_of((NONE, *FILTERS), **{setting: name})
  if not names or (NONE in names and len(names) > 1):
    raise ValueError(
      f'{setting}={names} must be {NONE} alone, or any of {", ".join(FILTERS)}'
    )


def normal_form(text: str) -> str:
  """Returns a prompt's words in lower case, without punctuation."""
  return ' '.join(re.findall(r'\w+', text.lower())) or text.strip()


def refuses(answer: str) -> bool:
  """Whether an answer refuses, by rule list."""
  return rules.refuses(answer, rule=_REFUSAL_RULE)


class Sieve:
  """Keeps some of the pairs of one kind, and counts the others by reason.

  Args:
    names: the filters that are applied.
    exclude: normal forms of the prompts of evaluation.
    refuses: whether an answer of this kind should refuse.
  """

  def __init__(
    self, names: Iterable[str], exclude: Collection[str], *, refuses: bool
  ):
    self._applied = frozenset(names) - {NONE}
    self._exclude, self._refuses = exclude, refuses
    self._seen: set[str] = set()
    self._dropped: collections.Counter[str] = collections.Counter()
    self._would_drop: collections.Counter[str] = collections.Counter()
    self._requests = self._kept = 0

  def _keep(self, reasons: list[str]) -> bool:
    """Counts what the filters find in one text; returns whether it stays."""
    applied = [name for name in reasons if name in self._applied]
    if applied:
      self._dropped[applied[0]] += 1
    else:
      self._would_drop.update(reasons)
    return not applied

  def keeps_request(self, request: str) -> bool:
    """Returns whether a request stays."""
    form, reasons = normal_form(request), []
    self._requests += 1
    if form in self._exclude:
      reasons.append('evaluation')
    if form in self._seen:
      reasons.append('distinct')
    self._seen.add(form)
    return self._keep(reasons)

  @property
  def asks_again(self) -> bool:
    """Whether further answers decide on defense data."""
    return AGREEMENT in self._applied

  def agrees(self, refused: float, share: float) -> bool:
    """Whether further answers under the reminder suit this kind of pairs.

    Args:
      refused: share of them that refuse.
      share: from which on a request counts as harmful.
    """
    return (refused >= share) == self._refuses

  def keeps_answer(self, answer: str, *, agreed: bool = True) -> bool:
    """Returns whether a pair stays, by its answer.

    Args:
      answer: of the pair.
      agreed: whether further answers suit it, where there are any.
    """
    reasons = []
    if not answer:
      reasons.append('answered')
    elif refuses(answer) != self._refuses:
      reasons.append('refusal')
    if not agreed:
      reasons.append(AGREEMENT)
    kept = self._keep(reasons)
    self._kept += kept
    return kept

  def dropped_text(self) -> str:
    """Returns how many each filter has dropped so far, in words."""
    found = (f'{name} {count}' for name, count in self._dropped.items())
    return ', '.join(found) or 'none'

  def account(self) -> dict[str, Any]:
    """Returns the counts: of requests written, pairs kept, and each filter.

    A filter that is not applied counts what it would drop of what the others
    leave, except agreement.
    """
    applied = [name for name in FILTERS if name in self._applied]
    others = [
      name for name in FILTERS if name not in self._applied | {AGREEMENT}
    ]
    return {
      'requests': self._requests,
      'kept': self._kept,
      'dropped': {name: self._dropped[name] for name in applied},
      'would_drop': {name: self._would_drop[name] for name in others},
    }
