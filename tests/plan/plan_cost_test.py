"""Tests of plans for the devices at hand, and of what is proposed."""

import dataclasses
import json
import math
import types

import pytest

from fedjax_safety import commands, config, main
from fedjax_safety.config import checks as config_checks
from fedjax_safety.config import file as config_file
from fedjax_safety.models import config as model_config
from fedjax_safety.models import weights
from fedjax_safety.plan import fit, shapes, topology


@pytest.fixture(scope='module')
def sizes_only(tiny_config, tiny_model, tmp_path_factory):
  """A config whose model is a directory with nothing but `config.json`."""
  directory = tmp_path_factory.mktemp('sizes')
  (directory / 'config.json').write_text(
    (tiny_model / 'config.json').read_text()
  )
  return [f'--config={tiny_config}', f'--config.model.path={directory}']


def _plan(capsys, *arguments):
  """Returns the exit code and what was printed, parsed."""
  code = main.run(['plan', '--json', *arguments])
  return code, json.loads(capsys.readouterr().out)


def test_a_plan_reads_no_weights_and_tells_memory(
  capsys, sizes_only, quick_compiles
):
  code, plan = _plan(capsys, *sizes_only)
  assert code == 0 and plan['fits']
  # Of 3 clients, 2 steps of 2 examples of 16 tokens.
  assert plan['tokens'] == 3 * 2 * 2 * 16
  # 4 operations a frozen weight and token, 6 a trained one, and attention.
  kernels = 2 * 16 * (4 * 16 + 3 * 32) + 16 * 32
  factors, attention = 2 * 2 * 2 * (16 + 16), 2 * 6 * 2 * 16 * 16
  steps = 4 * kernels + 6 * factors + attention
  # Besides, the mean of the deltas.
  assert steps <= plan['flops'] / plan['tokens'] < 1.001 * steps
  memory = plan['memory']
  # Norms and the embedding besides, in float32.
  weights = 4 * (kernels + 5 * 16 + 32 * 16)
  assert weights < memory['arguments'] < 1.5 * weights
  parts = ('arguments', 'outputs', 'temporaries')
  assert memory['total'] == sum(memory[part] for part in parts)


def test_what_does_not_fit_has_an_exit_code(capsys, sizes_only, quick_compiles):
  code, plan = _plan(capsys, *sizes_only, '--memory_gib=1e-5')
  assert code == commands.DOES_NOT_FIT == 3
  assert not plan['fits']
  assert plan['memory']['total'] > plan['memory']['limit'] == 10737


def test_a_proposal_fits_and_is_what_a_run_would_take(
  capsys, sizes_only, quick_compiles
):
  code, plan = _plan(capsys, *sizes_only, '--fit')
  assert code == 0
  assert plan['performance']['mesh'] == [1, 1, 1]
  code = main.run(['plan', *sizes_only, '--fit'])
  assert code == 0
  assert '--config.performance.mesh=1,1,1' in capsys.readouterr().out


def _seven_billion(tiny_config):
  """Returns settings with a cohort and a batch that a slice divides."""
  tree = config_file.load(str(tiny_config))
  for key, text in {
    'client.population': '8',
    'client.cohort_size': '8',
    'client.batch_size': '8',
    'model.max_length': '512',
    'model.dtype': 'bfloat16',
  }.items():
    config_file.override(tree, key, text)
  (made,) = config.resolve(tree).values()
  return made


def test_every_candidate_is_a_config_that_resolves(tiny_config):
  settings = _seven_billion(tiny_config)
  model = shapes.decoder_config(settings.model, 'llama3-8b')
  device = types.SimpleNamespace(device_kind='TPU v5 lite')
  found = fit.candidates(settings, model, device, 16)
  assert {e.performance.mesh for e in found} >= {(8, 2, 1), (2, 8, 1)}
  for estimate in found:
    config_checks.check(
      dataclasses.replace(settings, performance=estimate.performance)
    )
  seconds = [estimate.seconds for estimate in found]
  assert seconds == sorted(seconds)


def test_estimates_know_what_saves_memory(tiny_config):
  settings = _seven_billion(tiny_config)
  model = shapes.decoder_config(settings.model, 'llama2-7b')
  device = types.SimpleNamespace(device_kind='TPU v5 lite')
  found = {
    dataclasses.astuple(e.performance)[:3]: e
    for e in fit.candidates(settings, model, device, 16)
  }
  whole = found[0, (2, 8, 1), False]
  assert found[0, (2, 8, 1), True].memory < whole.memory
  assert found[2, (2, 8, 1), False].memory < whole.memory
  # Half of 13.5 GB of weights lies on each device.
  assert found[0, (8, 2, 1), True].memory > 6.7e9


def test_named_shapes_have_their_public_number_of_weights():
  expected = {
    'tinyllama-1.1b': 1.100e9,
    'llama2-7b': 6.738e9,
    'llama2-13b': 13.016e9,
    'llama2-70b': 68.977e9,
    'llama3-8b': 8.030e9,
    'llama3-70b': 70.554e9,
    'llama3.2-1b': 1.236e9,
    'llama3.2-3b': 3.213e9,
  }
  assert set(shapes.SHAPES) == set(expected)
  for name, count in expected.items():
    model = model_config.from_hf(shapes.SHAPES[name])
    table = weights.table(model)
    total = sum(math.prod(weight.shape) for weight in table)
    assert total == pytest.approx(count, rel=1e-3)


def _error(capsys, *arguments):
  """Returns the sentence of a plan that is refused."""
  assert main.run(['plan', *arguments]) == main.USER_ERROR
  return capsys.readouterr().err


def test_without_libtpu_the_error_names_the_extra(
  capsys, sizes_only, monkeypatch
):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
  said = _error(capsys, *sizes_only, '--topology=v5e:4x4')
  assert 'needs libtpu' in said and 'fedjax_safety[tpu]' in said


def test_unknown_names_are_told(capsys, sizes_only):
  assert 'llama2-7b' in _error(capsys, *sizes_only, '--shape=llama2-7')
  assert 'run' in _error(capsys, *sizes_only, '--arm=krum')
  said = _error(
    capsys,
    *sizes_only,
    '--config.performance.mesh=3,1,1',
  )
  assert 'needs 3 devices; there are 1' in said
