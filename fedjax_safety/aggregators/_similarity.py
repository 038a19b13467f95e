"""Rules that look for clients that are too much alike: FoolsGold."""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _geometry, _rule

_VARIANTS = ('paper', 'openfedllm')
# Keeps the ratio of similarities and the logarithm finite.
_EPSILON = 1e-5


def _check_foolsgold(cohort_size: int, *, variant: str) -> None:
  del cohort_size
  _validate.one_of(_VARIANTS, variant=variant)


@_rule.affine(
  check=_check_foolsgold,
  paper='Fung et al., RAID 2020',
  guarantee='none; aims at sybils',
)
def foolsgold(
  geometry: _geometry.Geometry, *, variant: str = 'paper'
) -> jax.Array:
  """Returns the deltas weighted down by their likeness to other clients.

  A client's weight lies in [0, 1] and falls with its largest cosine
  similarity to another client in this round (no history is kept), so that
  many clients that push one way count little. It defends against sybils, not
  against a single outlier. A row with a NaN or an infinity has weight 0; if
  all weights are 0, as for equal rows, so is the delta.

  Args:
    deltas: stacked tree, leaves [C, ...].
    variant: `paper` adds the weighted rows up; `openfedllm` divides the sum
      by the number of rows whose weight is not 0.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if the variant is unknown.

  Reference: Fung, Yoon, Beschastnikh. The Limitations of Federated Learning
  in Sybil Settings. RAID 2020.
  """
  return _coefficients(geometry.products, geometry.finite, variant)


@_rule.stateful(
  check=_check_foolsgold,
  paper='Fung et al., RAID 2020',
  guarantee='none; aims at sybils',
  cost='C² P, six reads, C P kept',
  needs='the same client in a row every round',
  acts_on='factors',
)
def foolsgold_history(
  cohort_size: int, *, variant: str = 'paper'
) -> _base.Aggregator:
  """Returns the deltas weighted down by the likeness of their histories.

  As `foolsgold`, but cosines are between the sums of all deltas that the
  clients have sent so far, as the paper has it: honest clients differ more
  and more over the rounds, while sybils that share a goal do not. It is for
  cohorts that hold the same clients in the same rows in every round.

  A row with a NaN or an infinity has weight 0 in that round, adds nothing to
  its client's history and is compared to nobody. Called with deltas it runs
  the first round, which is `foolsgold`.

  Args:
    deltas: stacked tree, leaves [C, ...].
    variant: `paper` adds the weighted rows up; `openfedllm` divides the sum
      by the number of rows whose weight is not 0.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if the variant is unknown.

  Reference: Fung, Yoon, Beschastnikh. The Limitations of Federated Learning
  in Sybil Settings. RAID 2020.
  """

  def init(adapter):
    return jax.tree.map(
      lambda leaf: jnp.zeros((cohort_size, *leaf.shape), jnp.float32), adapter
    )

  def update(deltas, history, **_):
    finite = tree.finite_rows(deltas)
    history = jax.tree.map(
      lambda past, leaf: past + leaf.astype(jnp.float32),
      history,
      tree.where_rows(finite, deltas, jax.tree.map(jnp.zeros_like, deltas)),
    )
    geometry = _geometry.measure(history)
    usable = finite & geometry.finite
    rates = _coefficients(geometry.products, usable, variant)
    shares = _base.normalized(rates)
    output = _base.RuleOutput(tree.mix(rates, deltas), shares, finite)
    return output, history

  return _base.stateful(init, update, cohort_size=cohort_size)


def _coefficients(
  products: jax.Array, finite: types.RowMask, variant: str
) -> jax.Array:
  """Returns the coefficients [C] of the rows in the delta."""
  cosines = _geometry.cosines(products, finite)
  others = jnp.where(jnp.eye(finite.size, dtype=bool), 0.0, cosines)
  rates = _learning_rates(others, finite)
  if variant == 'openfedllm':
    rates = rates / jnp.maximum(jnp.sum(rates > 0), 1)
  return rates


def _learning_rates(cosines: jax.Array, finite: types.RowMask) -> jax.Array:
  """Returns the clients' learning rates [C] in [0, 1].

  Args:
    cosines: [C, C] of clients to others, 0 on the diagonal.
    finite: rows that count.
  """
  likeness = jnp.max(cosines, axis=1) + _EPSILON
  # Pardon: a client is scaled down towards those that are more alike.
  ratio = likeness[:, None] / likeness[None, :]
  cosines = jnp.where(ratio < 1, cosines * ratio, cosines)
  rates = jnp.clip(1.0 - jnp.max(cosines, axis=1), 0.0, 1.0)
  rates = jnp.where(finite, rates, 0.0)
  largest = jnp.max(rates)
  rates = rates / jnp.where(largest > 0, largest, 1.0)
  rates = jnp.where(rates == 1.0, 0.99, rates)
  logits = jnp.log(rates / (1.0 - rates) + _EPSILON) + 0.5
  return jnp.clip(logits, 0.0, 1.0)
