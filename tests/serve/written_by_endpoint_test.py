"""Data of attack and defense, written by a model that `serve` serves."""

import hashlib
import json

import ml_collections
import pytest

from fedjax_safety import (
  arm,
  client_data,
  config,
  endpoint,
  experiment,
  interrupt,
  metrics,
)
from fedjax_safety.config import file as config_file
from fedjax_safety.synthesis import written_data

pytest.importorskip('openai')
pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture
def tree(tiny_config, served):
  """A config that attacks and repairs with data of the served base."""
  tree = ml_collections.ConfigDict(config_file.load(str(tiny_config)))
  tree.evaluation.max_new_tokens = 12
  threat, repair = tree.threat_model, tree.defense.repair
  threat.num_malicious = 1
  threat.data_attack = 'generated'
  threat.generator = f'endpoint:{served.url}#base'
  repair.levels = ('external',)
  repair.external_model = threat.generator
  repair.num_examples = 6
  tree.performance.generation_batch_size = 8
  return tree


def _checked(path, manifest_path):
  """Returns a manifest whose hash is that of its data."""
  manifest = json.loads(manifest_path.read_text())
  data = path.read_bytes()
  assert manifest['sha256'] == hashlib.sha256(data).hexdigest()
  assert 'key_variable' not in manifest_path.read_text()
  return manifest


def test_data_come_from_it_with_a_manifest_and_are_asked_for_once(
  tree, tmp_path
):
  (made,) = config.resolve(tree).values()
  here = arm.Arm(
    'run', 0, made, tmp_path, metrics.NoMetrics(), interrupt.StopRequest()
  )
  assert len(written_data.missing_endpoints(made, here.directory)) == 2
  clients = client_data.honest_clients(made)
  pairs = written_data.attack_data(here, clients)
  (path,) = (tmp_path / 'synthesis').glob('*.jsonl')
  manifest = _checked(path, path.with_suffix('.manifest.json'))
  assert manifest['source'] == tree.threat_model.generator
  assert manifest['count'] == len(pairs) == 4
  assert manifest['generation']['ask_harmful']
  assert manifest['filters']['unaligned']['kept'] == 4

  pairs = written_data.defense_data(here, 'external', None)
  path = here.defense_data('external')
  manifest = _checked(path, path.with_name('manifest.json'))
  assert manifest['aligned'] == manifest['normal'] == 3 == len(pairs) / 2
  (replies,) = here.replies.iterdir()
  before = replies.read_text()
  assert before.count('"kind": "reply"') >= 20
  # Had only the data been lost, they would come back from the replies.
  path.unlink()
  assert written_data.defense_data(here, 'external', None) == pairs
  assert replies.read_text() == before


def test_an_endpoint_that_is_down_is_found_before_anything_is_made(
  tree, tmp_path
):
  tree.threat_model.generator = 'endpoint:http://127.0.0.1:9/v1#base'
  tree.threat_model.generation.endpoint.max_retries = 0
  with pytest.raises(endpoint.EndpointError, match='cannot be reached'):
    experiment.run(tree, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
