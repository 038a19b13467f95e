import collections
import random

import numpy as np
import pytest

from fedjax_safety.data import batching, cohort, templates

PAD = 999


def encoded(num_examples, length, offset=0, cut=()):
  """Returns examples whose tokens are all `offset` plus their index."""
  tokens = np.full((num_examples, length), PAD, np.int32)
  loss_mask = np.zeros(tokens.shape, bool)
  for i in range(num_examples):
    tokens[i, :-1] = offset + i
    loss_mask[i, 2:-1] = i not in cut
  lengths = np.full(num_examples, length - 1, np.int32)
  return templates.EncodedExamples(tokens, loss_mask, lengths, PAD, len(cut), 0)


POPULATION = {
  0: encoded(20, 8, offset=0),
  1: encoded(5, 16, offset=100),
  2: encoded(20, 8, offset=200, cut=(3, 4)),
  3: encoded(1, 8, offset=300),
}


def draw(client_ids, *, round_index=0, seed=0, **kwargs):
  arguments = dict(num_local_steps=3, batch_size=4) | kwargs
  return batching.round_batches(
    POPULATION, client_ids, round_index=round_index, seed=seed, **arguments
  )


def drawn(batches, row):
  return batches.tokens[row, :, :, 0].ravel().tolist()


def test_shapes_types_and_padding():
  batches = draw([1, 0])
  assert batches.tokens.shape == batches.loss_mask.shape == (2, 3, 4, 16)
  assert batches.tokens.dtype == batches.num_examples.dtype == np.int32
  assert batches.loss_mask.dtype == bool
  assert batches.num_examples.tolist() == [5, 20]
  assert (batches.tokens[1, ..., 7:] == PAD).all()
  assert not batches.loss_mask[1, ..., 7:].any()
  assert batches.loss_mask[1, ..., 2:7].all()
  first = batches.tokens[1, ..., :1]
  assert (batches.tokens[1, ..., :7] == first).all()


def test_the_shape_does_not_depend_on_the_cohort():
  assert draw([0, 2]).tokens.shape == draw([1, 3]).tokens.shape
  assert batching.common_length(POPULATION) == 16
  assert draw([0], length=24).tokens.shape[-1] == 24
  with pytest.raises(ValueError, match='length=8 must be at least 16'):
    draw([0], length=8)


@pytest.mark.parametrize('schedule', cohort.SCHEDULES)
def test_no_example_twice_where_there_are_enough(schedule):
  for r in range(5):
    batches = draw([0, 2], round_index=r, schedule=schedule)
    for row in range(2):
      assert len(set(drawn(batches, row))) == 12


@pytest.mark.parametrize('schedule', cohort.SCHEDULES)
def test_small_clients_go_through_all_examples_in_each_pass(schedule):
  for r in range(5):
    ids = drawn(draw([1], round_index=r, schedule=schedule), 0)
    assert set(ids[:5]) == set(ids[5:10]) == set(range(100, 105))
    assert max(collections.Counter(ids).values()) == 3
  assert drawn(draw([3], schedule=schedule), 0) == [300] * 12


def test_passes_are_reshuffled():
  orders = set()
  for r in range(5):
    ids = drawn(draw([1], round_index=r), 0)
    orders |= {tuple(ids[:5]), tuple(ids[5:10])}
  assert len(orders) > 5


@pytest.mark.parametrize('schedule', cohort.SCHEDULES)
def test_cut_answers_are_never_drawn(schedule):
  batches = draw([2], num_local_steps=9, schedule=schedule)
  assert set(drawn(batches, 0)) == set(range(200, 220)) - {203, 204}
  assert batches.num_examples.tolist() == [18]
  assert batches.loss_mask.any(axis=-1).all()


@pytest.mark.parametrize('schedule', cohort.SCHEDULES)
def test_batches_do_not_depend_on_row_or_cohort(schedule):
  together = draw([0, 1, 2, 3], round_index=7, schedule=schedule)
  for ids in ([2, 0], [3, 1, 2], [1]):
    batches = draw(ids, round_index=7, schedule=schedule)
    for row, client_id in enumerate(ids):
      for field, whole in zip(batches, together, strict=True):
        np.testing.assert_array_equal(field[row], whole[client_id])


def test_uniform_depends_on_seed_round_and_client():
  same = drawn(draw([0], round_index=1, seed=1), 0)
  assert same == drawn(draw([0], round_index=1, seed=1), 0)
  assert same != drawn(draw([0], round_index=2, seed=1), 0)
  assert same != drawn(draw([0], round_index=1, seed=2), 0)
  twins = [encoded(20, 8), encoded(20, 8)]
  batches = batching.round_batches(
    twins, [0, 1], round_index=0, num_local_steps=3, batch_size=4, seed=0
  )
  assert drawn(batches, 0) != drawn(batches, 1)


def test_paper_schedule_draws_what_the_global_generator_draws():
  random.seed(6)
  expected = random.sample(range(20), 12)
  batches = draw([0], round_index=6, seed=3, schedule='paper')
  assert drawn(batches, 0) == expected


def test_drawing_is_uniform():
  counts = np.zeros(20)
  rounds = 500
  for r in range(rounds):
    counts[drawn(draw([0], round_index=r), 0)] += 1
  # Binomial(500, 0.6): the standard deviation of a share is 0.0219; five of
  # them, and the draws are fixed by the seed.
  assert np.abs(counts / rounds - 0.6).max() < 0.11


def test_bad_arguments():
  with pytest.raises(ValueError, match='client_id=9 is not among the 4 client'):
    draw([0, 9])
  with pytest.raises(ValueError, match='batch_size=0 must be greater'):
    draw([0], batch_size=0)
  with pytest.raises(ValueError, match="schedule='x' is unknown.*paper, unifo"):
    draw([0], schedule='x')
  arguments = dict(round_index=0, num_local_steps=1, batch_size=1, seed=0)
  with pytest.raises(ValueError, match='client_id=0 has no example with an an'):
    batching.round_batches([encoded(2, 8, cut=(0, 1))], [0], **arguments)
  with pytest.raises(ValueError, match='encoded_by_client is empty'):
    batching.round_batches({}, [0], **arguments)
