"""Projection onto a safety subspace: what it keeps, and a run with it."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import assembly, config, experiment, metrics, safe_lora
from fedjax_safety.config import file as config_file
from fedjax_safety.models import export, load

pytestmark = pytest.mark.usefixtures('quick_compiles')

LAYERS, WIDE, RANK, OUT, KEPT = 3, 5, 2, 6, 2


@pytest.fixture(scope='module')
def inputs():
  """An adapter of one matrix and its subspaces."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(LAYERS, OUT, KEPT)))[0]
  pair = {
    'a': rng.normal(size=(LAYERS, WIDE, RANK)),
    'b': rng.normal(size=(LAYERS, RANK, OUT)),
  }
  # The last layer lies within its subspace but for a little.
  pair['b'][2] = rng.normal(size=(RANK, KEPT)) @ basis[2].T + 1e-3
  as_jax = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pair)
  return {'m': {'q_proj': as_jax}}, {'m': {'q_proj': jnp.asarray(basis)}}


def test_only_what_lies_outside_is_projected(inputs):
  adapter, basis = inputs
  found, count = safe_lora.project(adapter, basis, 0.9)
  pair, got = adapter['m']['q_proj'], found['m']['q_proj']
  u = np.asarray(basis['m']['q_proj'], np.float64)
  products = np.asarray(pair['a'], np.float64) @ pair['b']
  inside = products @ u @ np.swapaxes(u, 1, 2)
  cosines = np.sum(products * inside, axis=(1, 2)) / (
    np.linalg.norm(products, axis=(1, 2)) * np.linalg.norm(inside, axis=(1, 2))
  )
  assert cosines[2] > 0.9 > cosines[:2].max()
  assert int(count) == 2
  want = np.where((cosines < 0.9)[:, None, None], inside, products)
  np.testing.assert_allclose(got['a'] @ got['b'], want, atol=1e-5)
  np.testing.assert_array_equal(got['a'], pair['a'])
  np.testing.assert_array_equal(got['b'][2], pair['b'][2])


def test_a_second_projection_changes_nothing(inputs):
  once, _ = safe_lora.project(*inputs, 1.0)
  twice, _ = safe_lora.project(once, inputs[1], 1.0)
  leaves = zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True)
  for left, right in leaves:
    np.testing.assert_allclose(left, right, atol=1e-5)
  assert int(safe_lora.project(once, inputs[1], 0.99)[1]) == 0


def test_nothing_is_left_alone(inputs):
  zeros = jax.tree.map(jnp.zeros_like, inputs[0])
  found, count = safe_lora.project(zeros, inputs[1], 1.0)
  assert int(count) == 0
  assert not any(x.any() for x in jax.tree.leaves(found))


@pytest.fixture(scope='module')
def aligned(tiny_config, tiny_model, tmp_path_factory):
  """A model whose projections differ from the tiny one's by rank 1."""
  tree = config_file.load(str(tiny_config))
  (settings,) = config.resolve(tree).values()
  model = assembly.tuned_model(settings)
  direction = jnp.arange(16.0) / 16

  def moved(path, leaf):
    names = jax.tree_util.keystr(path)
    if not any(f"'{n}'" in names for n in settings.lora.target_modules):
      return leaf
    return leaf + 0.1 * direction

  params = jax.tree_util.tree_map_with_path(moved, model.base_params)
  directory = tmp_path_factory.mktemp('aligned') / 'model'
  hf_config = json.loads((tiny_model / 'config.json').read_text())
  export.export_model(
    directory, params, hf_config=hf_config, tokenizer=model.tokenizer
  )
  return directory


def _made(tiny_config, aligned, **changes):
  tree = config_file.load(str(tiny_config))
  tree['client']['num_rounds'] = 2
  tree['defense']['safe_lora'] |= {
    'aligned_model': str(aligned),
    'rank': 1,
    'threshold': 1.0,
    **changes,
  }
  return tree


def test_a_run_stays_within(tiny_config, aligned, tmp_path):
  tree = _made(tiny_config, aligned)
  experiment.run(tree, tmp_path / 'run')
  records = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  rounds = [r for r in records if r['kind'] == 'round']
  # Two layers, of which q and v are adapted.
  assert [r['defense/num_projected'] for r in rounds] == [4, 4]
  (settings,) = config.resolve(tree).values()
  stage = tmp_path / 'run/runs/run/seed_0/adapters/federated'
  model = assembly.tuned_model(settings)
  adapter = load.load_adapter(stage, model.config)[0]
  direction = np.arange(16.0) / np.linalg.norm(np.arange(16.0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
    if path[-1].key == 'b':
      rest = leaf - (leaf @ direction)[..., None] * direction
      assert np.abs(leaf).max() > 1e-3
      assert np.abs(rest).max() < 1e-5
  # The second round starts from what the first one projected: so does a
  # resumed run, which finds nothing else.
  arm = tmp_path / 'run/runs/run/seed_0'
  for part in ('adapters', 'evaluations', 'checkpoints/2'):
    shutil.rmtree(arm / part)
  experiment.run(tree, tmp_path / 'run')
  chex.assert_trees_all_equal(
    load.load_adapter(stage, model.config)[0], adapter
  )


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'aligned_model': None}, 'the two models are the same there'),
    ({'rank': 17}, 'has 16 outputs; set defense.safe_lora.rank=17'),
    ({'rank': 0}, 'defense.safe_lora.rank=0 must be greater than 0'),
    ({'threshold': 2.0}, r'threshold=2.0 must lie in \[0, 1\]'),
    ({'aligned_model': 'no/such'}, 'no/such'),
  ],
)
def test_bad_settings_are_refused(
  tiny_config, tiny_model, aligned, tmp_path, changes, words
):
  if changes.get('aligned_model', '') is None:
    changes = {'aligned_model': str(tiny_model)}
  tree = _made(tiny_config, aligned, **changes)
  with pytest.raises(ValueError, match=words):
    experiment.run(tree, tmp_path / 'run')
