"""Defects found in published programs, and the tests that they would fail.

Each defect was reproduced in, or quoted from, another program. Those that
need few lines are here: the rule follows its definition on cohorts of which
some tell the defect from it. For the others the test that they fail is named.
"""

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

from fedjax_safety import aggregators, attacks

pytestmark = pytest.mark.usefixtures('quick_compiles')

TESTS = pathlib.Path(__file__).parent
# A mean of a few float32 numbers of size 1, and ALIE's root of a variance.
TOLERANCE = 5e-6
COHORTS = range(12)


class Defect(NamedTuple):
  """A rule, its definition in float64, and what was found instead."""

  rule: Callable
  definition: Callable
  defective: Callable


def _rows(seed: int) -> np.ndarray:
  """Returns [8, 6] float32 rows of many sizes, and so are their halves."""
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((8, 6)) + 0.3
  rows *= rng.uniform(0.3, 2, (8, 1))
  rows[:, 3:] *= 3
  return rows.astype(np.float32)


def _leaves(rows):
  return {'a': rows[:, :3], 'b': rows[:, 3:]}


def _of_leaves(rule, **kwargs) -> Callable:
  """Returns a rule on rows in two leaves, its result flattened again."""

  def flat(rows):
    delta = rule(_leaves(rows), **kwargs)
    return jax.numpy.concatenate([delta['a'], delta['b']])

  return flat


def _krum_scores(lengths, neighbors=4):
  """Returns the sums over the nearest others, of C = 8 with f = 2."""
  return np.sort(lengths, axis=1)[:, 1 : neighbors + 1].sum(axis=1)


def _distances(rows):
  return np.linalg.norm(rows[:, None] - rows[None], axis=2)


def _krum(power=2, neighbors=4):
  def krum(rows):
    scores = _krum_scores(_distances(rows) ** power, neighbors)
    return rows[np.argmin(scores)]

  return krum


def _krum_of_summed_layers(rows):
  lengths = sum(_distances(half) for half in _leaves(rows).values())
  return rows[np.argmin(_krum_scores(lengths))]


def _multi_krum(combine):
  def multi_krum(rows):
    order = np.argsort(_krum_scores(_distances(rows) ** 2), kind='stable')
    return combine(rows[order[:3]], axis=0)

  return multi_krum


def _lower_median(rows):
  return np.sort(rows, axis=0)[3]


def _mean_around(center):
  def mean_around(rows):
    away = np.abs(rows - center(rows))
    order = np.argsort(away, axis=0, kind='stable')
    return np.take_along_axis(rows, order[:6], axis=0).mean(axis=0)

  return mean_around


def _median(rows):
  return np.median(rows, axis=0)


def _weiszfeld(rows):
  point = rows.mean(axis=0)
  for _ in range(500):
    weights = 1 / np.linalg.norm(rows - point, axis=1)
    point = weights @ rows / weights.sum()
  return point


def _weiszfeld_per_layer(rows):
  return np.concatenate([_weiszfeld(half) for half in _leaves(rows).values()])


def _bulyan(last_step):
  """Returns Bulyan of C = 8 and f = 1 with a last step of its own."""

  def bulyan(rows):
    left, selected = list(range(8)), []
    while len(selected) < 6:
      squares = _distances(rows[left]) ** 2
      scores = _krum_scores(squares, max(1, len(left) - 3))
      selected.append(left.pop(int(np.argmin(scores))))
    return last_step(rows[sorted(selected)])

  return bulyan


def _near_median(rows):
  order = np.argsort(np.abs(rows - _median(rows)), axis=0, kind='stable')
  return np.take_along_axis(rows, order[:4], axis=0).mean(axis=0)


def _trimmed(rows):
  return np.sort(rows, axis=0)[1:-1].mean(axis=0)


def _alie(rows):
  """Sends ALIE's row from two of eight clients."""
  return attacks.alie(rows, np.arange(8) >= 6, jax.random.key(0))[7]


def _below_mean(deviations):
  def below_mean(rows):
    return rows[:6].mean(axis=0) - deviations * rows[:6].std(axis=0)

  return below_mean


_F = {'num_byzantine': 2}
HERE = {
  'Krum of lengths that are not squared': Defect(
    aggregators.krum(**_F), _krum(), _krum(power=1)
  ),
  'Krum of lengths squared twice': Defect(
    aggregators.krum(**_F), _krum(), _krum(power=4)
  ),
  'Krum of one neighbor too many': Defect(
    aggregators.krum(**_F), _krum(), _krum(neighbors=5)
  ),
  'Krum of lengths added up over the layers': Defect(
    _of_leaves(aggregators.krum, **_F), _krum(), _krum_of_summed_layers
  ),
  'multi-Krum that returns a sum': Defect(
    aggregators.multi_krum(num_selected=3, **_F),
    _multi_krum(np.mean),
    _multi_krum(np.sum),
  ),
  'a median of an even number that is the lower middle': Defect(
    aggregators.median(), _median, _lower_median
  ),
  'MeaMed around the lower middle': Defect(
    aggregators.meamed(**_F), _mean_around(_median), _mean_around(_lower_median)
  ),
  'a geometric median of each layer': Defect(
    _of_leaves(aggregators.geometric_median), _weiszfeld, _weiszfeld_per_layer
  ),
  'Bulyan that ends in a trimmed mean': Defect(
    aggregators.bulyan(num_byzantine=1),
    _bulyan(_near_median),
    _bulyan(_trimmed),
  ),
  # Of 8 clients with 2 malicious, 3 of 6 must be beyond: the median, 0. The
  # defect takes 5 of 8.
  'ALIE whose share is of all clients': Defect(
    _alie, _below_mean(0.0), _below_mean(0.3186394)
  ),
}

