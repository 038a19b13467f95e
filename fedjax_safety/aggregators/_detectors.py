"""A rule that drops clients whose deltas are not as predicted: FLDetector."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _rule

# Uniform samples that the gap statistic compares with; the same in all rounds.
_NUM_SAMPLES = 10
# Eigenvalues of the quasi-Newton system below this, relative to the largest,
# are rounding.
_RANK_TOLERANCE = 1e-6


class DetectorState(NamedTuple):
  """What FLDetector carries from round to round.

  Attributes:
    deltas: the clients' last finite rows, leaves [C, ...] float32.
    delta: the last aggregate, leaves [...] float32.
    moves: [window, ...] changes of the global model, the oldest replaced
      first; zeros where there is none yet.
    changes: [window, ...] changes of the aggregate over the same rounds.
    scores: [window, C] normalized prediction errors.
    num_rounds: `int32[]`, rounds so far.
  """

  deltas: types.Deltas
  delta: types.Adapter
  moves: types.PyTree
  changes: types.PyTree
  scores: jax.Array
  num_rounds: jax.Array


def _check_fldetector(cohort_size: int, *, window: int) -> None:
  _validate.in_range(3, float('inf'), cohort_size=cohort_size)
  _validate.positive(window=window)


@_rule.stateful(
  check=_check_fldetector,
  paper='Zhang et al., KDD 2022',
  guarantee='none as (f, κ)',
  cost='C P + w² P, (C + 2 w) P kept',
  needs='the same client in a row every round',
  acts_on='factors',
)
def fldetector(cohort_size: int, *, window: int = 10) -> _base.Aggregator:
  """Returns the mean of the clients whose deltas are as predicted.

  From the third round on each client's delta is predicted: its last one plus
  an approximate Hessian times the last move of the model. The Hessian is
  L-BFGS's in compact form, from the last `window` moves and changes of the
  aggregate. A client's suspicion is the distance from its prediction
  relative to the sum over the clients, averaged over `window` rounds. Once
  there are as many scores, a gap statistic decides whether suspicions are of
  two kinds; if so, they are split in two where the squared deviations are
  least, and the higher ones have weight 0 in that round.

  The model's move is taken to be the delta that the rule returned; a
  constant server learning rate does not matter. The paper stops and starts
  again without the clients it found; here every round decides anew. A row
  with a NaN or an infinity has weight 0 and the largest suspicion of the
  round. The rule is for cohorts that hold the same clients in the same rows.
  Called with deltas it runs the first round, which is the mean.

  Args:
    deltas: stacked tree, leaves [C, ...], C at least 3.
    window: rounds that scores and the Hessian look back on; static.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 3 or `window` is not positive.

  Reference: Zhang, Cao, Jia, Gong. FLDetector: Defending Federated Learning
  Against Model Poisoning Attacks via Detecting Malicious Clients. KDD 2022.
  """
  references = _uniform_samples(cohort_size)

  def init(adapter):
    def zeros(*axes):
      return jax.tree.map(
        lambda x: jnp.zeros((*axes, *x.shape), jnp.float32), adapter
      )

    return DetectorState(
      zeros(cohort_size),
      zeros(),
      zeros(window),
      zeros(window),
      jnp.zeros((window, cohort_size)),
      jnp.zeros((), jnp.int32),
    )

  def update(deltas, state, **_):
    finite, rounds = tree.finite_rows(deltas), state.num_rounds
    rows = tree.where_rows(
      finite, _float32(deltas), jax.tree.map(jnp.zeros_like, state.deltas)
    )
    errors = _prediction_errors(rows, state)
    errors = jnp.where(finite, errors, jnp.max(jnp.where(finite, errors, 0.0)))
    scores = _put(rounds >= 2, state.scores, rounds, _base.normalized(errors))
    suspicion = jnp.mean(scores, axis=0)
    ready = rounds >= window + 1
    kept = finite & ~(ready & _malicious(suspicion, references))
    kept = jnp.where(jnp.any(kept), kept, finite)
    shares = _base.normalized(kept)
    delta = tree.mix(shares, rows)
    later = DetectorState(
      tree.where_rows(finite, rows, state.deltas),
      delta,
      _put(rounds >= 1, state.moves, rounds, state.delta),
      _put(rounds >= 1, state.changes, rounds, _minus(delta, state.delta)),
      scores,
      rounds + 1,
    )
    delta = jax.tree.map(lambda x, d: x.astype(d.dtype), delta, deltas)
    metrics = {'client_scores': suspicion}
    return _base.RuleOutput(delta, shares, finite, metrics), later

  return _base.stateful(init, update, cohort_size=cohort_size)


def _float32(values: types.PyTree) -> types.PyTree:
  """Returns a tree in float32."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), values)


def _minus(values: types.PyTree, others: types.PyTree) -> types.PyTree:
  """Returns the differences of two trees."""
  return jax.tree.map(jnp.subtract, values, others)


