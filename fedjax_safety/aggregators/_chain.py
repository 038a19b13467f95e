"""Runs rules: any number of preaggregators, then one aggregator.

The steps that are matrices are multiplied, not applied, so that the deltas
are read as often as by the last rule alone, however long the chain.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import tree, types
from fedjax_safety.aggregators import _base, _geometry, _rule

# A registered rule with its arguments bound: `krum(num_byzantine=2)`.
Step = Callable[..., Any]


class _Rows(NamedTuple):
  """Rows on their way through a chain: `matrix @ deltas`, not yet computed.

  Attributes:
    deltas: the stacked tree that the matrix applies to.
    finite: [C] bool, the clients' rows that are finite; None if unknown.
    matrix: [M, C], or None for the rows as they are.
    geometry: of the M rows, or None while no step has asked for it.
  """

  deltas: types.Deltas
  finite: types.RowMask | None = None
  matrix: jax.Array | None = None
  geometry: _geometry.Geometry | None = None


def chain(*steps: Step) -> Callable[..., types.Adapter]:
  """Composes preaggregators and one aggregator into one rule.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> rule = aggregators.chain(
    ...   aggregators.nearest_neighbor_mixing(num_byzantine=1),
    ...   aggregators.trimmed_mean(num_byzantine=1),
    ... )
    >>> print(rule(jnp.array([[1.0], [1.0], [1.0], [9.0]])))
    [1.]

  Args:
    *steps: rules with their arguments bound, the last one an aggregator.

  Returns:
    `rule(deltas, *, key=None) -> delta`; the key is split over the steps.

  Raises:
    ValueError: if the last step is no aggregator or an earlier one is.
  """
  _check_order(steps)

  def rule(deltas, *, key=None):
    return apply(steps, deltas, key=key)

  return rule


def apply(
  steps: Sequence[Step], deltas: types.Deltas, **runtime: Any
) -> types.Adapter:
  """Checks the steps against the rows and returns the delta of one round."""
  aggregator = aggregator_of(steps, tree.cohort_size(deltas))
  state = aggregator.init(jax.tree.map(lambda leaf: leaf[0], deltas))
  runtime = {'weights': None, 'key': None, **runtime}
  return aggregator.update(deltas, state, **runtime).delta


def aggregator_of(steps: Sequence[Step], cohort_size: int) -> _base.Aggregator:
  """Checks the steps and returns them as one aggregator."""
  check(steps, cohort_size)
  last = _rule.of(steps[-1])
  if last.kind != 'stateful':
    made = _base.stateless(
      functools.partial(run, steps), cohort_size=cohort_size
    )
    return made._replace(update=_asking(made.update, _rule.inputs(last)))
  num_rows = check(steps[:-1], cohort_size)
  inner = last.body(num_rows, **_rule.arguments(steps[-1]))
  if len(steps) == 1:
    return inner

  def update(deltas, state, *, weights, key, **extra):
    rows, key = _prepare(steps[:-1], _Rows(deltas), key)
    output = inner.update(_made(rows), state, weights=weights, key=key, **extra)
    shares = output.client_weights
    if shares is not None:
      output = output._replace(client_weights=shares_of(shares @ rows.matrix))
    # Scores are of the rows that the steps made, not of clients.
    metrics = {k: v for k, v in output.metrics.items() if k != 'client_scores'}
    metrics['num_nonfinite'] = jnp.sum(~rows.finite, dtype=jnp.int32)
    return output._replace(metrics=metrics)

  return _base.Aggregator(inner.init, update)


def _asking(update: Callable, names: frozenset[str]) -> Callable:
  """Returns an update whose signature tells a round what to hand it."""
  known = inspect.signature(update)
  *given, extra = known.parameters.values()
  asked = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    for name in sorted(names - {'key', 'weights'})
  ]

  @functools.wraps(update)
  def asking(*args, **kwargs):
    return update(*args, **kwargs)

  asking.__signature__ = known.replace(parameters=[*given, *asked, extra])
  return asking


def check(steps: Sequence[Step], cohort_size: int) -> int:
  """Raises unless every step can work on the rows that it gets.

  Returns:
    The number of rows that the last step makes.
  """
  for step in steps:
    rule = _rule.of(step)
    arguments = _rule.arguments(step)
    _rule.settle(rule, cohort_size, arguments)
    cohort_size = rule.num_rows(cohort_size, **_rule.static(rule, arguments))
  return cohort_size


def run(
  steps: Sequence[Step],
  deltas: types.Deltas,
  *,
  key: types.PRNGKey | None,
  **runtime: Any,
) -> _base.RuleOutput:
  """Runs checked steps, none of which is stateful, on the deltas."""
  rows, key = _prepare(steps[:-1], _Rows(deltas), key)
  rule = _rule.of(steps[-1])
  if rule.kind == 'affine':
    return _combine(_measured(rows), steps[-1], key)
  finite, fused = rows.finite, rule.kind == 'coordinatewise'
  made = _made(rows, fused=fused)
  if fused:
    delta = jax.tree.map(functools.partial(combine_leaf, steps[-1]), made)
    finite = tree.finite_rows(deltas) if finite is None else finite
    return _base.RuleOutput(delta, None, finite)
  output = _body(steps[-1], made, key=key, **runtime)
  if rows.matrix is None:
    return output
  shares = output.client_weights
  if shares is not None:
    shares = shares_of(shares @ rows.matrix)
  return output._replace(client_weights=shares, finite=finite)


def coefficients(
  *steps: Step,
  products: jax.Array,
  weights: types.Weights | None = None,
  key: types.PRNGKey | None = None,
) -> jax.Array:
  """Returns what a rule multiplies the rows by, from inner products alone.

  For rows that are never written out, such as products of LoRA factors.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> rows = jnp.array([[1.0], [2.0], [9.0], [3.0], [4.0], [0.0]])
    >>> krum = aggregators.krum(num_byzantine=1)
    >>> print(aggregators.coefficients(krum, products=rows @ rows.T))
    [0. 1. 0. 0. 0.]

  Args:
    *steps: preaggregators, then an affine rule or the mean, with their
      arguments bound.
    products: [C + 1, C + 1] inner products of the rows minus a center, which
      one may choose for accuracy, and last of minus the center (0 where there
      is none). NaN or an infinity on the diagonal marks a row as not finite.
    weights: [C], heeded by the mean.
    key: for random rules; split over the steps.

  Returns:
    [C] float32, 0 for rows that are not finite.

  Raises:
    ValueError: if a step cannot work on C rows, or needs the rows themselves.
  """
  check_affine(steps)
  check(steps, products.shape[0] - 1)
  geometry = _geometry.of_products(products)
  rows, key = _prepare(
    steps[:-1], _Rows(None, geometry.finite, None, geometry), key
  )
  if _rule.of(steps[-1]).kind == 'affine':
    found = _body(steps[-1], rows.geometry, key=key)
  else:
    found = _base.shares(weights, rows.geometry.finite)
  if rows.matrix is not None:
    found = found @ rows.matrix
  return jnp.where(rows.finite, found, 0.0)


def check_affine(steps: Sequence[Step]) -> None:
  """Raises unless the steps end in a rule that needs only inner products."""
  _check_order(steps)
  rule = _rule.of(steps[-1])
  if rule.kind != 'affine' and rule.name != 'mean':
    known = [r.name for r in _rule.REGISTRY.values() if r.kind == 'affine']
    raise ValueError(
      f'{rule.name} needs the rows themselves, and here there are only their '
      f'inner products; known: {", ".join(sorted([*known, "mean"]))}'
    )


def mixing(
  steps: Sequence[Step], products: jax.Array, key: types.PRNGKey | None
) -> jax.Array | None:
  """Returns the matrix [M, C] that preaggregators make of inner products."""
  geometry = _geometry.of_products(products)
  rows = _Rows(None, geometry.finite, None, geometry)
  return _prepare(steps, rows, key)[0].matrix


def preaggregate(step: Step, deltas: types.Deltas, *, key=None) -> types.Deltas:
  """Checks one preaggregator and returns the rows that it makes."""
  _rule.settle(_rule.of(step), tree.cohort_size(deltas), _rule.arguments(step))
  rows, _ = _prepare([step], _Rows(deltas), key)
  return _made(rows)


def _prepare(steps: Sequence[Step], rows: _Rows, key):
  """Puts the matrices of the steps on the rows; returns what key is left."""
  for step in steps:
    if key is not None:
      step_key, key = jax.random.split(key)
    else:
      step_key = None
    rows = _measured(rows)
    matrix = _body(step, rows.geometry, key=step_key)
    rows = _Rows(
      rows.deltas,
      rows.finite,
      matrix if rows.matrix is None else matrix @ rows.matrix,
      _geometry.transform(rows.geometry, matrix, matrix.shape[1]),
    )
  return rows, key


def _measured(rows: _Rows) -> _Rows:
  """Returns the rows with their geometry."""
  if rows.geometry is not None:
    return rows
  geometry = _geometry.measure(rows.deltas)
  return rows._replace(geometry=geometry, finite=geometry.finite)


def _made(rows: _Rows, *, fused: bool = False) -> types.Deltas:
  """Returns the rows as a stacked tree; `fused` as in `tree.mix_rows`."""
  if rows.matrix is None:
    return rows.deltas
  return tree.mix_rows(rows.matrix, rows.deltas, fused=fused)


def _combine(rows: _Rows, step: Step, key) -> _base.RuleOutput:
  """Applies an affine body: coefficients of the clients' own rows."""
  coefficients = _body(step, rows.geometry, key=key)
  if rows.matrix is not None:
    coefficients = coefficients @ rows.matrix
  # A row that is not finite has no part, whatever the body says.
  coefficients = jnp.where(rows.finite, coefficients, 0.0)
  return _base.RuleOutput(
    tree.mix(coefficients, rows.deltas), shares_of(coefficients), rows.finite
  )


