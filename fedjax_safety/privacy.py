"""What rounds of `dp_mean` cost each client: its (epsilon, delta).

The accounting is dp-accounting's, which is loaded on first use.
"""

import functools
import math

from fedjax_safety import _validate, settings

SAMPLINGS = ('fixed_size', 'poisson')
# Aggregators whose noise the accountants know.
PRIVATE = ('dp_mean', 'dp_mean_adaptive')


def _accounting():
  """Imports the accountants.

  Raises:
    ValueError: they are not installed.
  """
  try:
    import dp_accounting
    from dp_accounting import pld, rdp
  except ImportError as error:
    raise ValueError(
      f'epsilon needs the package dp-accounting ({error}); install it with '
      f"pip install 'fedjax_safety[privacy]'"
    ) from error
  return dp_accounting, pld, rdp


@functools.lru_cache
def epsilon(
  *,
  num_rounds: int,
  sampling_rate: float,
  noise_multiplier: float,
  delta: float,
  sampling: str = 'fixed_size',
) -> float:
  """Returns an epsilon that the rounds satisfy with this delta.

  It bounds what the sequence of server adapters tells of one client, from
  whom everything but the deltas, and who takes part when, is kept secret. It
  is an upper bound, of central privacy: the server itself sees the deltas.

  * fixed_size: a cohort of the same size is drawn uniformly in every round,
    as this package does. Neighbors differ in one client's data, which moves
    the sum by twice the norm that rows are clipped to. Renyi accounting.
  * poisson: each client takes part by its own coin, and neighbors differ in
    whether one client exists. Privacy loss distributions. Published figures
    are mostly these, and several times smaller.

  Args:
    num_rounds: rounds, all alike; 0 cost nothing.
    sampling_rate: C / N in (0, 1]. It must be 1 where cohorts are known to
      others, such as those of the schedule `paper`.
    noise_multiplier: of `dp_mean` or `dp_mean_adaptive`; 0 gives infinity.
    delta: in (0, 1], well below 1 / N.
    sampling: fixed_size or poisson.

  Raises:
    ValueError: a value is out of range, or dp-accounting is not installed.

  Reference: Wang, Balle, Kasiviswanathan. Subsampled Renyi Differential
  Privacy and Analytical Moments Accountant. AISTATS 2019. Koskela, Jalko,
  Honkela. Computing Tight Differential Privacy Guarantees Using FFT. AISTATS
  2020.
  """
  _validate.one_of(SAMPLINGS, sampling=sampling)
  _validate.non_negative(
    num_rounds=num_rounds, noise_multiplier=noise_multiplier
  )
  for name, value in {'sampling_rate': sampling_rate, 'delta': delta}.items():
    if not 0 < value <= 1:
      raise ValueError(f'{name}={value} must lie in (0, 1]')
  if num_rounds == 0:
    return 0.0
  if noise_multiplier == 0:
    return math.inf
  compute = _fixed_size if sampling == 'fixed_size' else _poisson
  return compute(num_rounds, sampling_rate, noise_multiplier, delta)


def check(config: settings.ExperimentConfig) -> None:
  """Raises ValueError unless a run's epsilon can be told, if it is asked for.

  Args:
    config: the arm's settings; `defense.privacy_delta` asks if it is not 0.
  """
  defense = config.defense
  if not defense.privacy_delta:
    return
  asked = f'defense.privacy_delta={defense.privacy_delta}'
  if not 0 < defense.privacy_delta < 1:
    raise ValueError(f'{asked} must lie in [0, 1)')
  if defense.aggregator not in PRIVATE:
    raise ValueError(
      f'{asked} needs defense.aggregator to be one of {", ".join(PRIVATE)}, '
      f'which add noise; got {defense.aggregator!r}'
    )
  if 'noise_multiplier' not in defense.aggregator_kwargs:
    raise ValueError(
      f'{asked} needs defense.aggregator_kwargs.noise_multiplier, of which '
      f'epsilon is told; give it'
    )
  if defense.aggregator_kwargs.get('preaggregators'):
    raise ValueError(
      f'{asked} needs an aggregator without preaggregators: they mix rows, so '
      f'that one client changes more than one of them'
    )
  if config.client.algorithm == 'scaffold':
    raise ValueError(
      f"{asked} needs another client.algorithm than 'scaffold', which sends "
      f'out what it knows of clients without noise'
    )
  _accounting()


def of_run(config: settings.ExperimentConfig) -> float:
  """Returns the epsilon of all rounds of a checked run that asks for it."""
  client, defense = config.client, config.defense
  # The cohorts of the other schedule are known to everybody.
  secret = client.schedule == 'uniform'
  return epsilon(
    num_rounds=client.num_rounds,
    sampling_rate=client.cohort_size / client.population if secret else 1.0,
    noise_multiplier=defense.aggregator_kwargs['noise_multiplier'],
    delta=defense.privacy_delta,
  )


def _poisson(num_rounds, sampling_rate, noise_multiplier, delta) -> float:
  """Composes Poisson-sampled Gaussians; neighbors add or remove a client."""
  dp, pld, _ = _accounting()
  round_event = dp.PoissonSampledDpEvent(
    sampling_rate, dp.GaussianDpEvent(noise_multiplier)
  )
  accountant = pld.PLDAccountant()
  accountant.compose(dp.SelfComposedDpEvent(round_event, num_rounds))
  return float(accountant.get_epsilon(delta))


def _fixed_size(num_rounds, sampling_rate, noise_multiplier, delta) -> float:
  """Composes Gaussians on cohorts of one size; neighbors replace a client."""
  dp, _, rdp = _accounting()
  # A client who always takes part. The bound for sampling may exceed this at
  # high rates, where it is loose; both hold.
  always = _poisson(num_rounds, 1.0, noise_multiplier / 2, delta)
  if sampling_rate == 1:
    return always
  round_event = dp.SampledWithoutReplacementDpEvent(
    # Only the quotient of the sizes matters.
    source_dataset_size=1,
    sample_size=sampling_rate,
    event=dp.GaussianDpEvent(noise_multiplier / 2),
  )
  accountant = rdp.RdpAccountant(
    neighboring_relation=dp.NeighboringRelation.REPLACE_ONE
  )
  accountant.compose(dp.SelfComposedDpEvent(round_event, num_rounds))
  return min(always, float(accountant.get_epsilon(delta)))
