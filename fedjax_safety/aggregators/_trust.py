"""Rules with a small clean data set at the server: FLTrust and Zeno."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _rule


@_rule.whole(
  paper='Cao et al., NDSS 2021',
  guarantee='none as (f, κ); any f with a good root delta',
  cost='C P, four reads',
  needs='`root_delta` of the server',
  acts_on='factors',
)
def fltrust(
  deltas: types.Deltas, *, root_delta: types.Adapter
) -> _base.RuleOutput:
  """Returns the mean of the rows, each weighted by its angle to a trusted one.

  The server trains a delta of its own on clean data. A client's trust is the
  cosine of its delta to that one, at least 0; its delta is scaled to the
  norm of the trusted one, so that no client gains from a large delta. The
  norm of the result is at most that of `root_delta`.

  If nobody is trusted the delta is 0, as it is for a root delta of zeros or
  with a NaN or an infinity in it. A row with one has no trust, and neither
  has a row of zeros. A client's share is its share of the trust.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1e9, 0.0], [-1.0, 0.0], [0.0, 0.5]])
    >>> print(aggregators.fltrust(deltas, root_delta=jnp.array([2.0, 0.0])))
    [2. 0.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    root_delta: the server's own delta, leaves [...].

  Returns:
    The delta, leaves [...].

  Reference: Cao, Fang, Liu, Gong. FLTrust: Byzantine-robust Federated
  Learning via Trust Bootstrapping. NDSS 2021.
  """
  finite, norms = tree.finite_rows(deltas), tree.row_norms(deltas)
  length = tree.row_norms(jax.tree.map(lambda x: x[None], root_delta))[0]
  trust = jnp.clip(cosines_to(root_delta, deltas, norms), 0.0, 1.0)
  # NaN is above nothing, so that a bad root delta trusts nobody.
  usable = finite & (trust > 0) & jnp.isfinite(length)
  trust = _base.normalized(jnp.where(usable, trust, 0.0))
  coefficients = trust * (length / jnp.where(usable, norms, 1.0))
  coefficients = jnp.where(usable, coefficients, 0.0)
  return _base.RuleOutput(tree.mix(coefficients, deltas), trust, finite)


def cosines_to(
  vector: types.Adapter, deltas: types.Deltas, norms: jax.Array
) -> jax.Array:
  """Returns the cosines [C] of rows to one vector, 0 to a vector of zeros.

  Args:
    vector: unstacked tree.
    deltas: stacked tree of the same structure.
    norms: [C] norms of its rows.
  """
  length = tree.row_norms(jax.tree.map(lambda x: x[None], vector))[0]
  usable = jnp.isfinite(norms) & (norms > 0) & (length > 0)
  zeros = jax.tree.map(jnp.zeros_like, deltas)
  products = tree.row_dots(tree.where_rows(usable, deltas, zeros), vector)
  cosines = products / jnp.where(usable, norms, 1.0)
  return jnp.where(usable, cosines / jnp.where(usable, length, 1.0), 0.0)


def _check_zeno(cohort_size: int, *, num_byzantine: int, rho: float) -> None:
  _validate.byzantine_bound('zeno', num_byzantine, cohort_size, 1, 1)
  if isinstance(rho, (int, float)):
    _validate.non_negative(rho=rho)


@_rule.whole(
  check=_check_zeno,
  paper='Xie et al., ICML 2019',
  guarantee='descends for any f < n, if the loss is a fair sample',
  cost='C losses, four reads',
  needs='n ≥ f + 1, `loss_fn` of a delta',
  acts_on='factors',
)
def zeno(
  deltas: types.Deltas,
  *,
  num_byzantine: int,
  loss_fn: Callable[[types.Adapter], jax.Array],
  rho: float = 5e-4,
) -> _base.RuleOutput:
  """Returns the mean of the rows that lower the server's loss most.

  A row's score is the loss before it, minus the loss after it, minus `rho`
  times its squared norm; the `num_byzantine` lowest are left out. The loss
  before is the same for all and is not computed. Equal scores keep the
  lowest row. A row whose loss or norm is not finite scores lowest; one with
  a NaN or an infinity in it is never kept.

  `loss_fn` takes a delta and not an adapter, so that the rule need not know
  the adapter: `lambda delta: loss(add(adapter, delta), batch)`. It is called
  for one row at a time.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [3.0], [-9.0]])
    >>> loss = lambda delta: jnp.sum((delta - 2.0) ** 2)
    >>> print(aggregators.zeno(deltas, num_byzantine=1, loss_fn=loss))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows to leave out; below C.
    loss_fn: `delta -> loss` on the server's own data, a scalar.
    rho: weight of the squared norm in the score; the paper's experiments use
      5e-4, for gradients at learning rate 0.1.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if no row would be left.

  Reference: Xie, Koyejo, Gupta. Zeno: Distributed Stochastic Gradient Descent
  with Suspicion-based Fault-tolerance. ICML 2019.
  """
  finite = tree.finite_rows(deltas)

  def cost(row):
    delta, is_finite = row
    clean = jax.tree.map(lambda x: jnp.where(is_finite, x, 0), delta)
    return jnp.asarray(loss_fn(clean), jnp.float32)

  costs = lax.map(cost, (deltas, finite))
  costs = costs + rho * jnp.square(tree.row_norms(deltas))
  costs = jnp.where(jnp.isnan(costs), jnp.inf, costs)
  kept = _base.keep_lowest(costs, finite, finite.size - num_byzantine)
  shares = _base.normalized(kept)
  return _base.RuleOutput(tree.mix(shares, deltas), shares, finite)
