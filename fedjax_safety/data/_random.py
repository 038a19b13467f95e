"""Random streams that depend on named purposes and counters only."""

import zlib

import numpy as np

from fedjax_safety import _validate


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
  """Returns the stream of (seed, purpose, counters), the same in any process.

  Streams of different purposes are independent under one seed, so drawing
  more for one never shifts another.
  """
  _validate.non_negative(seed=seed)
  words = [int(seed), zlib.crc32(purpose.encode()), *map(int, counters)]
  return np.random.default_rng(words)