ELSEWHERE = {
  'A and B of an adapter judged apart': (
    'lora_aggregators/products_test.py',
    'test_products_are_blind_to_the_gauge_and_factors_are_not',
  ),
  'Bulyan that mixes up places, and selects a row five times': (
    'aggregators/bulyan_test.py',
    'test_every_row_is_selected_at_most_once',
  ),
  'Bulyan that scores once, or ends without a second step': (
    'aggregators/bulyan_test.py',
    'test_the_steps_that_some_programs_leave_out_are_there',
  ),
  'Bulyan that uses up the rows of the caller': (
    'aggregators/bulyan_test.py',
    'test_the_rows_of_the_caller_stay',
  ),
  'buckets without shuffling': (
    'aggregators/preaggregate_test.py',
    'test_buckets_are_drawn_by_the_key',
  ),
  'CAF and SMEA by one random power step': (
    'aggregators/subsets_test.py',
    'test_smea_is_exact_where_one_power_step_is_a_lottery',
  ),
  'CAF that gives another result every time': (
    'aggregators/filtering_test.py',
    'test_two_calls_agree_bit_by_bit',
  ),
  'CAF that never ends if a row is far': (
    'aggregators/filtering_test.py',
    'test_a_far_row_ends_the_filter_instead_of_stalling_it',
  ),
  'CAF that returns nothing for f = 0': (
    'aggregators/filtering_test.py',
    'test_without_byzantine_rows_it_is_the_mean',
  ),
  'centered clipping around a client drawn at random, or always around 0': (
    'aggregators/geometric_test.py',
    'test_the_center_is_carried_from_round_to_round',
  ),
  'centered clipping that divides by a distance of 0': (
    'aggregators/geometric_test.py',
    'test_rows_at_the_center_do_not_divide_by_zero',
  ),
  'clipping in the array of the caller': (
    'aggregators/preaggregate_test.py',
    'test_short_rows_stay_bit_by_bit_and_the_callers_array_stays_whole',
  ),
  'distances of weights by a product: lost, or negative': (
    'aggregators/geometry_test.py',
    'test_rows_like_weights_keep_their_distances',
  ),
  'DnC without anybody in the intersection': (
    'aggregators/rules_test.py',
    'test_dnc_falls_back_to_the_rows_that_pass_most',
  ),
  'FedIT that returns client 0 times its weight': (
    'lora_aggregators/schemes_test.py',
    'test_the_error_of_averaged_factors_is_their_covariance',
  ),
  'FLAME that clips to the median of the rows it kept': (
    'aggregators/clustering_test.py',
    'test_flame_clips_to_the_median_of_all_norms',
  ),
  'FLTrust that trusts everybody where nobody is': (
    'aggregators/trust_test.py',
    'test_fltrust_without_trust_is_zero_and_not_the_mean',
  ),
  'Krum that returns a row with a NaN in it': (
    'aggregators/contract_test.py',
    'test_nonfinite_rows_are_harmless_and_counted',
  ),
  'a mean over no examples that is NaN': (
    'aggregators/contract_test.py',
    'test_mean_of_no_weight_is_zero',
  ),
  'mixing that gathers all neighbors of all rows': (
    'aggregators/memory_test.py',
    'test_one_copy_of_the_rows_is_the_most_that_a_rule_holds',
  ),
  'NaN looked for in one tensor alone': (
    'aggregators/contract_test.py',
    'test_one_bad_entry_counts_as_a_bad_row',
  ),
  'a rule that is configured and never called': (
    'aggregators/coordinatewise_test.py',
    'test_what_few_clients_want_is_undone',
  ),
  "server optimizers that are another paper's": (
    'server_update_test.py',
    'test_variants_differ',
  ),
  'SMEA that fails on tiny rows': (
    'aggregators/subsets_test.py',
    'test_smea_bears_equal_and_tiny_rows',
  ),
  'trimming and weighing by the sizes that clients claim': (
    'aggregators/contract_test.py',
    'test_only_the_mean_heeds_weights',
  ),
  'trimming nobody that trims everybody': (
    'aggregators/contract_test.py',
    'test_without_byzantine_clients_it_is_the_mean',
  ),
  'update attacks that change the dtype': (
    'attacks/attacks_contract_test.py',
    'test_honest_rows_are_bit_identical',
  ),
  'weights kept in a set, where equal ones are one': (
    'aggregators/geometric_test.py',
    'test_equal_numbers_of_rows_do_not_collapse',
  ),
  'weights of an iteration on top of those of the last': (
    'aggregators/geometric_test.py',
    'test_weights_do_not_compound_over_iterations',
  ),
}


@pytest.mark.parametrize('name', HERE)
def test_the_definition_is_followed_and_the_defect_is_told_from_it(name):
  rule, definition, defective = HERE[name]
  rule, found = jax.jit(rule), 0
  for seed in COHORTS:
    rows = _rows(seed)
    got, wide = np.asarray(rule(rows)), np.float64(rows)
    np.testing.assert_allclose(got, definition(wide), rtol=0, atol=TOLERANCE)
    found += bool(np.abs(defective(wide) - got).max() > 1e-2)
  assert found > 0


@pytest.mark.parametrize('defect', ELSEWHERE)
def test_the_test_of_every_other_defect_exists(defect):
  file, test = ELSEWHERE[defect]
  assert re.search(rf'^def {test}\(', (TESTS / file).read_text(), re.MULTILINE)
