"""Means that are differentially private towards each client.

A row is clipped to a norm, so that one client moves the sum by that norm at
most, and Gaussian noise in its proportion is added. `fedjax_safety.privacy`
says what a number of rounds of it costs.
"""

import math

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _noise, _rule, _scale

_PROTECTS = 'one row moves the delta by clip_norm/n; (ε, δ) of a client'


def _is_number(value) -> bool:
  return isinstance(value, (int, float))


def _check_dp_mean(
  cohort_size: int, *, clip_norm: float, noise_multiplier: float
) -> None:
  del cohort_size
  if _is_number(clip_norm):
    _validate.positive(clip_norm=clip_norm)
  if _is_number(noise_multiplier):
    _validate.non_negative(noise_multiplier=noise_multiplier)


@_rule.whole(
  check=_check_dp_mean,
  paper='McMahan et al., ICLR 2018',
  guarantee=_PROTECTS,
  cost='C P, three reads',
  needs='a key',
  acts_on='factors',
)
def dp_mean(
  deltas: types.Deltas,
  *,
  key: types.PRNGKey,
  clip_norm: float = 1.0,
  noise_multiplier: float = 1.0,
) -> _base.RuleOutput:
  """Returns the mean of clipped deltas plus Gaussian noise.

  Every row is scaled down to `clip_norm` if it is longer. Rows count alike
  and the sum is divided by C whatever they hold, so that one client's row
  moves the result by `clip_norm / C` at most, and replacing it by twice that.
  Noise of standard deviation `noise_multiplier * clip_norm / C` is added to
  every coordinate. A row with a NaN or an infinity, or so long that its
  square is no float32, counts as 0.

  A client's share is what clipping left of it, without the noise. The draws
  are those of a simulation, not of a cryptographic generator.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [9.0]])
    >>> key = jax.random.key(0)
    >>> clipped = aggregators.dp_mean(
    ...   deltas, key=key, clip_norm=2.0, noise_multiplier=0.0
    ... )
    >>> print(clipped)
    [1.5]

  Args:
    deltas: stacked tree, leaves [C, ...].
    key: draws the noise.
    clip_norm: largest Euclidean norm of a row over all leaves, in the unit of
      the deltas.
    noise_multiplier: standard deviation of the noise on the sum, in units of
      `clip_norm`; 0 adds none, and protects nobody.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if `clip_norm` is not positive or `noise_multiplier` is
      negative.

  Reference: McMahan, Ramage, Talwar, Zhang. Learning Differentially Private
  Recurrent Language Models. ICLR 2018.
  """
  return _mean_of_clipped(
    deltas, tree.row_norms(deltas), key, clip_norm, noise_multiplier
  )


def _mean_of_clipped(
  deltas, norms, key, clip_norm, noise_multiplier
) -> _base.RuleOutput:
  """Clips rows of these norms, averages them and adds noise."""
  finite = tree.finite_rows(deltas)
  factors = jnp.where(finite, _scale.clip_factors(norms, clip_norm), 0.0)
  delta = tree.mix(factors / finite.size, deltas)
  if not _is_number(noise_multiplier) or noise_multiplier > 0:
    deviation = noise_multiplier * clip_norm / finite.size
    delta = _noise.add(delta, deviation, key)
  return _base.RuleOutput(delta, _base.normalized(factors), finite)


def _check_dp_mean_adaptive(
  cohort_size: int,
  *,
  noise_multiplier: float,
  initial_clip_norm: float,
  target_quantile: float,
  learning_rate: float,
  count_noise: float | None,
) -> None:
  _validate.positive(initial_clip_norm=initial_clip_norm)
  _validate.non_negative(
    noise_multiplier=noise_multiplier, learning_rate=learning_rate
  )
  _validate.in_range(0, 1, target_quantile=target_quantile)
  if count_noise is None:
    count_noise = cohort_size / 20
  _validate.non_negative(count_noise=count_noise)
  if 0 < noise_multiplier and 2 * count_noise <= noise_multiplier:
    raise ValueError(
      f'noise_multiplier={noise_multiplier} needs count_noise above half of '
      f'it, or the count alone would spend more (dp_mean_adaptive); got '
      f'{count_noise}'
    )


@_rule.stateful(
  check=_check_dp_mean_adaptive,
  paper='Andrew et al., NeurIPS 2021',
  guarantee=_PROTECTS,
  cost='C P, three reads',
  needs='a key',
  acts_on='factors',
)
def dp_mean_adaptive(
  cohort_size: int,
  *,
  noise_multiplier: float = 1.0,
  initial_clip_norm: float = 0.1,
  target_quantile: float = 0.5,
  learning_rate: float = 0.2,
  count_noise: float | None = None,
) -> _base.Aggregator:
  """Returns `dp_mean` with a norm that follows a quantile of the rows' norms.

  The share b of rows no longer than the norm is counted, with noise, and the
  norm is multiplied by `exp(-learning_rate * (b - target_quantile))` for the
  next round. Count and sum together cost what one sum with `noise_multiplier`
  would: the noise on the sum is a little larger instead, by
  `1 / sqrt(1 - (noise_multiplier / (2 * count_noise)) ** 2)`.

  Rows that are not finite count as 0 and as longer. The norm of a round is
  its metric `clip_norm`. Called with deltas, it runs the first round.

  Args:
    deltas: stacked tree, leaves [C, ...].
    noise_multiplier: of count and sum together; 0 adds no noise to either.
    initial_clip_norm: norm of the first round, in the unit of the deltas.
    target_quantile: share of rows to leave unclipped, in [0, 1].
    learning_rate: of the norm's logarithm.
    count_noise: standard deviation of the noise on the count, above half of
      `noise_multiplier`; None is C / 20.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if a value is out of range.

  Reference: Andrew, Thakkar, McMahan, Ramaswamy. Differentially Private
  Learning with Adaptive Clipping. NeurIPS 2021.
  """
  count_noise = cohort_size / 20 if count_noise is None else count_noise
  on_sum, on_count = 0.0, 0.0
  if noise_multiplier > 0:
    spent = (noise_multiplier / (2 * count_noise)) ** 2
    on_sum, on_count = noise_multiplier / math.sqrt(1 - spent), count_noise

  def init(adapter):
    del adapter
    return jnp.asarray(initial_clip_norm, jnp.float32)

  def rule(deltas, clip_norm, *, weights, key):
    del weights
    if key is None:
      raise ValueError("dp_mean_adaptive needs 'key'; pass it with the deltas")
    sum_key, count_key = jax.random.split(key)
    norms = tree.row_norms(deltas)
    output = _mean_of_clipped(deltas, norms, sum_key, clip_norm, on_sum)
    within = output.finite & (norms <= clip_norm)
    count = jnp.sum(within) + on_count * jax.random.normal(count_key)
    excess = count / cohort_size - target_quantile
    return output, clip_norm * jnp.exp(-learning_rate * excess)

  inner = _base.stateful(init, rule, cohort_size=cohort_size)

  def update(deltas, state, **runtime):
    output = inner.update(deltas, state, **runtime)
    return output._replace(metrics=output.metrics | {'clip_norm': state})

  return _base.Aggregator(init, update)
