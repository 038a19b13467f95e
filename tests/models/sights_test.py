"""Tests of what layers see, with and without a window."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import rope_config, sights

SIZES = {
  'vocab_size': 8,
  'width': 4,
  'num_layers': 3,
  'num_heads': 2,
  'num_kv_heads': 1,
  'head_width': 4,
  'mlp_width': 6,
}
MIXED = (True, False, True)
LOCAL = rope_config.RopeConfig(100.0)


def _make(positions, reach, **fields):
  config = config_lib.DecoderConfig(**SIZES | fields)
  return sights.make(config, jnp.asarray(positions), jnp.arange(reach)[None])


def _seen(positions, reach, window):
  """Returns the mask by its definition."""
  return [
    [[at - window < slot <= at for slot in range(reach)] for at in row]
    for row in positions
  ]


@pytest.mark.parametrize('window', [1, 3, 5])
def test_a_window_ends_with_its_own_position(window):
  positions = [[0, 1, 5], [3, 4, 6]]
  both, windowed = _make(positions, 7, window=window, windowed=MIXED)
  np.testing.assert_array_equal(windowed, MIXED)
  for layer, size in zip((0, 1), (window, 7), strict=True):
    mask = sights.choose(both, windowed[layer])[2]
    np.testing.assert_array_equal(mask, _seen(positions, 7, size))


def test_layers_that_see_alike_share_one_sight():
  full, windowed = _make([[0, 1, 2]], 3)
  assert windowed is None and sights.choose(full, None) is full
  narrow, windowed = _make([[0, 1, 2]], 3, window=2, windowed=(True,) * 3)
  assert windowed is None
  np.testing.assert_array_equal(narrow[2], _seen([[0, 1, 2]], 3, 2))


def test_a_window_that_spans_everything_is_none():
  spanned, windowed = _make([[0, 1, 2]], 3, window=3, windowed=MIXED)
  assert windowed is None
  np.testing.assert_array_equal(spanned[2], _seen([[0, 1, 2]], 3, 3))


def test_layers_with_a_window_rotate_in_their_own_way():
  fields = {'window': 3, 'windowed': MIXED, 'local_rope': LOCAL}
  both, windowed = _make([[0, 1, 2]], 3, **fields)
  (own, _), _ = _make([[0, 1, 2]], 9, window=2, windowed=MIXED, rope=LOCAL)
  for layer, same in enumerate(MIXED):
    cos = sights.choose(both, windowed[layer])[0]
    assert np.array_equal(cos, own[0]) == same


@pytest.mark.parametrize(
  'fields, message',
  [
    (
      {'window': 2, 'windowed': (True,)},
      'windowed has 1 entries; num_layers=3',
    ),
    ({'windowed': MIXED}, 'window=None gives no size'),
    ({'window': 0, 'windowed': MIXED}, 'window=0 must be greater than 0'),
    ({'activation': 'gelu'}, "activation='gelu' is unknown .did you mean"),
    ({'logit_cap': 0.0}, 'logit_cap=0.0 must be greater than 0'),
  ],
)
def test_windows_and_flags_are_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    config_lib.DecoderConfig(**SIZES | fields)
