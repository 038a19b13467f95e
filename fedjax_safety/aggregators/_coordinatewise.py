"""Rules that treat every coordinate on its own: medians, means and signs.

A value that is NaN or infinite counts as one Byzantine value of its
coordinate: it sorts to the upper end. Coordinates with more of them than the
rule can bear are 0 in the result.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree
from fedjax_safety.aggregators import _rule


@_rule.coordinatewise(
  paper='Yin et al., ICML 2018',
  guarantee='(f, κ), κ = 4(1 + f/(n−2f))², Allouah et al., 2023',
  needs='n ≥ 2f + 1',
)
def median(values: Sequence[jax.Array]) -> jax.Array:
  """Returns the median of the clients in every coordinate.

  For an even number of clients it is the mean of the two middle values. As
  long as fewer than half of a coordinate's values are Byzantine (NaN and
  infinity included), it lies within the range of the honest ones.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> print(aggregators.median(jnp.array([[1.0], [jnp.nan], [2.0]])))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].

  Returns:
    The delta, leaves [...].

  Reference: Yin, Chen, Ramchandran, Bartlett. Byzantine-Robust Distributed
  Learning: Towards Optimal Statistical Rates. ICML 2018.
  """
  return tree.median(values)


@_rule.coordinatewise(
  check=_rule.at_least('trimmed_mean', 2, 1),
  paper='Yin et al., ICML 2018',
  guarantee='(f, κ), κ = 6f/(n−2f)·(1 + f/(n−2f)), Allouah et al., 2023',
  needs='n ≥ 2f + 1',
)
def trimmed_mean(
  values: Sequence[jax.Array], *, num_byzantine: int
) -> jax.Array:
  """Returns, in every coordinate, the mean without the extremes.

  The `num_byzantine` lowest and as many highest values are left out. With at
  most `num_byzantine` Byzantine values in a coordinate (NaN and infinity
  included) the result lies within the range of the honest ones; 0 gives the
  mean.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [1e9], [2.0]])
    >>> print(aggregators.trimmed_mean(deltas, num_byzantine=1))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: values to leave out at either end; below C / 2.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if nothing would be left.

  Reference: Yin, Chen, Ramchandran, Bartlett. Byzantine-Robust Distributed
  Learning: Towards Optimal Statistical Rates. ICML 2018.
  """
  # Two cut-off ranks are enough: values below the lower one count as it, and
  # so do those above the upper one, whose surplus is then taken off. Relative
  # to the lower cut-off, equal rows give exactly that row.
  f, n = num_byzantine, len(values)
  low, high = tree.order_statistics(values, (f, n - 1 - f))
  borne = high < jnp.inf
  # Values that are not finite stand at the upper end and are trimmed first;
  # where they are more than f, nothing else is trimmed there.
  top = jnp.where(borne, high, low)
  excess = tree.total(
    [
      jnp.where(value < jnp.inf, jnp.clip(value, low, high), top) - low
      for value in values
    ]
  )
  excess -= f * (top - low)
  kept = jnp.where(borne, n - 2.0 * f, _num_finite(values) - f)
  return jnp.where(kept > 0, low + excess / jnp.maximum(kept, 1.0), 0.0)


def _num_finite(values: Sequence[jax.Array]) -> jax.Array:
  """Counts the values below +inf in every coordinate."""
  return tree.total([(value < jnp.inf).astype(jnp.float32) for value in values])


@_rule.coordinatewise(
  check=_rule.at_least('meamed', 2, 1),
  paper='Xie, Koyejo, Gupta, 2018',
  guarantee='(f, κ), κ = 4f/(n−f)·(1 + 4(1 + f/(n−2f))²), own proof',
  needs='n ≥ 2f + 1',
)
def meamed(values: Sequence[jax.Array], *, num_byzantine: int) -> jax.Array:
  """Returns, in every coordinate, the mean of the values around the median.

  The `num_byzantine` values farthest from the median are left out; of two
  that are equally far, the larger one. A value that is NaN or infinite is
  left out first. 0 gives the mean.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [9.0], [2.0]])
    >>> print(aggregators.meamed(deltas, num_byzantine=1))
    [1.5]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: values to leave out; below C / 2.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if half of the clients or more would be left out.

  Reference: Xie, Koyejo, Gupta. Generalized Byzantine-tolerant SGD.
  arXiv 1802.10116, 2018.
  """
  n, f = len(values), num_byzantine
  ordered = tree.order_statistics(values, range(n))
  center = 0.5 * ordered[(n - 1) // 2] + 0.5 * ordered[n // 2]
  # Where the center is finite, so is all that is not above it.
  middle = _finite_sum(ordered[f], ordered[f : n - f], n // 2 + 1 - f)
  return _mean_around(center, ordered, middle, f)


@_rule.coordinatewise(
  check=_rule.at_least('phocas', 2, 1),
  paper='Xie, Koyejo, Gupta, 2018',
  guarantee=('(f, κ), κ = 4f/(n−f)·(1 + 6f/(n−2f)·(1 + f/(n−2f))), own proof'),
  needs='n ≥ 2f + 1',
)
def phocas(values: Sequence[jax.Array], *, num_byzantine: int) -> jax.Array:
  """Returns, in every coordinate, the mean around the trimmed mean.

  The `num_byzantine` values farthest from the trimmed mean are left out; of
  two that are equally far, the larger one. A value that is NaN or infinite is
  left out first. 0 gives the mean.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: values to leave out, and to trim at either end for the
      center; below C / 2.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if half of the clients or more would be left out.

  Reference: Xie, Koyejo, Gupta. Phocas: Dimensional Byzantine-resilient
  Stochastic Gradient Descent. arXiv 1805.09682, 2018.
  """
  n, f = len(values), num_byzantine
  ordered = tree.order_statistics(values, range(n))
  middle = _finite_sum(ordered[f], ordered[f : n - f], 1)
  center = ordered[f] + middle[0] / middle[1]
  return _mean_around(center, ordered, middle, f)


def _mean_around(
  center: jax.Array,
  ordered: Sequence[jax.Array],
  middle: tuple[jax.Array, jax.Array | float],
  num_byzantine: int,
) -> jax.Array:
  """Returns the mean of the n - f sorted values nearest to a center.

  `middle` is the `_finite_sum` of those that are neither of the f lowest nor
  of the f highest, relative to the lowest of them.
  """
  # They lie side by side. Starting from the lowest n - f, the next above
  # replaces the lowest while it is nearer to the center: value s gives way to
  # value s + n - f. Chosen one by one, so that no outlier enters the sum.
  f, size = num_byzantine, len(ordered) - num_byzantine
  excess, count = middle
  for low, high in zip(ordered[:f], ordered[size:], strict=True):
    nearer = jnp.where(high - center < center - low, high, low)
    excess = excess + (nearer - ordered[f])
  return ordered[f] + excess / (count + f)


def _finite_sum(
  origin: jax.Array, values: Sequence[jax.Array], num_known: int = 0
) -> tuple[jax.Array, jax.Array | float]:
  """Returns the sum of the finite values minus an origin, and their number.

  The first `num_known` need no look. Each look is dear where many values are
  sorted in the same kernel: beyond some length a CPU runs it several times
  slower.
  """
  known, others = values[:num_known], values[num_known:]
  excess = [value - origin for value in known]
  excess += [jnp.where(v < jnp.inf, v - origin, 0.0) for v in others]
  count = _num_finite(others) if others else 0.0
  return tree.total(excess), num_known + count


@_rule.coordinatewise(
  paper='Bernstein et al., ICLR 2019',
  guarantee='a minority cannot turn an agreed sign',
)
def sign_majority(values: Sequence[jax.Array]) -> jax.Array:
  """Returns, in every coordinate, the sign that most clients have.

  The result is -1, 0 or 1: where as many are positive as negative, 0. A value
  that is 0, NaN or infinite has no vote. The size of the step is the server's
  learning rate alone.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> print(aggregators.sign_majority(jnp.array([[2.0], [0.1], [-1e9]])))
    [1.]

  Args:
    deltas: stacked tree, leaves [C, ...].

  Returns:
    The delta, leaves [...].

  Reference: Bernstein, Zhao, Azizzadenesheli, Anandkumar. signSGD with
  Majority Vote is Communication Efficient and Fault Tolerant. ICLR 2019.
  """
  return jnp.sign(_votes(values))


def _check_robust_learning_rate(
  cohort_size: int, *, threshold: float | jax.Array
) -> None:
  if isinstance(threshold, int | float):
    _validate.in_range(0, cohort_size, threshold=threshold)


@_rule.coordinatewise(
  check=_check_robust_learning_rate,
  paper='Özdayi, Kantarcioglu, Gel, AAAI 2021',
  guarantee='none; aims at backdoors',
)
def robust_learning_rate(
  values: Sequence[jax.Array], *, threshold: float
) -> jax.Array:
  """Returns the mean, turned around where the clients' signs disagree.

  A coordinate keeps its mean if its positive values outnumber its negative
  ones, or the reverse, by `threshold` or more; elsewhere the sign is turned,
  which undoes what only a few clients want. A value that is NaN or infinite
  has neither a vote nor a part in the mean. The size of a single value is not
  bounded.

  Args:
    deltas: stacked tree, leaves [C, ...].
    threshold: in clients, from 0, which gives the mean, to C.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if the threshold is out of range.

  Reference: Özdayi, Kantarcioglu, Gel. Defending against Backdoors in
  Federated Learning with Robust Learning Rate. AAAI 2021.
  """
  agreed = jnp.abs(_votes(values)) >= threshold
  total, count = _finite_sum(jnp.zeros_like(values[0]), values)
  mean = total / jnp.maximum(count, 1.0)
  return jnp.where(agreed, mean, -mean)


def _votes(values: Sequence[jax.Array]) -> jax.Array:
  """Adds up the signs of the finite values."""
  return tree.total([jnp.where(v < jnp.inf, jnp.sign(v), 0.0) for v in values])
