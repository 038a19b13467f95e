"""Tests of what is chosen for `auto`, and of what is refused unloaded."""

import dataclasses
import types

import pytest

from fedjax_safety import config as config_lib
from fedjax_safety import experiment, main, metrics
from fedjax_safety.config import file as config_file
from fedjax_safety.models import load
from fedjax_safety.plan import cost, fit, settle, shapes

GPU = types.SimpleNamespace(platform='gpu', device_kind='NVIDIA H200')
CPU = types.SimpleNamespace(platform='cpu', device_kind='cpu')
AUTO = {
  'performance.remat': 'auto',
  'performance.clients_per_chunk': 'auto',
}
COHORT = {
  'client.population': '8',
  'client.cohort_size': '8',
  'client.batch_size': '8',
  'model.max_length': '512',
  'model.dtype': 'bfloat16',
}


def _tree(tiny_config, **overrides):
  tree = config_file.load(str(tiny_config))
  for key, text in overrides.items():
    config_file.override(tree, key, text)
  return tree


@pytest.fixture
def seven_billion(tiny_config):
  """Returns `(**overrides) -> settings, sizes` of eight clients at 7B."""

  def make(**overrides):
    tree = _tree(tiny_config, **(COHORT | AUTO | overrides))
    (settings,) = config_lib.resolve(tree).values()
    return settings, shapes.decoder_config(settings.model, 'llama2-7b')

  return make


def _chosen(settings, model, device, limit):
  found, why = settle.choose(settings, model, device, limit)
  return (found.remat, found.clients_per_chunk), why


def test_less_memory_recomputes_and_trains_fewer_at_once(seven_billion):
  settings, model = seven_billion()
  needs = {}
  for remat in (False, True):
    for chunk in (0, 1):
      performance = dataclasses.replace(
        settings.performance, remat=remat, clients_per_chunk=chunk
      )
      made = fit.estimate(settings, model, GPU, performance)
      needs[remat, chunk] = made.memory
  plenty, _ = _chosen(settings, model, GPU, 2 * needs[False, 0])
  assert plenty == (False, 0)
  less, why = _chosen(settings, model, GPU, 1.2 * needs[False, 1])
  assert less == (False, 1)
  assert 'GiB' in why and 'NVIDIA H200' in why and 'fastest' in why
  little, _ = _chosen(settings, model, GPU, 1.2 * needs[True, 1])
  assert little == (True, 1)
  nothing, why = _chosen(settings, model, GPU, 1e9)
  assert nothing == (True, 1) and 'least' in why


def test_a_setting_that_is_given_stays(seven_billion):
  settings, model = seven_billion(**{'performance.remat': 'false'})
  assert _chosen(settings, model, GPU, 1e9)[0] == (False, 1)


def test_a_cpu_keeps_the_defaults(seven_billion):
  settings, model = seven_billion()
  assert _chosen(settings, model, CPU, 1e9)[0] == (False, 0)
  assert _chosen(settings, model, GPU, None)[0] == (False, 0)


def test_what_was_chosen_is_told(tiny_config, tmp_path, capsys):
  tree = _tree(tiny_config, **AUTO)
  with experiment.arms_of(tree, tmp_path) as (arm,):
    assert arm.config.performance.remat is False
    assert arm.config.performance.clients_per_chunk == 0
  assert (
    'run: chose remat=False, clients_per_chunk=0' in capsys.readouterr().err
  )
  (record,) = metrics.read(tmp_path / 'metrics.jsonl')
  assert record['kind'] == 'choice' and record['performance/remat'] is False


@pytest.mark.parametrize(
  'limit, words',
  [
    (1000, ('frozen', 'performance.mesh', 'model.quantization')),
    (40_000, ('a round takes', 'frozen weights', 'performance.remat')),
  ],
)
def test_what_memory_cannot_hold_is_refused_before_loading(
  limit, words, tiny_config, tmp_path, monkeypatch, capsys, quick_compiles
):
  def never(*args, **kwargs):
    raise AssertionError('weights were read')

  monkeypatch.setattr(load, 'load', never)
  monkeypatch.setattr(cost, 'limit_of', lambda device, sharing: limit)
  code = main.run(
    ['run', f'--config={tiny_config}', f'--workdir={tmp_path / "run"}']
  )
  assert code == main.USER_ERROR
  said = capsys.readouterr().err
  assert 'GiB' in said and all(word in said for word in words), said


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('remat', 'perhaps', "remat='perhaps'"),
    ('remat', 1, 'bool or str'),
    ('clients_per_chunk', 'all', "clients_per_chunk='all'"),
    ('clients_per_chunk', True, 'int or str'),
    ('attention', 'flash', 'cudnn'),
    ('attention', 'splash', 'needs a TPU'),
  ],
)
def test_values_that_mean_nothing_are_refused(
  key, value, words, tiny_config, monkeypatch
):
  tree = _tree(tiny_config)
  tree['performance'][key] = value
  with pytest.raises(ValueError, match=words):
    (settings,) = config_lib.resolve(tree).values()
    settle.settle(settings)
