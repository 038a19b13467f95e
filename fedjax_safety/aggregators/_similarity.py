"""A rule that looks for clients that are too much alike: FoolsGold."""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base

_VARIANTS = ('paper', 'openfedllm')
# Keeps the ratio of similarities and the logarithm finite.
_EPSILON = 1e-5


def foolsgold(deltas: types.Deltas, *, variant: str = 'paper') -> types.Adapter:
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
  _validate.one_of(_VARIANTS, variant=variant)
  return _foolsgold(deltas, variant).delta


def build_foolsgold(
  cohort_size: int, *, variant: str = 'paper'
) -> _base.Aggregator:
  """Builds FoolsGold."""
  _validate.one_of(_VARIANTS, variant=variant)
  return _base.stateless(
    lambda deltas, weights, key: _foolsgold(deltas, variant),
    cohort_size=cohort_size,
  )


def _foolsgold(deltas, variant) -> _base.RuleOutput:
  """Weighs the rows by their cosines and adds them up."""
  products = tree.gram(deltas)
  finite = jnp.isfinite(jnp.diagonal(products))
  learning_rates = _learning_rates(_cosines(products, finite), finite)
  factors = learning_rates
  if variant == 'openfedllm':
    factors = factors / jnp.maximum(jnp.sum(factors > 0), 1)
  return _base.RuleOutput(
    tree.mix(factors, deltas), _base.normalized(learning_rates), finite
  )


def _cosines(products: jax.Array, finite: types.RowMask) -> jax.Array:
  """Returns [C, C] cosines; 0 on the diagonal and for unusable rows."""
  squares = jnp.diagonal(products)
  usable = finite & (squares > 0)
  norms = jnp.sqrt(jnp.where(usable, squares, 1.0))
  pairs = usable[:, None] & usable[None, :] & ~jnp.eye(norms.size, dtype=bool)
  cosines = jnp.where(pairs, products, 0.0) / norms[:, None] / norms[None, :]
  return jnp.clip(cosines, -1.0, 1.0)


def _learning_rates(cosines: jax.Array, finite: types.RowMask) -> jax.Array:
  """Returns the clients' learning rates [C] in [0, 1]."""
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
