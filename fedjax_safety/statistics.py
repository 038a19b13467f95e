"""Small exact statistics for rates: intervals, agreement, precision, recall.

Standard library only, so that a report can be made where nothing else is
installed. Rates are shares in [0, 1]; every interval is two-sided.
"""

import math
import statistics
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from fedjax_safety import _validate


class Interval(NamedTuple):
  """An estimate with its two-sided confidence bounds."""

  value: float
  low: float
  high: float


def wilson_interval(
  successes: float, n: float, confidence: float = 0.95
) -> Interval:
  """Returns a share with its Wilson score interval.

  The bounds always lie in [0, 1], contain the share and have a width above
  zero, also at no success and at all successes. `successes` and `n` need not
  be whole: the mean share of several seeds over `n` prompts is welcome.

  Args:
    successes: how many of the `n` trials succeeded.
    n: number of trials; with none the share is nan and the bounds 0 and 1.
    confidence: coverage, between 0 and 1 exclusively.

  Returns:
    The share `successes / n` and its bounds.

  Raises:
    ValueError: if `successes` is not in [0, n] or `confidence` not in (0, 1).

  Example:
    >>> share, low, high = wilson_interval(8, 10)
    >>> f'{share:.2f} [{low:.2f}, {high:.2f}]'
    '0.80 [0.49, 0.94]'

  Reference: E. B. Wilson, "Probable inference, the law of succession, and
  statistical inference", JASA 1927.
  """
  _check_confidence(confidence)
  _validate.non_negative(n=n)
  _validate.in_range(0, n, successes=successes)
  if n == 0:
    return Interval(math.nan, 0.0, 1.0)
  z2 = statistics.NormalDist().inv_cdf((1 + confidence) / 2) ** 2
  share = successes / n
  center = (share + z2 / (2 * n)) / (1 + z2 / n)
  half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * n)) / n) / (1 + z2 / n)
  # At the ends the bound equals the share exactly; rounding must not show.
  low = 0.0 if successes == 0 else max(0.0, center - half)
  high = 1.0 if successes == n else min(1.0, center + half)
  return Interval(share, low, high)


def difference_interval(
  successes: float,
  n: float,
  reference_successes: float,
  reference_n: float,
  confidence: float = 0.95,
) -> Interval:
  """Returns a difference of two independent shares with Newcombe's interval.

  The bounds lie in [-1, 1] and come from the two Wilson intervals. Where both
  shares were measured on the same prompts the interval is conservative.

  Args:
    successes: successes of the row of interest, out of `n`.
    n: its number of trials, at least 1.
    reference_successes: successes of the row compared against.
    reference_n: its number of trials, at least 1.
    confidence: coverage, between 0 and 1 exclusively.

  Returns:
    Share minus reference share, and its bounds.

  Raises:
    ValueError: if a count is out of range.

  Example:
    >>> round(difference_interval(9, 10, 2, 10).value, 3)
    0.7

  Reference: R. G. Newcombe, "Interval estimation for the difference between
  independent proportions", Statistics in Medicine 1998, method 10.
  """
  _validate.positive(n=n, reference_n=reference_n)
  ours = wilson_interval(successes, n, confidence)
  theirs = wilson_interval(reference_successes, reference_n, confidence)
  value = ours.value - theirs.value
  low = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
  high = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
  return Interval(value, max(-1.0, value - low), min(1.0, value + high))


