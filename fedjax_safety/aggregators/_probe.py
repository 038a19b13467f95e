"""A rule that asks the server's own safety pairs what each row does to them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _chain, _rule

# Harm below this share of the loss tells no row from another.
_NEGLIGIBLE = 1e-3
# A row of more median lengths is left out unasked: a mean with it in it would
# say nothing of the others.
_MAX_LENGTHS = 10.0


def _then_step(then: str, then_kwargs: Mapping[str, Any] | None) -> _chain.Step:
  """Returns the rule that combines the kept rows, with its arguments."""
  return functools.partial(_rule.REGISTRY[then].public, **then_kwargs or {})


def _check(
  cohort_size: int,
  *,
  limit: float,
  reward: float,
  reach: float,
  num_passes: int,
  num_dropped: int,
  then: str,
  then_kwargs: Mapping[str, Any] | None,
) -> None:
  _validate.positive(num_passes=num_passes)
  _validate.in_range(0, cohort_size - 1, num_dropped=num_dropped)
  if isinstance(limit, (int, float)):
    _validate.positive(limit=limit)
  if isinstance(reward, (int, float)):
    _validate.non_negative(reward=reward)
  if isinstance(reach, (int, float)):
    _validate.positive(reach=reach)
    _validate.in_range(0, 1, reach=reach)
  allowed = [
    name
    for name, rule in _rule.REGISTRY.items()
    if rule.kind not in ('matrix', 'stateful')
    and _rule.inputs(rule) <= {'key', 'weights'}
  ]
  _validate.one_of(allowed, then=then)
  _chain.check([_then_step(then, then_kwargs)], cohort_size)


@_rule.whole(
  check=_check,
  paper='after Xie et al., ICML 2019',
  guarantee='none as (f, κ); a row is judged by what it does to held answers',
  cost='passes × (C losses, two reads), three reads',
  needs='`adapter`, `probe` of an adapter',
  acts_on='factors',
)
def safety_probe(
  deltas: types.Deltas,
  *,
  adapter: types.Adapter,
  probe: Callable[[types.Adapter], jax.Array],
  limit: float = 0.8,
  reward: float = 0.0,
  reach: float = 0.2,
  num_passes: int = 2,
  num_dropped: int = 0,
  then: str = 'mean',
  then_kwargs: Mapping[str, Any] | None = None,
  key: types.PRNGKey | None = None,
) -> _base.RuleOutput:
  """Returns the mean of the rows, less of those that make answers unsafe.

  A row's harm is what the server's loss on its own safe answers gains when a
  share of the mean is replaced by that row, less what that is on average.
  Around the mean, and not around the adapter before the round, it tells small
  steps apart while the model is still or already unsafe. Harms are taken in
  units of their root mean square, or of a thousandth of the loss where all of
  them are less: a row counts `1 - harm / limit`, at most 1 and at least 0, so
  that one of harm `limit` or more has no part. The number of attackers is not
  asked for: where all harm comes from fewer than half of the rows and in equal
  parts, theirs is above 1. Rows that are not finite, have a loss that is not,
  or are longer than ten times the median row have no part.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [1.0], [-2.0]])
    >>> loss = lambda adapter: jnp.sum((adapter - 2.0) ** 2)
    >>> start = jnp.zeros(1)
    >>> print(aggregators.safety_probe(deltas, adapter=start, probe=loss))
    [1.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    adapter: the server's adapter, leaves [...].
    probe: `adapter -> loss` on the server's own pairs, a scalar. It is called
      on all rows at once, under `jax.vmap`.
    limit: harm from which a row has no part.
    reward: what a row gains for each unit of negative harm; 0 counts a row
      that makes answers safer like one that leaves them alone.
    reach: that share, after the first pass.
    num_passes: how often harm is measured, each time around the mean of the
      last weights, by which the next are multiplied. The first one replaces a
      share 1/C of the plain mean: what each row does to an unsafe mean. Around
      one that is safe already so little does no harm that could be told from
      noise. A larger share does, but of honest rows without safety data too.
    num_dropped: rows of most harm that have no part whatever their harm, for
      a server that knows the number of attackers.
    then: name of the rule that combines the rows. All but the mean see each
      row whole, and in place of one without a part the mean of the others.
    then_kwargs: its arguments.
    key: for random rules.

  Returns:
    The delta, leaves [...]. The metrics are `probe_loss`, the loss at the
    last mean, and `client_scores` [C], the harm in nats of the last pass.

  Reference: a safety loss in the place of that of Xie, Koyejo, Gupta. Zeno:
  Distributed Stochastic Gradient Descent with Suspicion-based
  Fault-tolerance. ICML 2019.
  """
  finite = tree.finite_rows(deltas)
  known = finite & _short(tree.row_norms(deltas), finite)
  clean = tree.where_rows(known, deltas, jax.tree.map(jnp.zeros_like, deltas))
  share = _base.normalized(known)
  for part in (1 / share.size, *[reach] * (num_passes - 1)):
    loss, harm = _harms(clean, share, part, adapter, probe)
    usable = known & jnp.isfinite(harm)
    harm -= jnp.sum(jnp.where(usable, share * harm, 0.0))
    counts = _counts(harm, usable, loss, limit, reward, num_dropped)
    # What one pass has left out no later one brings back: once the mean is
    # safe, a share of an attacker does it no harm.
    share = _base.normalized(share * counts)
  mean = tree.mix(share, clean)
  metrics = {'probe_loss': loss, 'client_scores': harm}
  if then == 'mean':
    return _base.RuleOutput(mean, share, finite, metrics)
  filled = jax.tree.map(
    lambda rows, row: jnp.broadcast_to(row, rows.shape), clean, mean
  )
  output = _chain.run(
    [_then_step(then, then_kwargs)],
    tree.where_rows(share > 0, clean, filled),
    key=key,
    weights=None,
  )
  shares = output.client_weights
  if shares is not None:
    shares = _base.normalized(jnp.where(share > 0, shares, 0.0))
  return _base.RuleOutput(output.delta, shares, finite, metrics)


def _short(norms: jax.Array, finite: types.RowMask) -> types.RowMask:
  """Marks the rows that are not far longer than the median row [C]."""
  median = tree.median(list(jnp.where(finite, norms, jnp.inf)))
  return norms <= _MAX_LENGTHS * median


def _harms(clean, share, part, adapter, probe) -> tuple[jax.Array, jax.Array]:
  """Returns the loss at the mean, and what a part of each row adds to it."""
  clean = jax.tree.map(lambda x: x.astype(jnp.float32), clean)
  mean = tree.mix(share, clean)

  def mixed(row):
    return jax.tree.map(
      lambda w, m, x: w + m + part * (x - m), adapter, mean, row
    )

  loss = probe(jax.tree.map(jnp.add, adapter, mean))
  losses = jax.vmap(lambda row: probe(mixed(row)))(clean)
  return loss, (losses - loss).astype(jnp.float32)


def _counts(
  harm, usable, loss, limit, reward, num_dropped: int
) -> types.Weights:
  """Returns how much each row counts [C], from its harm."""
  known = jnp.where(usable, harm, 0.0)
  square = jnp.sum(known * known) / jnp.maximum(jnp.sum(usable), 1)
  unit = jnp.maximum(tree.safe_sqrt(square), _NEGLIGIBLE * jnp.abs(loss))
  harm = known / jnp.where(unit > 0, unit, 1.0)
  counts = jnp.clip(1 - harm / limit, 0.0, 1.0)
  counts += reward * jnp.maximum(-harm, 0.0)
  kept = _base.keep_lowest(known, usable, usable.size - num_dropped)
  return jnp.where(usable & kept, counts, 0.0)
