import collections
import random

import numpy as np
import pytest

from fedjax_safety.data import cohort


# The schedule of the reference runs, over rounds 0 to 99: how many rounds
# have 0, 1, 2 and 3 malicious clients, the highest ids being malicious.
@pytest.mark.parametrize(
  'num_clients, num_malicious, counts, slots',
  [
    (10, 3, (28, 57, 14, 1), 88),
    (10, 1, (76, 24, 0, 0), 24),
    (10, 2, (47, 49, 4, 0), 57),
    (10, 4, (16, 53, 29, 2), 117),
    (50, 15, (35, 47, 17, 1), 84),
    (100, 30, (35, 47, 17, 1), 84),
  ],
)
def test_paper_schedule_has_the_published_counts(
  num_clients, num_malicious, counts, slots
):
  malicious = [
    int((ids >= num_clients - num_malicious).sum())
    for ids in (
      cohort.sample_cohort(
        num_clients, 3, round_index=r, seed=0, schedule='paper'
      )
      for r in range(100)
    )
  ]
  found = collections.Counter(malicious)
  assert tuple(found[n] for n in range(4)) == counts
  assert sum(malicious) == slots


def test_paper_schedule_is_that_of_the_global_generator():
  random.seed(17)
  expected = sorted(random.sample(range(10), 3))
  for seed in (0, 5):
    drawn = cohort.sample_cohort(
      10, 3, round_index=17, seed=seed, schedule='paper'
    )
    assert drawn.tolist() == expected


@pytest.mark.parametrize('schedule', cohort.SCHEDULES)
def test_global_state_is_neither_read_nor_changed(schedule):
  def draw():
    return cohort.sample_cohort(
      10, 3, round_index=4, seed=1, schedule=schedule
    ).tolist()

  random.seed(0)
  np.random.seed(0)
  first, python, numpy = draw(), random.getstate(), np.random.get_state()[1]
  random.random()
  np.random.rand()
  assert draw() == first
  random.seed(0)
  np.random.seed(0)
  draw()
  assert random.getstate() == python
  np.testing.assert_array_equal(np.random.get_state()[1], numpy)


def test_uniform_depends_on_seed_and_round():
  def draws(seed):
    return [
      tuple(cohort.sample_cohort(20, 5, round_index=r, seed=seed))
      for r in range(30)
    ]

  assert draws(3) == draws(3)
  assert len(set(draws(3)) | set(draws(4))) > 50


def test_uniform_is_uniform():
  counts = np.zeros(10)
  rounds = 2000
  for r in range(rounds):
    ids = cohort.sample_cohort(10, 3, round_index=r, seed=0)
    assert ids.dtype == np.int64
    assert (np.diff(ids) > 0).all()
    counts[ids] += 1
  # Binomial(2000, 0.3): the standard deviation of a share is 0.0102; five of
  # them, and the draws are fixed by the seed.
  assert np.abs(counts / rounds - 0.3).max() < 0.052


def test_whole_population():
  for schedule in cohort.SCHEDULES:
    ids = cohort.sample_cohort(4, 4, round_index=9, seed=0, schedule=schedule)
    assert ids.tolist() == [0, 1, 2, 3]


def test_bad_arguments():
  with pytest.raises(ValueError, match=r'cohort_size=5 must lie in \[1, 4\]'):
    cohort.sample_cohort(4, 5, round_index=0, seed=0)
  with pytest.raises(ValueError, match='round_index=-1 must be at least 0'):
    cohort.sample_cohort(4, 2, round_index=-1, seed=0)
  with pytest.raises(ValueError, match="mean 'paper'.*known: paper, uniform"):
    cohort.sample_cohort(4, 2, round_index=0, seed=0, schedule='papers')
