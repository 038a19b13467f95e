"""The table of the aggregators' contract: which rule makes which promise.

A row is a configuration. `lacks` names the promises that it does not make,
with the reason beside it; `mean` lacks the one that makes a rule a defense.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import aggregators

# The smallest cohort that two Byzantine clients leave Krum: 2 f + 3.
COHORT, BYZANTINE = 7, 2


class Case(NamedTuple):
  """A configuration; `runtime(deltas)` is what else its update is given."""

  name: str
  kwargs: dict
  lacks: frozenset = frozenset()
  runtime: Callable[..., dict] = lambda deltas: {}


def adapter(deltas):
  """Returns the server's adapter before the first round."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), deltas)


_F = {'num_byzantine': BYZANTINE}
_NO_F = frozenset({'no_byzantine_is_mean'})
_CLIPPED = _NO_F | {'shift', 'affine'}


def _root(deltas) -> dict:
  """Returns a server's own delta: the median, whatever the rows hold."""
  return {'root_delta': aggregators.median(deltas)}


def _root_loss(deltas) -> dict:
  """Returns a loss that is least at the server's own delta."""
  root = aggregators.median(deltas)

  def loss_fn(delta):
    squares = jax.tree.map(lambda x, r: jnp.sum((x - r) ** 2), delta, root)
    return sum(jax.tree.leaves(squares))

  return {'loss_fn': loss_fn}


def _root_probe(deltas) -> dict:
  """Returns the same loss of adapters, and an adapter of zeros."""
  return {'adapter': adapter(deltas), 'probe': _root_loss(deltas)['loss_fn']}


def _references(deltas) -> dict:
  """Returns references around the rows' median: one to each side of it."""
  root = aggregators.median(deltas)
  made = jax.tree.map(lambda x: jnp.stack([x, -x]), root)
  return {'references': lambda: (made, jnp.array([False, True]))}


CASES = {
  'mean': Case('mean', {}, frozenset({'outliers_bounded'})),
  'median': Case('median', {}, _NO_F),
  'trimmed_mean': Case('trimmed_mean', _F),
  'meamed': Case('meamed', _F),
  'phocas': Case('phocas', _F),
  # Signs change with the origin and have no size.
  'sign_majority': Case(
    'sign_majority',
    {},
    _NO_F | {'shift', 'scale', 'equal_rows', 'outliers_bounded'},
  ),
  # As the mean, with signs that change with the origin.
  'robust_learning_rate': Case(
    'robust_learning_rate',
    {'threshold': 4.0},
    _NO_F | {'shift', 'outliers_bounded'},
  ),
  # Krum selects one row, also without Byzantine ones.
  'krum': Case('krum', _F, _NO_F),
  'krum_byzfl': Case('krum', _F | {'variant': 'byzfl'}, _NO_F),
  'multi_krum': Case('multi_krum', _F, _NO_F),
  'multi_krum_byzfl': Case('multi_krum', _F | {'variant': 'byzfl'}),
  'multi_krum_openfedllm': Case('multi_krum', _F | {'variant': 'openfedllm'}),
  'dnc': Case('dnc', _F | {'num_iterations': 2}),
  # Angles change with the origin; equal rows are sybils; a lone outlier is
  # unlike all others and therefore trusted.
  'foolsgold': Case(
    'foolsgold',
    {},
    _NO_F | {'shift', 'equal_rows', 'outliers_bounded', 'affine'},
  ),
  'residual_reweighting': Case('residual_reweighting', {}, _NO_F | {'affine'}),
  # Angles to the root delta change with the origin; rows are scaled.
  'fltrust': Case(
    'fltrust', {}, _NO_F | {'shift', 'equal_rows', 'affine'}, _root
  ),
  'zeno': Case('zeno', _F, frozenset({'shift'}), _root_loss),
  # Rows are weighed by harm, whether there are Byzantine ones or not; which
  # rows are far too long depends on the origin.
  'safety_probe': Case('safety_probe', {}, _NO_F, _root_probe),
  # Angles change with the origin, and each leaf has its own; rows are clipped.
  'update_probe': Case(
    'update_probe', {}, _CLIPPED | {'tree_is_vector'}, _references
  ),
  # Angles and norms change with the origin; rows are clipped.
  'flame': Case('flame', {'noise_multiplier': 0.0}, _CLIPPED),
  'clipped_clustering': Case('clipped_clustering', {}, _CLIPPED),
  'signguard': Case('signguard', {'sample_fraction': 1.0}, _CLIPPED),
  'alignins': Case('alignins', {}, _CLIPPED),
  # Small coordinates of a row become 0, and a leaf is a layer.
  'lasa': Case('lasa', {}, _CLIPPED | {'equal_rows', 'tree_is_vector'}),
  # As foolsgold, which it is in the first round.
  'foolsgold_history': Case(
    'foolsgold_history',
    {},
    _NO_F | {'shift', 'equal_rows', 'outliers_bounded', 'affine'},
  ),
  # The first round, without any history, is the mean.
  'fldetector': Case('fldetector', {}, _NO_F | {'outliers_bounded'}),
  'mda': Case('mda', _F),
  'smea': Case('smea', _F),
  'caf': Case('caf', _F),
  'geometric_median': Case('geometric_median', {}, _NO_F),
  # Norms change with the origin.
  'cge': Case('cge', _F, frozenset({'shift'})),
  # Which row is trusted is told by its place.
  'monna': Case('monna', _F | {'trusted_row': 3}, frozenset({'permutation'})),
  # A norm is given in the unit of the deltas, and rows are clipped to it.
  'norm_bounded_mean': Case(
    'norm_bounded_mean', {'max_norm': 6.0}, _CLIPPED | {'scale'}
  ),
  'centered_clipping': Case(
    'centered_clipping',
    {'clip_norm': 4.0, 'num_iterations': 4},
    _CLIPPED | {'scale'},
  ),
  # Two Byzantine clients need eleven: bulyan_test has them.
  'bulyan': Case(
    'bulyan', {'num_byzantine': 1}, frozenset({'affine', 'outliers_bounded'})
  ),
  # As norm_bounded_mean, but bad rows count as 0 in a mean over C, which may
  # be nearer to 0 than all honest values.
  'dp_mean': Case(
    'dp_mean',
    {'clip_norm': 6.0, 'noise_multiplier': 0.0},
    _CLIPPED | {'scale'},
  ),
  'dp_mean_adaptive': Case(
    'dp_mean_adaptive',
    {'initial_clip_norm': 6.0, 'noise_multiplier': 0.0},
    _CLIPPED | {'scale'},
  ),
}
# These add rows up instead of averaging them.
SUMS = frozenset({'foolsgold', 'foolsgold_history'})
