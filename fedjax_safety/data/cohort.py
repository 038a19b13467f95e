"""Samples the clients of each round."""

import random

import numpy as np

from fedjax_safety import _validate
from fedjax_safety.data import _random

SCHEDULES = ('paper', 'uniform')


def sample_cohort(
  num_clients: int,
  cohort_size: int,
  *,
  round_index: int,
  seed: int,
  schedule: str = 'uniform',
) -> np.ndarray:
  """Samples a round's clients without replacement, sorted.

  Neither reads nor changes any global random state, and each round can be
  drawn on its own.

  Args:
    num_clients: size of the population, N.
    cohort_size: clients of one round, C.
    round_index: the round, from 0.
    seed: of the run.
    schedule: `uniform` depends on `seed` and `round_index`; `paper` repeats
      the reference runs, whose cohorts depend on the round alone and are the
      same for every seed.

  Returns:
    Client ids, int64[C].

  Raises:
    ValueError: the cohort is larger than the population.
  """
  _validate.positive(num_clients=num_clients, cohort_size=cohort_size)
  _validate.in_range(1, num_clients, cohort_size=cohort_size)
  _validate.non_negative(round_index=round_index)
  _validate.one_of(SCHEDULES, schedule=schedule)
  if schedule == 'paper':
    drawn = random.Random(round_index).sample(range(num_clients), cohort_size)
  else:
    rng = _random.generator(seed, 'cohort', round_index)
    drawn = rng.choice(num_clients, cohort_size, replace=False)
  return np.sort(np.asarray(drawn, np.int64))
