"""The README of the rules: its tables are the registry's, its code runs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from fedjax_safety.aggregators import describe

README = pathlib.Path(describe.__file__).with_name('README.md')
BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)


def test_tables_are_up_to_date():
  text = README.read_text()
  assert describe.updated(text) == text
  assert '| `krum` |' in text


def test_a_missing_mark_is_named():
  with pytest.raises(ValueError, match='preaggregators'):
    describe.updated(README.read_text().replace('<!-- preaggregators -->', ''))


@pytest.mark.parametrize('block', BLOCKS, ids=['use', 'step', 'drjax', 'mesh'])
def test_examples_run(block):
  done = subprocess.run(
    [sys.executable, '-c', block],
    env=os.environ
    | {
      'PYTHONPATH': str(README.parents[2]),
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': '8',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