def mean_interval(
  values: Sequence[float], confidence: float = 0.95
) -> Interval:
  """Returns the mean of a few values with its Student t interval.

  Args:
    values: one value for each seed.
    confidence: coverage, between 0 and 1 exclusively.

  Returns:
    The mean and its bounds. One value alone says nothing about its spread:
    its bounds are nan. Equal values give bounds of no width.

  Raises:
    ValueError: if there are no values.

  Example:
    >>> mean, low, high = mean_interval([0.90, 0.94, 0.92])
    >>> f'{mean:.2f} [{low:.2f}, {high:.2f}]'
    '0.92 [0.87, 0.97]'

  Reference: Student, "The probable error of a mean", Biometrika 1908.
  """
  _check_confidence(confidence)
  if not values:
    raise ValueError('values=[] must hold at least one value; got none')
  mean = statistics.fmean(values)
  if len(values) == 1:
    return Interval(mean, math.nan, math.nan)
  if min(values) == max(values):
    return Interval(mean, mean, mean)
  error = statistics.stdev(values) / math.sqrt(len(values))
  half = t_quantile(len(values) - 1, confidence) * error
  return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int, confidence: float = 0.95) -> float:
  """Returns t with P(|T| <= t) = confidence for Student's distribution.

  Exact to rounding: for whole degrees of freedom the coverage is a finite sum
  in the angle arctan(t / sqrt(degrees)), which is inverted by bisection.

  Args:
    degrees: degrees of freedom, a whole number of at least 1.
    confidence: two-sided coverage, between 0 and 1 exclusively.

  Returns:
    The two-sided quantile.

  Raises:
    ValueError: if an argument is out of range.

  Example:
    >>> round(t_quantile(2), 3)
    4.303

  Reference: Abramowitz and Stegun, "Handbook of Mathematical Functions",
  26.7.3 and 26.7.4.
  """
  _check_confidence(confidence)
  _validate.positive(degrees=degrees)
  low, high = 0.0, math.pi / 2
  while True:
    middle = (low + high) / 2
    if middle in (low, high):
      return math.sqrt(degrees) * math.tan(middle)
    if _t_coverage(middle, degrees) < confidence:
      low = middle
    else:
      high = middle


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
  """Returns the agreement of two judges beyond what chance would give.

  1 is perfect, 0 is chance, below 0 is worse than chance. Symmetric in its
  arguments.

  Args:
    a: one judge's verdicts.
    b: the other's, on the same items in the same order.

  Returns:
    Cohen's kappa; nan where it is undefined: with no item, and when both
    judges give one and the same verdict everywhere.

  Raises:
    ValueError: if the two have different lengths.

  Example:
    >>> cohen_kappa([True, True, False, False], [True, False, False, False])
    0.5

  Reference: J. Cohen, "A coefficient of agreement for nominal scales",
  Educational and Psychological Measurement 1960.
  """
  _check_lengths(a, b)
  n = len(a)
  labels = set(a) | set(b)
  if len(labels) < 2:
    return math.nan
  observed = sum(x == y for x, y in zip(a, b, strict=True))
  # Whole numbers until the last division: exact, hence symmetric.
  expected = sum(
    sum(x == label for x in a) * sum(y == label for y in b) for label in labels
  )
  return (n * observed - expected) / (n * n - expected)


def precision_recall(
  predicted: Sequence[bool], actual: Sequence[bool]
) -> tuple[float, float]:
  """Returns how far a judge's positives can be trusted, and how many it finds.

  Args:
    predicted: the judge's verdicts.
    actual: the truth, on the same items in the same order.

  Returns:
    Precision (true positives of all called positive) and recall (true
    positives of all that are positive); nan where the divisor is zero.

  Raises:
    ValueError: if the two have different lengths.

  Example:
    >>> precision_recall([True, True, False, True], [True, False, True, True])
    (0.6666666666666666, 0.6666666666666666)
  """
  _check_lengths(predicted, actual)
  pairs = list(zip(predicted, actual, strict=True))
  both = sum(bool(p and t) for p, t in pairs)
  called = sum(bool(p) for p, _ in pairs)
  real = sum(bool(t) for _, t in pairs)
  return _ratio(both, called), _ratio(both, real)


def _ratio(part: int, whole: int) -> float:
  """Returns part / whole, or nan when the whole is nothing."""
  return part / whole if whole else math.nan


def _t_coverage(angle: float, degrees: int) -> float:
  """Returns P(|T| <= sqrt(degrees) * tan(angle)) as its finite sum."""
  sine, cosine = math.sin(angle), math.cos(angle)
  odd = degrees % 2
  term = cosine if odd else 1.0
  total = 0.0
  for k in range(2 + odd, degrees + 1, 2):
    total += term
    term *= cosine * cosine * (k - 1) / k
  return (angle + sine * total) * 2 / math.pi if odd else sine * total


def _check_confidence(confidence: float) -> None:
  """Raises unless the confidence is strictly between 0 and 1."""
  if not 0 < confidence < 1:
    raise ValueError(f'confidence={confidence} must lie in (0, 1), e.g. 0.95')


def _check_lengths(a: Sequence, b: Sequence) -> None:
  """Raises unless the two sequences pair up."""
  if len(a) != len(b):
    raise ValueError(
      f'the two sequences must pair up item by item; got {len(a)} and {len(b)}'
    )