def shares_of(coefficients: jax.Array) -> types.Weights:
  """Returns the clients' shares [C] in the aggregate."""
  return _base.normalized(jnp.maximum(coefficients, 0.0))


def combine_leaf(step: Step, leaf: jax.Array) -> jax.Array:
  """Applies a coordinate-wise body to the rows of one leaf."""
  values = [tree.nonfinite_last(row) for row in tree.rows(leaf)]
  combined = _body(step, values)
  # 0 leaves the model as it is where too many values were not finite.
  return jnp.where(jnp.isfinite(combined), combined, 0.0).astype(leaf.dtype)


def _body(step: Step, data, **runtime):
  """Calls the mathematics of a step with what it asks for of the round."""
  rule = _rule.of(step)
  arguments = _rule.arguments(step)
  parameters = inspect.signature(rule.body).parameters
  for name in _rule.inputs(rule):
    given = runtime.get(name)
    arguments[name] = arguments.get(name) if given is None else given
    optional = name == 'weights' or parameters[name].default is None
    if arguments[name] is None and not optional:
      raise ValueError(f'{rule.name} needs {name!r}; pass it with the deltas')
  return rule.body(data, **arguments)


def _check_order(steps: Sequence[Step]) -> None:
  """Raises unless preaggregators come first and one aggregator last."""
  kinds = [_rule.of(step).kind for step in steps]
  if not kinds or 'matrix' in kinds[-1:] or set(kinds[:-1]) - {'matrix'}:
    raise ValueError(
      'a chain is any number of preaggregators and then one aggregator, such '
      f'as mean(); got {[_rule.of(step).name for step in steps]}'
    )
