"""Rules that turn the deltas of a round into one delta.

Each rule is a plain function over any tree of stacked deltas, and an entry of
the registry that `build` turns into an `Aggregator`. All are pure and can be
jitted, vmapped and sharded over clients or parameters. A row with a NaN or an
infinity counts as a Byzantine row.

Example:
  >>> import jax.numpy as jnp
  >>> from fedjax_safety import aggregators
  >>> deltas = {'a': jnp.arange(10.0).reshape(5, 2)}
  >>> aggregator = aggregators.build('krum', cohort_size=5, num_byzantine=1)
  >>> state = aggregator.init({'a': jnp.zeros(2)})
  >>> output = aggregator.update(deltas, state, weights=None, key=None)
  >>> print(output.delta['a'], output.client_weights)
  [2. 3.] [0. 1. 0. 0. 0.]
"""

from fedjax_safety import _validate
from fedjax_safety.aggregators._base import Aggregator, AggregatorOutput
from fedjax_safety.aggregators._coordinatewise import (
  build_median,
  build_trimmed_mean,
  median,
  trimmed_mean,
)
from fedjax_safety.aggregators._iterative import (
  build_residual_reweighting,
  residual_reweighting,
)
from fedjax_safety.aggregators._mean import build_mean, mean
from fedjax_safety.aggregators._selection import (
  build_krum,
  build_multi_krum,
  krum,
  multi_krum,
)
from fedjax_safety.aggregators._similarity import build_foolsgold, foolsgold
from fedjax_safety.aggregators._spectral import build_dnc, dnc

__all__ = [
  'Aggregator',
  'AggregatorOutput',
  'build',
  'dnc',
  'foolsgold',
  'krum',
  'mean',
  'median',
  'multi_krum',
  'names',
  'residual_reweighting',
  'trimmed_mean',
]

_BUILDERS = {
  'dnc': build_dnc,
  'foolsgold': build_foolsgold,
  'krum': build_krum,
  'mean': build_mean,
  'median': build_median,
  'multi_krum': build_multi_krum,
  'residual_reweighting': build_residual_reweighting,
  'trimmed_mean': build_trimmed_mean,
}


def names() -> tuple[str, ...]:
  """Returns the names that `build` knows, sorted."""
  return tuple(sorted(_BUILDERS))


def build(name: str, *, cohort_size: int, **kwargs) -> Aggregator:
  """Returns the named aggregator, checked against the size of the cohort.

  Args:
    name: one of `names()`.
    cohort_size: C, the clients of a round.
    **kwargs: keyword arguments of the rule of that name, without `key` and
      `weights`, which its update takes.

  Returns:
    An `Aggregator` for deltas of `cohort_size` rows.

  Raises:
    ValueError: if the name or an argument is unknown, an argument is missing,
      or the cohort is too small for what the rule promises.
  """
  _validate.one_of(_BUILDERS, aggregator=name)
  _validate.positive(cohort_size=cohort_size)
  builder = _BUILDERS[name]
  _validate.keywords(f'aggregator {name!r}', builder, kwargs)
  return builder(cohort_size, **kwargs)
