"""Attacks that try what the server's own rule makes of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, types
from fedjax_safety.attacks import _directed, _honest

# The server's rule as the attacker sees it: deltas -> delta.
Aggregate = Callable[[types.Deltas], types.Adapter]

# What a step that brought nothing is shortened by.
_SHORTENING = 0.8


def optimal_ipm(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  aggregate: Aggregate,
  num_evaluations: int = 20,
  first_step: float = 10.0,
) -> types.Deltas:
  """Sends the negated honest mean, as long as hurts this server most.

  The factor is searched for along a line, so as to move the rule's output as
  far from the honest mean as possible: from 0, steps double while they help,
  then shrink and alternate between both sides of the best one. Honest rows
  are bit-identical; honest rows that are not finite are ignored, and if all
  are, nothing changes.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from fedjax_safety import aggregators, attacks
    >>> deltas = jnp.array([[1.0], [2.0], [3.0], [2.0]])
    >>> mask = jnp.array([False, False, False, True])
    >>> attack = attacks.build('optimal_ipm')
    >>> attacked = attack(
    ...   deltas, mask, jax.random.key(0), aggregate=aggregators.median
    ... )
    >>> print(aggregators.median(attacked))
    [1.5]

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    aggregate: the server's rule, `(deltas) -> delta`, traced once and run
      `num_evaluations` times.
    num_evaluations: how many factors are tried, 0 among them.
    first_step: first factor that is tried, greater than 0.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `num_evaluations` is not greater than 0.

  References:
    Xie, Koyejo, Gupta. Fall of Empires: Breaking Byzantine-Tolerant SGD by
    Inner Product Manipulation. UAI 2019.
    El Mhamdi, Guerraoui, Rouault. Distributed Momentum for
    Byzantine-resilient Stochastic Gradient Descent. ICLR 2021 (the search).
  """
  del key
  honest = _honest.measure(deltas, is_malicious)

  def row(factor):
    return jax.tree.map(lambda mean: -factor * mean, honest.mean)

  return _most_harmful(
    deltas, is_malicious, honest, row, aggregate, num_evaluations, first_step
  )


def optimal_alie(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  aggregate: Aggregate,
  ddof: int = 0,
  num_evaluations: int = 20,
  first_step: float = 10.0,
) -> types.Deltas:
  """Sends ALIE's row at the number of deviations that hurts this server most.

  The number is searched for as in `optimal_ipm`. Honest rows are
  bit-identical; honest rows that are not finite are ignored, and if all are,
  nothing changes.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    aggregate: the server's rule, `(deltas) -> delta`, traced once and run
      `num_evaluations` times.
    ddof: 0 divides by the number of honest rows, 1 by one less.
    num_evaluations: how many factors are tried, 0 among them.
    first_step: first factor that is tried, greater than 0.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `ddof` is neither 0 nor 1, or `num_evaluations` is not
      greater than 0.

  References:
    Baruch, Baruch, Goldberg. A Little Is Enough: Circumventing Defenses For
    Distributed Learning. NeurIPS 2019.
    El Mhamdi, Guerraoui, Rouault. Distributed Momentum for
    Byzantine-resilient Stochastic Gradient Descent. ICLR 2021 (the search).
  """
  del key
  _validate.in_range(0, 1, ddof=ddof)
  honest = _honest.measure(deltas, is_malicious)
  row = _directed.below_mean(deltas, honest, ddof)
  return _most_harmful(
    deltas, is_malicious, honest, row, aggregate, num_evaluations, first_step
  )


def optimal_poison(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  aggregate: Aggregate,
  num_evaluations: int = 20,
  first_step: float = 1.0,
) -> types.Deltas:
  """Sends what makes this server's rule put out what was trained on poison.

  All malicious clients send the honest mean plus a factor times the way from
  it to their own mean: 0 hides, 1 is what they trained, and under plain
  averaging C/f replaces the aggregate by it. The factor is searched for as in
  `optimal_ipm`, so that the rule's output comes as near to their own mean as
  it can. Pushed beyond it a model breaks, which shows. It is for malicious
  clients whose data are poisoned; others have nothing to send. Honest rows are
  bit-identical; rows that are not finite are ignored, and without a finite
  honest one nothing changes.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    aggregate: the server's rule, `(deltas) -> delta`, traced once and run
      `num_evaluations` times.
    num_evaluations: how many factors are tried, 0 among them.
    first_step: first factor that is tried, greater than 0.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `num_evaluations` is not greater than 0.

  References:
    Bagdasaryan, Veit, Hua, Estrin, Shmatikov. How To Backdoor Federated
    Learning. AISTATS 2020 (model replacement).
    El Mhamdi, Guerraoui, Rouault. Distributed Momentum for
    Byzantine-resilient Stochastic Gradient Descent. ICLR 2021 (the search).
  """
  del key
  honest = _honest.measure(deltas, is_malicious)
  # Of the malicious rows, those that the honest ones are to the others.
  own = _honest.measure(deltas, ~is_malicious)
  way = jax.tree.map(jnp.subtract, own.mean, honest.mean)
  way = jax.tree.map(lambda leaf: jnp.where(own.count > 0, leaf, 0.0), way)

  def row(factor):
    return jax.tree.map(lambda m, w: m + factor * w, honest.mean, way)

  def nearness(moved):
    return -_honest.norm(jax.tree.map(jnp.subtract, moved, way))

  return _most_harmful(
    deltas,
    is_malicious,
    honest,
    row,
    aggregate,
    num_evaluations,
    first_step,
    harm=nearness,
  )


def _most_harmful(
  deltas,
  is_malicious,
  honest,
  row,
  aggregate,
  num_evaluations,
  first_step,
  harm=_honest.norm,
):
  """Writes `row(factor)` at the factor that does most harm.

  `harm` says how much, of the way from the honest mean to the aggregate.
  """
  _validate.positive(num_evaluations=num_evaluations)

  def damage(factor):
    attacked = _honest.write(deltas, is_malicious, honest, row(factor))
    moved = jax.tree.map(
      lambda leaf, mean: leaf.astype(jnp.float32) - mean,
      aggregate(attacked),
      honest.mean,
    )
    found = harm(moved)
    # An output that is not finite would give the search no direction.
    return jnp.where(jnp.isfinite(found), found, -jnp.inf)

  factor = _line_search(damage, num_evaluations, first_step)
  return _honest.write(deltas, is_malicious, honest, row(factor))


def _line_search(value, num_evaluations, first_step) -> jax.Array:
  """Returns the best of some factors from 0 on; ties go to the earlier one."""

  def probe(i, search):
    best, best_value, step, grows = search
    # The first probe, at 0, is of the loop too: the rule is compiled once.
    factor = jnp.where(i == 0, 0.0, jnp.abs(best + step))
    found = value(factor)
    better = (found > best_value) & (i > 0)
    grows &= better | (i == 0)
    following = jnp.where(grows, 2 * step, -_SHORTENING * step)
    return (
      jnp.where(better, factor, best),
      jnp.where(better | (i == 0), found, best_value),
      jnp.where(i == 0, step, following),
      grows,
    )

  start = (0.0, -jnp.inf, first_step)
  start = (*(jnp.asarray(x, jnp.float32) for x in start), jnp.asarray(True))
  return jax.lax.fori_loop(0, num_evaluations, probe, start)[0]