def _put(
  wanted: jax.Array, window: types.PyTree, index: jax.Array, entry: types.PyTree
) -> types.PyTree:
  """Returns a window [w, ...] with an entry in place of its oldest."""

  def put(rows, row):
    return jnp.where(wanted, rows.at[index % rows.shape[0]].set(row), rows)

  return jax.tree.map(put, window, entry)


def _prediction_errors(rows: types.Deltas, state: DetectorState) -> jax.Array:
  """Returns the distances [C] of the rows from their predictions."""
  # The last move, times the Hessian, combines the moves and the changes.
  of_moves, of_changes, of_last = _hessian_product(state)
  step = jax.tree.map(
    lambda x, y, z: x + y + of_last * z,
    tree.mix(of_moves, state.moves),
    tree.mix(of_changes, state.changes),
    state.delta,
  )
  return tree.row_norms(
    jax.tree.map(lambda x, old, s: x - old - s, rows, state.deltas, step)
  )


def _hessian_product(
  state: DetectorState,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns what L-BFGS's Hessian times the last move is made of.

  In compact form (Byrd, Nocedal, Schnabel, 1994) with moves S, changes Y and
  scale s, it is `s v - [s S, Y] M^-1 [s S'v; Y'v]`, where M is
  `[[s S'S, L], [L', -D]]`, and D and L are the diagonal and what is below it
  of S'Y, the oldest pair first.

  Returns:
    Coefficients of the moves [w], of the changes [w] and of the last move.
  """
  size = state.scores.shape[0]
  pairs = jnp.arange(size)
  order = (state.num_rounds + pairs) % size  # oldest first
  products = tree.gram(
    jax.tree.map(
      lambda s, y, v: jnp.concatenate([s[order], y[order], v[None]]),
      state.moves,
      state.changes,
      state.delta,
    )
  )
  s, y, v = slice(0, size), slice(size, 2 * size), 2 * size
  squares, cross = products[s, s], products[s, y]
  latest = squares[-1, -1]
  scale = cross[-1, -1] / jnp.where(latest > 0, latest, 1.0)
  below = jnp.tril(cross, -1)
  system = jnp.block(
    [[scale * squares, below], [below.T, -jnp.diag(jnp.diagonal(cross))]]
  )
  right = jnp.concatenate([scale * products[s, v], products[y, v]])
  solution = _solve(system, right)
  back = jnp.argsort(order)
  return (
    -scale * solution[:size][back],
    -solution[size:][back],
    scale,
  )


def _solve(system: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the least solution of a symmetric system of any rank."""
  values, vectors = jnp.linalg.eigh(system)
  usable = jnp.abs(values) > _RANK_TOLERANCE * jnp.max(jnp.abs(values))
  inverse = jnp.where(usable, 1.0 / jnp.where(usable, values, 1.0), 0.0)
  precise = {'precision': 'highest'}
  projected = inverse * jnp.matmul(vectors.T, right, **precise)
  return jnp.matmul(vectors, projected, **precise)


def _malicious(suspicion: jax.Array, references: np.ndarray) -> jax.Array:
  """Marks [C] the higher of two kinds of suspicion, if there are two."""
  low, high = jnp.min(suspicion), jnp.max(suspicion)
  spread = high - low
  scaled = (suspicion - low) / jnp.where(spread > 0, spread, 1.0)
  one, two, least_high = _deviations(scaled)
  ones, twos, _ = jax.vmap(_deviations)(jnp.asarray(references))
  tiny = jnp.finfo(jnp.float32).tiny
  gap_one = jnp.log(jnp.mean(ones)) - jnp.log(jnp.maximum(one, tiny))
  gap_two = jnp.log(jnp.mean(twos)) - jnp.log(jnp.maximum(two, tiny))
  error = np.sqrt(1 + 1 / _NUM_SAMPLES) * jnp.std(jnp.log(twos))
  return (spread > 0) & (gap_one - gap_two + error < 0) & (scaled >= least_high)


def _deviations(values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns squared deviations from one and from the best two means.

  The third is the least value of the higher group.
  """
  ordered = jnp.sort(values)

  def within(mask):
    mean = jnp.sum(jnp.where(mask, ordered, 0.0)) / jnp.sum(mask)
    return jnp.sum(jnp.where(mask, jnp.square(ordered - mean), 0.0))

  place = jnp.arange(values.size)
  cuts = jnp.arange(1, values.size)
  split = jax.vmap(lambda cut: within(place < cut) + within(place >= cut))(cuts)
  best = jnp.argmin(split)
  return within(place >= 0), split[best], ordered[best + 1]


def _uniform_samples(cohort_size: int) -> np.ndarray:
  """Returns the samples [samples, C] that have no clusters."""
  rng = np.random.default_rng(0)
  return rng.random((_NUM_SAMPLES, cohort_size), np.float32)
