import pytest

from fedjax_safety.data import overlap


def test_identical_sets_overlap_fully():
  prompts = ['How are you?', 'Name a color.']
  (row,) = overlap.audit({'attack': prompts, 'defense': list(prompts)})
  assert row == {
    'a': 'attack',
    'b': 'defense',
    'size_a': 2,
    'size_b': 2,
    'exact': 2,
    'exact_share_a': 1.0,
    'exact_share_b': 1.0,
    'ngram': 8,
    'ngram_share_b': 1.0,
  }


def test_exact_matches_ignore_case_and_space_only():
  (row,) = overlap.audit(
    {'a': ['Name  a\ncolor.', 'x'], 'b': [' name a COLOR. ', 'name a color']}
  )
  assert (row['exact'], row['exact_share_a'], row['exact_share_b']) == (
    1,
    0.5,
    0.5,
  )


def test_repeated_prompts_count_in_shares_and_once_in_exact():
  (row,) = overlap.audit({'a': ['x', 'x', 'x', 'y'], 'b': ['x']})
  assert (row['size_a'], row['exact']) == (4, 1)
  assert (row['exact_share_a'], row['exact_share_b']) == (0.75, 1.0)


def test_ngrams_find_shared_wording():
  a = ['Please tell me, in short: one two three four.']
  b = ['zero one two three four five', 'one two four three', 'three four']
  (row,) = overlap.audit({'a': a, 'b': b}, ngram=4)
  assert row['exact'] == 0
  assert row['ngram_share_b'] == pytest.approx(1 / 3)
  (row,) = overlap.audit({'a': a, 'b': b}, ngram=5)
  assert row['ngram_share_b'] == 0.0


def test_an_ngram_does_not_span_two_prompts():
  (row,) = overlap.audit(
    {'a': ['one two', 'three four'], 'b': ['two three']}, ngram=2
  )
  assert row['ngram_share_b'] == 0.0


def test_short_prompts_match_exactly_or_not_at_all():
  (row,) = overlap.audit({'a': ['one two'], 'b': ['One two', 'two']}, ngram=3)
  assert row['ngram_share_b'] == 0.5


def test_every_pair_is_compared_in_order():
  rows = overlap.audit({'c': ['x'], 'a': ['x'], 'b': ['y']})
  assert [(row['a'], row['b'], row['exact']) for row in rows] == [
    ('c', 'a', 1),
    ('c', 'b', 0),
    ('a', 'b', 0),
  ]
  assert overlap.audit({'a': ['x']}) == []


def test_bad_arguments():
  with pytest.raises(ValueError, match="set 'b' is empty"):
    overlap.audit({'a': ['x'], 'b': []})
  with pytest.raises(ValueError, match='ngram=0 must be greater'):
    overlap.audit({'a': ['x']}, ngram=0)
