"""The benchmarks of models run, at shapes whose figures say nothing."""

import importlib
import pathlib
import sys

import pytest

# They are beside the package, not in it.
sys.path.append(str(pathlib.Path(__file__).parents[1]))
generation_benchmark = importlib.import_module(
  'benchmarks.generation_benchmark'
)
load_benchmark = importlib.import_module('benchmarks.load_benchmark')


@pytest.mark.usefixtures('quick_compiles')
def test_generation_gives_the_peer_s_tokens(tmp_path):
  pytest.importorskip('peft')
  args = generation_benchmark.parse_args(
    '--shape=tiny --batch=4 --prompt=6 --new=4 --adapters=2 --rank=2 '
    '--repetitions=1'.split()
  )
  report = generation_benchmark.measure(args, tmp_path)
  assert report['floor_ms'] > 0
  for part in (report['plain'], report['adapters']):
    assert part['equal_tokens'] == 1
    assert part['ratio_cpu'] > 0 and part['share_of_floor'] > 0


def test_loading_is_held_against_the_disk(tmp_path):
  args = load_benchmark.parse_args(
    ['--shape=tiny', '--repetitions=1', '--ours_only']
  )
  report = load_benchmark.measure(args, tmp_path / 'model')
  assert report['model_bytes'] > 2 * report['layer_bytes'] > 0
  for state in (report['cold'], report['warm']):
    assert state['share_of_disk'] > 0 and 'peer' not in state
    (run,) = state['ours']['runs']
    assert run['model_bytes'] == report['model_bytes']
