"""Errors of the registry, all raised before any array work."""

import jax.numpy as jnp
import pytest

from fedjax_safety import aggregators


def test_every_name_is_also_a_plain_rule():
  assert set(aggregators.names()) <= set(aggregators.__all__)
  assert all(callable(getattr(aggregators, n)) for n in aggregators.names())


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('krmu', 11, {}), r"did you mean 'krum'\?.*known: .*, dnc, .*, krum,"),
    (
      ('krum', 8, {'num_byzantin': 1}),
      r"did you mean 'num_byzantine'\?.*accepted: num_byzantine, variant",
    ),
    (('krum', 8, {}), "needs the argument 'num_byzantine'"),
    (('mean', 8, {'f': 1}), 'accepted: none'),
    (('mean', 0, {}), 'cohort_size=0'),
    (('krum', 8, {'num_byzantine': 4}), r'2\*f\+3 = 11 \(krum.*got 8'),
    (('krum', 8, {'num_byzantine': -1}), 'num_byzantine=-1'),
    (('krum', 8, {'num_byzantine': 1, 'variant': 'openfedllm'}), 'unknown'),
    (
      ('krum', 8, {'num_byzantine': 4, 'variant': 'byzfl'}),
      r'2\*f\+1 = 9',
    ),
    (
      ('multi_krum', 8, {'num_byzantine': 2, 'num_selected': 7}),
      r'num_selected=7 must lie in \[1, 6\]',
    ),
    (
      (
        'multi_krum',
        8,
        {'num_byzantine': 2, 'num_selected': 5, 'variant': 'openfedllm'},
      ),
      'must be cohort_size - num_byzantine = 6',
    ),
    (('trimmed_mean', 8, {'num_byzantine': 4}), r'2\*f\+1 = 9'),
    (('dnc', 8, {'num_byzantine': 4}), r'2\*f\+1 = 9'),
    (('dnc', 8, {'num_byzantine': 3, 'filter_fraction': 3.0}), 'removes 9'),
    (('dnc', 8, {'num_byzantine': 3, 'num_iterations': 0}), 'num_iterations'),
    (('foolsgold', 8, {'variant': 'sum'}), 'known: openfedllm, paper'),
    (('residual_reweighting', 2, {}), 'cohort_size=2'),
    (('residual_reweighting', 8, {'threshold': 2.0}), 'threshold=2.0'),
    (('residual_reweighting', 8, {'confidence': 0.0}), 'confidence=0.0'),
  ],
)
def test_build_refuses(arguments, message):
  name, cohort_size, kwargs = arguments
  with pytest.raises(ValueError, match=message):
    aggregators.build(name, cohort_size=cohort_size, **kwargs)


def test_plain_rules_check_their_bounds_too():
  with pytest.raises(ValueError, match=r'2\*f\+3 = 5'):
    aggregators.krum(jnp.zeros((4, 2)), num_byzantine=1)
  with pytest.raises(ValueError, match=r'2\*f\+1 = 5'):
    aggregators.trimmed_mean(jnp.zeros((4, 2)), num_byzantine=2)


def test_update_refuses_another_cohort_size():
  aggregator = aggregators.build('median', cohort_size=5)
  with pytest.raises(ValueError, match='cohort_size=5 differs from the 4 rows'):
    aggregator.update(jnp.zeros((4, 2)), (), weights=None, key=None)


@pytest.mark.parametrize(
  'deltas',
  [{}, {'a': jnp.zeros(())}, {'a': jnp.zeros((2, 1)), 'b': jnp.zeros((3, 1))}],
)
def test_deltas_must_share_one_client_axis(deltas):
  with pytest.raises(ValueError, match='one client axis'):
    aggregators.median(deltas)
