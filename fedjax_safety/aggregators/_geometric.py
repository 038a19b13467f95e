"""Rules that iterate on a point near the rows: their geometric median, and
clipping around the last aggregate. Iterations move coefficients, not rows."""

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _geometry, _rule, _scale

_STARTS = ('central', 'mean', 'zero')


def _check_geometric_median(
  cohort_size: int, *, num_iterations: int, start: str, smoothing: float
) -> None:
  del cohort_size
  _validate.one_of(_STARTS, start=start)
  _validate.positive(num_iterations=num_iterations)
  if isinstance(smoothing, (int, float)):
    _validate.positive(smoothing=smoothing)


@_rule.affine(
  check=_check_geometric_median,
  paper='Pillutla et al., IEEE TSP 2022',
  guarantee='(f, κ), κ = 4(1 + f/(n−2f))², Allouah et al., 2023',
  needs='n ≥ 2f + 1',
)
def geometric_median(
  geometry: _geometry.Geometry,
  *,
  num_iterations: int = 64,
  start: str = 'central',
  smoothing: float = 1e-6,
) -> jax.Array:
  """Returns the point with the least sum of distances to the rows.

  Weiszfeld's iteration: the mean of the rows, each weighted by the inverse
  of its distance from the last point. As long as the Byzantine rows are a
  minority, they cannot move the result far from the honest ones, whatever
  they hold. Iterations run on the inner products of the rows and cost next
  to nothing. A row with a NaN or an infinity has weight 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [2.0], [1e9]])
    >>> print(aggregators.geometric_median(deltas).round(3))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_iterations: iterations; the published experiments, where each is a
      round of communication, take 3.
    start: the first point. `central` is the mean of the smallest majority
      around the row whose distances to the others sum up to the least, which
      no minority can move far. `mean` and `zero` are the published ones; a
      far row moves `mean` by its distance, which takes iterations to undo,
      and before convergence `zero` depends on the origin.
    smoothing: distances below this count as this, in the unit of the deltas.
      It must be well below the distances between rows, or the result is
      close to their mean.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if `num_iterations` or `smoothing` is not positive.

  Reference: Pillutla, Kakade, Harchaoui. Robust Aggregation for Federated
  Learning. IEEE Transactions on Signal Processing 70, 2022.
  """
  finite = geometry.finite
  vectors, origin = _relative(geometry)

  def reweigh(_, state):
    point, _ = state
    squares = _sq_norms(vectors - point, geometry.basis)
    lengths = jnp.maximum(smoothing, tree.safe_sqrt(squares))
    lengths = jnp.where(finite, lengths, jnp.inf)
    # Relative to the shortest, so that no inverse overflows.
    weights = jnp.where(finite, jnp.min(lengths) / lengths, 0.0)
    shares = _base.normalized(weights)
    return jnp.matmul(shares, vectors, precision='highest'), shares

  if start == 'zero':
    first = -origin
  else:
    around = finite if start == 'mean' else _central_rows(geometry)
    first = _base.normalized(around) @ vectors
  none = jnp.zeros(finite.size)
  return lax.fori_loop(0, num_iterations, reweigh, (first, none))[1]


def _central_rows(geometry: _geometry.Geometry) -> types.RowMask:
  """Marks the majority of rows nearest to the most central one."""
  sq_dists, finite = geometry.sq_dists, geometry.finite
  dists = jnp.where(finite, jnp.sqrt(sq_dists), 0.0)
  best = jnp.argmax(_base.keep_lowest(jnp.sum(dists, 1), finite, 1))
  return _base.keep_lowest(sq_dists[best], finite, finite.size // 2 + 1)


def _relative(geometry: _geometry.Geometry) -> tuple[jax.Array, jax.Array]:
  """Returns the rows' coordinates relative to a finite row, and that row's.

  In them what all rows have in common, however large, is exactly 0.
  """
  coordinates = geometry.coordinates
  origin = coordinates[jnp.argmax(geometry.finite)]
  vectors = jnp.where(geometry.finite[:, None], coordinates - origin, 0.0)
  return vectors, origin


def _sq_norms(vectors: jax.Array, basis: jax.Array) -> jax.Array:
  """Returns the squared norms of vectors [M, K]; +inf where they overflow."""
  products = jnp.matmul(vectors, basis, precision='highest')
  squares = jnp.sum(products * vectors, axis=1)
  return jnp.where(jnp.isnan(squares), jnp.inf, jnp.maximum(squares, 0.0))


def _check_centered_clipping(
  cohort_size: int, *, num_iterations: int, clip_norm: float
) -> None:
  del cohort_size
  _validate.positive(num_iterations=num_iterations)
  if isinstance(clip_norm, (int, float)):
    _validate.positive(clip_norm=clip_norm)


@_rule.stateful(
  check=_check_centered_clipping,
  paper='Karimireddy et al., ICML 2021',
  guarantee='a row moves the center by clip_norm/n at most; δ ≤ 0.1',
  cost='C² P, three reads',
  needs='the scale of the honest spread',
  acts_on='factors',
)
def centered_clipping(
  cohort_size: int, *, clip_norm: float, num_iterations: int = 1
) -> _base.Aggregator:
  """Returns the last aggregate plus the mean of the rows' clipped changes.

  The center starts at 0 and is the aggregate of the last round after that. An
  iteration clips the differences of the rows from the center to a norm of
  `clip_norm` and adds their mean to the center, so that a single row moves
  it by `clip_norm / C` at most. The deltas are read three times, however many
  iterations there are.

  A row with a NaN or an infinity is left out of the mean; if all are, the
  center stays. `client_weights` are the clients' shares of what is new in the
  aggregate. Called with deltas it runs the first round.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [2.0], [1e9]])
    >>> print(aggregators.centered_clipping(deltas, clip_norm=3.0))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    clip_norm: largest distance from the center that counts in full, in the
      unit of the deltas.
    num_iterations: iterations in a round; static.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if an argument is not positive.

  Reference: Karimireddy, He, Jaggi. Learning from History for Byzantine
  Robust Optimization. ICML 2021.
  """

  def init(adapter):
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), adapter)

  def update(deltas, center, **_):
    geometry = _geometry.measure(deltas, [center])
    taken = _clipped_steps(geometry, clip_norm, num_iterations)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), deltas)
    center = jax.tree.map(
      lambda old, new: jnp.where(taken[-1] == 0, 0.0, taken[-1] * old) + new,
      center,
      tree.mix(taken[:-1], wide),
    )
    delta = jax.tree.map(lambda new, x: new.astype(x.dtype), center, deltas)
    shares = _base.normalized(taken[:-1])
    return _base.RuleOutput(delta, shares, geometry.finite[:-1]), center

  return _base.stateful(init, update, cohort_size=cohort_size)


def _clipped_steps(
  geometry: _geometry.Geometry, clip_norm: float, num_iterations: int
) -> jax.Array:
  """Returns what the new center is made of: shares of rows and old center."""
  rows = geometry.finite.at[-1].set(False)
  num_rows = jnp.maximum(jnp.sum(rows), 1)
  vectors, _ = _relative(geometry)

  def move(_, taken):
    point = jnp.matmul(taken, vectors, precision='highest')
    squares = _sq_norms(vectors - point, geometry.basis)
    factors = _scale.clip_factors(tree.safe_sqrt(squares), clip_norm)
    steps = jnp.where(rows, factors / num_rows, 0.0)
    return taken * (1.0 - jnp.sum(steps)) + steps

  only_center = jnp.zeros(rows.size).at[-1].set(1.0)
  return lax.fori_loop(0, num_iterations, move, only_center)
