"""Rules are compiled many times over and run on little: compile quickly."""

import pytest


@pytest.fixture(autouse=True, scope='module')
def _quick_compiles(quick_compiles):
  """Compiles with few optimizations in every module of this folder."""
