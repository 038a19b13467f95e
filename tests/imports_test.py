"""The seam between the two floors, looked at in fresh processes."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

import fedjax_safety

ROOT = pathlib.Path(fedjax_safety.__file__).resolve().parents[1]
ALLOWED = ('jax', 'jax.numpy', 'numpy', 'optax', 'chex')
PURE_FLOOR = (
  'aggregators',
  'attacks',
  'client_algorithms',
  'client_update',
  'detection',
  'lora',
  'lora_aggregators',
  'losses',
  'round',
  'server_update',
  'tree',
  'types',
)
HARNESS = (
  'datasets',
  'flax',
  'ml_collections',
  'orbax',
  'pandas',
  'safetensors',
  'tokenizers',
  'torch',
  'transformers',
)


def _modules_after(code: str) -> set[str]:
  """Returns the names in sys.modules after running code in a new process."""
  finish = '\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))'
  done = subprocess.run(
    [sys.executable, '-c', code + finish],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return set(json.loads(done.stdout.splitlines()[-1]))


def _present() -> list[str]:
  return [
    name
    for name in PURE_FLOOR
    if importlib.util.find_spec(f'fedjax_safety.{name}')
  ]


def _imports(names) -> str:
  return '\n'.join(f'from fedjax_safety import {name}' for name in names)


@pytest.mark.parametrize(
  'names', [('aggregators', 'attacks'), _present()], ids=['rules', 'all']
)
def test_pure_floor_loads_nothing_of_the_harness(names):
  loaded = _modules_after(_imports(names))
  assert f'fedjax_safety.{names[0]}' in loaded
  assert not loaded.intersection(HARNESS)


def test_pure_floor_loads_only_what_its_allowed_libraries_load():
  allowed = _modules_after('import ' + ', '.join(ALLOWED))
  packages = {name.partition('.')[0] for name in allowed}
  packages |= set(sys.stdlib_module_names) | {'fedjax_safety'}
  loaded = _modules_after(_imports(_present()))
  assert {name.partition('.')[0] for name in loaded} <= packages


def test_package_alone_loads_no_jax():
  loaded = _modules_after('import fedjax_safety; fedjax_safety.__version__')
  assert 'fedjax_safety' in loaded
  assert not {'jax', 'jaxlib', 'numpy'} & loaded


def test_attribute_access_loads_a_module_and_unknown_names_fail():
  loaded = _modules_after('import fedjax_safety; fedjax_safety.aggregators')
  assert {'jax', 'fedjax_safety.aggregators'} <= loaded
  assert 'aggregators' in dir(fedjax_safety)
  with pytest.raises(AttributeError, match='no attribute .nonsense'):
    _ = fedjax_safety.nonsense
