"""A rule with a linear classifier of deltas that the server trains itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _rule, _scale

# Newton steps on a strictly convex loss of a few numbers.
_NEWTON_STEPS = 12


def _check(
  cohort_size: int, *, threshold: float, ridge: float, sharpness: float
) -> None:
  del cohort_size
  if isinstance(threshold, (int, float)):
    _validate.in_range(0, 1, threshold=threshold)
  if isinstance(ridge, (int, float)):
    _validate.positive(ridge=ridge)
  if isinstance(sharpness, (int, float)):
    _validate.non_negative(sharpness=sharpness)


@_rule.whole(
  check=_check,
  paper='Safe-FedLLM, ACL 2026',
  guarantee='none as (f, κ); as good as the references are like the clients',
  cost='(C + M) M P, and M clients trained by the server',
  needs='`references` of the server',
  acts_on='factors',
)
def update_probe(
  deltas: types.Deltas,
  *,
  references: Callable[[], tuple[types.Deltas, jax.Array]],
  threshold: float = 0.5,
  ridge: float = 0.01,
  sharpness: float = 1.0,
) -> _base.RuleOutput:
  """Returns the mean of the rows that look like the server's own safe deltas.

  A linear probe: the server trains M clients of its own from the adapter that
  it sent, some of them on unsafe data, and fits a logistic regression to tell
  the two apart. It is fitted anew in every round, at the adapter that clients
  start from too. Its features are the entries of a delta, every leaf scaled
  to length 1 and centered on the mean of the references, so that a row is
  judged by its direction and not by its length. With M far below P the fit is
  exact in the M inner products. A row that is unsafe with probability p counts
  `(1 - p) ** sharpness`, and nothing from `threshold` on. One that is longer
  than all safe references is shortened to the longest: who points as honest
  clients do gains nothing by going further. If no row is left the delta is 0,
  as for rows that are not finite. A client's weight is its share before it is
  shortened.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[9.0, 0.0], [2.0, 0.2], [0.1, -1.0]])
    >>> made = jnp.array([[4.0, 0.0], [0.0, -1.0]]), jnp.array([False, True])
    >>> rule = aggregators.update_probe
    >>> print(rule(deltas, references=lambda: made, sharpness=0.0))
    [3.  0.1]

  Args:
    deltas: stacked tree, leaves [C, ...].
    references: `() -> (deltas, is_unsafe)`, leaves [M, ...] and [M] bool, with
      both kinds in it.
    threshold: probability from which a row has no part.
    ridge: weight of the squared norm of the classifier.
    sharpness: exponent of the probability that a row is safe.

  Returns:
    The delta, leaves [...]. The metric `probe_unsafe_by_row` [C] is p.

  Reference: Safe-FedLLM, arXiv 2601.07177, ACL 2026, whose probe is trained
  beforehand on the norms of one layer's factor; here by the server, in the
  round, on all of a delta.
  """
  finite = tree.finite_rows(deltas)
  zeros = jax.tree.map(jnp.zeros_like, deltas)
  clean = tree.where_rows(finite, deltas, zeros)
  known, is_unsafe = references()
  ours, theirs = _centered_products(known, clean)
  unsafe = jax.nn.sigmoid(_fit(ours, theirs, is_unsafe, ridge))
  counts = jnp.where(unsafe < threshold, (1 - unsafe) ** sharpness, 0.0)
  share = _base.normalized(jnp.where(finite, counts, 0.0))
  longest = jnp.max(jnp.where(is_unsafe, 0.0, tree.row_norms(known)))
  shortened = share * _scale.clip_factors(tree.row_norms(clean), longest)
  return _base.RuleOutput(
    tree.mix(shortened, clean), share, finite, {'probe_unsafe_by_row': unsafe}
  )


def _centered_products(known, rows) -> tuple[jax.Array, jax.Array]:
  """Returns the features' inner products: references' [M, M], rows' [C, M]."""
  ours = theirs = 0.0
  leaves = jax.tree.leaves(known)
  for mine, other in zip(leaves, jax.tree.leaves(rows), strict=True):
    mine, other = _directions(mine), _directions(other)
    center = jnp.mean(mine, axis=0)
    mine, other = mine - center, other - center
    ours += mine @ mine.T / len(leaves)
    theirs += other @ mine.T / len(leaves)
  return ours, theirs


def _directions(leaf: jax.Array) -> jax.Array:
  """Returns a leaf's rows [N, size] in float32, of length 1 or 0."""
  flat = leaf.reshape(leaf.shape[0], -1).astype(jnp.float32)
  # By its largest entry first: a square must not overflow.
  largest = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
  flat = flat / jnp.where(largest > 0, largest, 1.0)
  length = tree.safe_sqrt(jnp.sum(flat * flat, axis=1, keepdims=True))
  return flat / jnp.where(length > 0, length, 1.0)


def _fit(ours, theirs, is_unsafe, ridge) -> jax.Array:
  """Returns the rows' log-odds [C] of a ridge-regularized logistic fit."""
  size = ours.shape[0]
  # A last column for the intercept, which is not held small.
  design = jnp.concatenate([ours, jnp.ones((size, 1))], axis=1)
  penalty = jnp.zeros((size + 1, size + 1)).at[:size, :size].set(ridge * ours)
  penalty += 1e-6 * jnp.eye(size + 1)
  target = is_unsafe.astype(jnp.float32)
  # Both kinds count alike, however many there are of each.
  share = jnp.mean(target)
  weight = jnp.where(is_unsafe, 0.5 / share, 0.5 / (1 - share))

  def newton(_, found):
    p = jax.nn.sigmoid(design @ found)
    slope = design.T @ (weight * (p - target)) + penalty @ found
    curve = (design.T * (weight * p * (1 - p))) @ design + penalty
    return found - jnp.linalg.solve(curve, slope)

  found = jax.lax.fori_loop(0, _NEWTON_STEPS, newton, jnp.zeros(size + 1))
  return theirs @ found[:size] + found[size]
