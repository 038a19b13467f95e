"""How well a defense told malicious clients from honest ones in a round.

The truth comes from the simulation; no aggregator sees it. Everything is a
pure function of [C] arrays and can be jitted and vmapped. A share of nobody,
such as the recall without malicious clients, is NaN: it was not measured.
"""

import jax
import jax.numpy as jnp

from fedjax_safety import tree, types

# What `from_scores` and `from_weights` return, by name.
NAMES = (
  'detection_auroc',
  'detection_precision',
  'detection_recall',
  'false_positive_rate',
)


def from_weights(
  client_weights: types.Weights,
  is_malicious: types.RowMask,
  *,
  threshold: float = 0.0,
) -> types.Metrics:
  """Rates a rule by the weights that it gave to the clients of a round.

  A client counts as rejected when its weight is at most `threshold`; the less
  weight, the more suspicious it was.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import detection
    >>> weights = jnp.array([0.5, 0.0, 0.5, 0.0])
    >>> malicious = jnp.array([False, False, True, True])
    >>> found = detection.from_weights(weights, malicious)
    >>> print(found['detection_recall'], found['detection_auroc'])
    0.5 0.5

  Args:
    client_weights: [C], as in `AggregatorOutput.client_weights`.
    is_malicious: [C] bool.
    threshold: the largest weight of a rejected client.

  Returns:
    As `from_scores`.
  """
  return from_scores(-client_weights, is_malicious, threshold=-threshold)


def from_distances(
  deltas: types.Deltas, delta: types.Adapter, is_malicious: types.RowMask
) -> types.Metrics:
  """Rates how far clients are from what the server made of them.

  No rule rejects anybody by this; it says of any rule, also one that gives
  its clients no weights, whether the malicious clients stand out at all.

  Args:
    deltas: stacked tree, leaves [C, ...].
    delta: the aggregate, leaves [...].
    is_malicious: [C] bool.

  Returns:
    `distance_by_row`, [C] float32, and `distance_auroc`, see `auroc`.
  """
  away = jax.tree.map(
    lambda rows, mean: rows.astype(jnp.float32) - mean, deltas, delta
  )
  distances = tree.row_norms(away)
  return {
    'distance_by_row': distances,
    'distance_auroc': auroc(distances, is_malicious),
  }


def from_scores(
  scores: jax.Array, is_malicious: types.RowMask, *, threshold: float
) -> types.Metrics:
  """Rates a detector by its scores, higher meaning more suspicious.

  A client counts as rejected when its score is at least `threshold`. A score
  that is NaN counts as +inf, the most suspicious.

  Args:
    scores: [C] numbers.
    is_malicious: [C] bool.
    threshold: the smallest score of a rejected client.

  Returns:
    Name -> float32 scalar in [0, 1], by the names in `NAMES`:
      detection_precision: malicious share of the rejected clients; NaN if
        none was rejected.
      detection_recall: rejected share of the malicious clients; NaN if none
        is malicious.
      false_positive_rate: rejected share of the honest clients; NaN if none
        is honest.
      detection_auroc: see `auroc`.
  """
  scores = _suspicion(scores)
  is_rejected = scores >= threshold
  return {
    'detection_auroc': auroc(scores, is_malicious),
    'detection_precision': _share(is_malicious, is_rejected),
    'detection_recall': _share(is_rejected, is_malicious),
    'false_positive_rate': _share(is_rejected, ~is_malicious),
  }


def auroc(scores: jax.Array, is_malicious: types.RowMask) -> jax.Array:
  """Returns the area under the receiver operating characteristic.

  That is the share of pairs of a malicious and an honest client in which the
  malicious one has the higher score, ties counting half: 0.5 for a detector
  that knows nothing, 1 for one that ranks every malicious client first.

  Args:
    scores: [C] numbers, higher meaning more suspicious; NaN counts as +inf.
    is_malicious: [C] bool.

  Returns:
    float32 scalar in [0, 1]; NaN if nobody is malicious or nobody is honest.

  Reference: Hanley, McNeil. The meaning and use of the area under a receiver
  operating characteristic (ROC) curve. Radiology 1982.
  """
  scores = _suspicion(scores)
  higher = scores[:, None] > scores[None, :]
  tied = scores[:, None] == scores[None, :]
  wins = jnp.where(tied, 0.5, higher.astype(jnp.float32))
  pairs = is_malicious[:, None] & ~is_malicious[None, :]
  return jnp.sum(jnp.where(pairs, wins, 0.0)) / jnp.sum(pairs)


def _suspicion(scores: jax.Array) -> jax.Array:
  """Returns the scores in float32, +inf where they are NaN."""
  scores = scores.astype(jnp.float32)
  return jnp.where(jnp.isnan(scores), jnp.inf, scores)


def _share(part: types.RowMask, whole: types.RowMask) -> jax.Array:
  """Returns how much of `whole` is in `part`; NaN of nobody."""
  return jnp.sum(part & whole, dtype=jnp.float32) / jnp.sum(whole)
