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

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_safety import _validate
from fedjax_safety.aggregators import _chain, _rule
from fedjax_safety.aggregators._base import Aggregator, AggregatorOutput
from fedjax_safety.aggregators._bulyan import bulyan
from fedjax_safety.aggregators._chain import chain, coefficients
from fedjax_safety.aggregators._classifier import update_probe
from fedjax_safety.aggregators._clustering import clipped_clustering, flame
from fedjax_safety.aggregators._coordinatewise import (
  meamed,
  median,
  phocas,
  robust_learning_rate,
  sign_majority,
  trimmed_mean,
)
from fedjax_safety.aggregators._deepsight import (
  DeepSightScores,
  deepsight_scores,
)
from fedjax_safety.aggregators._detectors import fldetector
from fedjax_safety.aggregators._filtering import caf
from fedjax_safety.aggregators._geometric import (
  centered_clipping,
  geometric_median,
)
from fedjax_safety.aggregators._iterative import residual_reweighting
from fedjax_safety.aggregators._layerwise import lasa
from fedjax_safety.aggregators._mean import mean
from fedjax_safety.aggregators._momentum import MomentumState, client_momentum
from fedjax_safety.aggregators._norms import cge, monna, norm_bounded_mean
from fedjax_safety.aggregators._preaggregate import (
  adaptive_clipping,
  bucketing,
  nearest_neighbor_mixing,
  static_clipping,
)
from fedjax_safety.aggregators._private import dp_mean, dp_mean_adaptive
from fedjax_safety.aggregators._probe import safety_probe
from fedjax_safety.aggregators._selection import krum, multi_krum
from fedjax_safety.aggregators._signs import alignins, signguard
from fedjax_safety.aggregators._similarity import foolsgold, foolsgold_history
from fedjax_safety.aggregators._spectral import dnc
from fedjax_safety.aggregators._subsets import mda, smea
from fedjax_safety.aggregators._trust import fltrust, zeno

__all__ = [
  'Aggregator',
  'AggregatorOutput',
  'DeepSightScores',
  'MomentumState',
  'adaptive_clipping',
  'alignins',
  'bucketing',
  'build',
  'bulyan',
  'caf',
  'centered_clipping',
  'cge',
  'chain',
  'client_momentum',
  'clipped_clustering',
  'coefficients',
  'deepsight_scores',
  'dnc',
  'dp_mean',
  'dp_mean_adaptive',
  'flame',
  'fldetector',
  'fltrust',
  'foolsgold',
  'foolsgold_history',
  'geometric_median',
  'inputs',
  'krum',
  'lasa',
  'mda',
  'meamed',
  'mean',
  'median',
  'monna',
  'multi_krum',
  'names',
  'nearest_neighbor_mixing',
  'norm_bounded_mean',
  'phocas',
  'preaggregator_names',
  'residual_reweighting',
  'robust_learning_rate',
  'safety_probe',
  'sign_majority',
  'signguard',
  'smea',
  'static_clipping',
  'steps',
  'trimmed_mean',
  'update_probe',
  'zeno',
]


def names() -> tuple[str, ...]:
  """Returns the aggregators that `build` knows, sorted."""
  return _names(lambda kind: kind != 'matrix')


def preaggregator_names() -> tuple[str, ...]:
  """Returns the preaggregators that `build` knows, sorted."""
  return _names(lambda kind: kind == 'matrix')


def build(
  name: str,
  *,
  cohort_size: int,
  preaggregators: Sequence[Mapping[str, Any]] = (),
  **kwargs,
) -> Aggregator:
  """Returns the named aggregator, checked against the size of the cohort.

  Args:
    name: one of `names()`.
    cohort_size: C, the clients of a round.
    preaggregators: applied in this order before the rule; each a mapping of
      `name`, one of `preaggregator_names()`, and its keyword arguments.
    **kwargs: keyword arguments of the rule of that name, without `key` and
      `weights`, which its update takes.

  Returns:
    An `Aggregator` for deltas of `cohort_size` rows.

  Raises:
    ValueError: if a name or an argument is unknown, an argument is missing,
      or there are too few rows for what a step promises.
  """
  chosen = steps(name, preaggregators=preaggregators, **kwargs)
  return _chain.aggregator_of(chosen, cohort_size)


def steps(
  name: str, *, preaggregators: Sequence[Mapping[str, Any]] = (), **kwargs
) -> list[_chain.Step]:
  """Returns what `build` runs: preaggregators, then the rule.

  Args:
    name: one of `names()`.
    preaggregators: as in `build`.
    **kwargs: keyword arguments of the rule.

  Raises:
    ValueError: if a name is unknown.
  """
  _validate.one_of(names(), aggregator=name)
  made = [_preaggregator(**step) for step in preaggregators]
  made.append(functools.partial(_rule.REGISTRY[name].public, **kwargs))
  return made


def inputs(name: str) -> frozenset[str]:
  """Returns what of the round a rule asks for, such as `key`.

  Args:
    name: one of `names()` or `preaggregator_names()`.
  """
  _validate.one_of(_rule.REGISTRY, rule=name)
  return _rule.inputs(_rule.REGISTRY[name])


def _preaggregator(*, name: str, **kwargs):
  """Returns a preaggregator of a config as a step."""
  _validate.one_of(preaggregator_names(), preaggregator=name)
  return functools.partial(_rule.REGISTRY[name].public, **kwargs)


def _names(wanted) -> tuple[str, ...]:
  """Returns the sorted names of the rules of some kinds."""
  return tuple(
    sorted(name for name, rule in _rule.REGISTRY.items() if wanted(rule.kind))
  )
