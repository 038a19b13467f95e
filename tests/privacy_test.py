"""Tests of the accounting against closed forms and published values."""

import builtins
import math

import numpy as np
import pytest
from scipy import optimize, stats

from fedjax_safety import config, federation, privacy


@pytest.fixture
def accounting():
  """Skips where the optional package is not installed."""
  pytest.importorskip('dp_accounting')


def _gaussian(noise_multiplier, delta):
  """Returns the exact epsilon of one Gaussian: Balle and Wang, ICML 2018."""

  def excess(epsilon):
    half, scaled = 0.5 / noise_multiplier, epsilon * noise_multiplier
    return (
      stats.norm.cdf(half - scaled)
      - math.exp(epsilon) * stats.norm.cdf(-half - scaled)
      - delta
    )

  return optimize.brentq(excess, 0.0, 100.0)


@pytest.mark.usefixtures('accounting')
@pytest.mark.parametrize('num_rounds', [1, 16])
def test_rounds_of_everybody_cost_what_one_gaussian_does(num_rounds):
  kwargs = {'num_rounds': num_rounds, 'sampling_rate': 1.0, 'delta': 1e-5}
  exact = _gaussian(4.0 / math.sqrt(num_rounds), 1e-5)
  found = privacy.epsilon(noise_multiplier=4.0, sampling='poisson', **kwargs)
  # An upper bound, by a discretization of 1e-4.
  assert exact <= found <= exact * (1 + 1e-3)
  # To replace a client is to remove one and to add one.
  replaced = privacy.epsilon(noise_multiplier=8.0, **kwargs)
  assert replaced == pytest.approx(found, rel=1e-6)


@pytest.mark.usefixtures('accounting')
def test_published_value_is_met():
  """Abadi et al., CCS 2016: at most 1.26 by the moments accountant."""
  found = privacy.epsilon(
    num_rounds=10_000,
    sampling_rate=0.01,
    noise_multiplier=4.0,
    delta=1e-5,
    sampling='poisson',
  )
  # A tight accountant, but no less than half: q sqrt(T) / sigma = 1/4.
  assert 0.63 < found < 1.26


@pytest.mark.usefixtures('accounting')
def test_epsilon_falls_with_noise_and_grows_with_rounds_and_sampling():
  base = {
    'num_rounds': 20,
    'sampling_rate': 0.1,
    'noise_multiplier': 4.0,
    'delta': 1e-5,
  }
  found = privacy.epsilon(**base)
  assert privacy.epsilon(**base | {'noise_multiplier': 8.0}) < found
  assert privacy.epsilon(**base | {'num_rounds': 40}) > found
  assert privacy.epsilon(**base | {'sampling_rate': 0.2}) > found
  assert privacy.epsilon(**base | {'sampling_rate': 1.0}) > found
  assert privacy.epsilon(**base, sampling='poisson') < found


def test_ends_of_the_scale_need_no_accountant():
  kwargs = {'sampling_rate': 0.5, 'delta': 1e-5}
  assert privacy.epsilon(num_rounds=0, noise_multiplier=1.0, **kwargs) == 0
  assert math.isinf(
    privacy.epsilon(num_rounds=1, noise_multiplier=0.0, **kwargs)
  )


def test_the_missing_extra_is_named(monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name.partition('.')[0] == 'dp_accounting':
      raise ImportError(f'No module named {name!r}')
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(
    ValueError, match=r"pip install 'fedjax_safety\[privacy\]"
  ):
    privacy.epsilon(
      num_rounds=3, sampling_rate=0.25, noise_multiplier=1.0, delta=0.125
    )


@pytest.mark.parametrize(
  ('kwargs', 'words'),
  [
    ({'sampling_rate': 0.0}, 'sampling_rate=0.0 must lie in (0, 1]'),
    ({'sampling_rate': 1.5}, 'sampling_rate=1.5 must lie in (0, 1]'),
    ({'delta': 0.0}, 'delta=0.0 must lie in (0, 1]'),
    ({'num_rounds': -1}, 'num_rounds=-1 must be at least 0'),
    ({'noise_multiplier': -1.0}, 'noise_multiplier=-1.0 must be at least 0'),
    ({'sampling': 'possion'}, "did you mean 'poisson'"),
  ],
)
def test_mistakes_are_told(kwargs, words):
  good = {
    'num_rounds': 1,
    'sampling_rate': 0.5,
    'noise_multiplier': 1.0,
    'delta': 1e-5,
  }
  with pytest.raises(ValueError) as error:
    privacy.epsilon(**good | kwargs)
  assert words in str(error.value)


def _resolved(defense, client=None):
  tree = config.to_json(config.default())
  tree['defense'] |= defense
  tree['client'] |= client or {}
  (made,) = config.resolve(tree).values()
  return made


_ASKED = {
  'aggregator': 'dp_mean',
  'aggregator_kwargs': {'noise_multiplier': 2.0},
  'privacy_delta': 1e-3,
}


@pytest.mark.usefixtures('accounting')
@pytest.mark.parametrize(
  ('schedule', 'rate'), [('uniform', 0.3), ('paper', 1.0)]
)
def test_a_run_counts_its_rounds_and_only_secret_cohorts(schedule, rate):
  made = _resolved(_ASKED, {'num_rounds': 5, 'schedule': schedule})
  assert privacy.of_run(made) == privacy.epsilon(
    num_rounds=5, sampling_rate=rate, noise_multiplier=2.0, delta=1e-3
  )
  assert np.isfinite(privacy.of_run(made))


@pytest.mark.usefixtures('accounting')
def test_the_last_round_records_what_all_cost():
  made = _resolved(_ASKED, {'num_rounds': 5})
  records = [federation._record(made, 'arm', i, {}, 1.0) for i in range(5)]
  assert records[-1]['privacy/epsilon'] == privacy.of_run(made)
  assert not any('privacy/epsilon' in record for record in records[:-1])


@pytest.mark.parametrize(
  ('defense', 'client', 'words'),
  [
    ({'aggregator': 'mean', 'aggregator_kwargs': {}}, {}, "got 'mean'"),
    ({'aggregator_kwargs': {}}, {}, 'needs defense.aggregator_kwargs.noise'),
    ({'privacy_delta': -0.5}, {}, 'must lie in [0, 1)'),
    (
      {
        'aggregator_kwargs': {
          'noise_multiplier': 2.0,
          'preaggregators': [
            {'name': 'nearest_neighbor_mixing', 'num_byzantine': 1}
          ],
        }
      },
      {},
      'without preaggregators',
    ),
    ({}, {'algorithm': 'scaffold', 'optimizer': 'sgd'}, "than 'scaffold'"),
  ],
)
def test_runs_whose_epsilon_would_be_wrong_are_refused(defense, client, words):
  with pytest.raises(ValueError) as error:
    _resolved(_ASKED | defense, client)
  assert words in str(error.value)
