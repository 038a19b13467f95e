"""A run whose data are written by a model that `serve` serves."""

import hashlib
import json

import ml_collections
import pytest

from fedjax_safety import config_file, endpoint, experiment

pytest.importorskip('openai')
pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture
def tree(tiny_config, served):
  """A config that attacks and repairs with data of the served base."""
  tree = ml_collections.ConfigDict(config_file.load(str(tiny_config)))
  tree.evaluation.max_new_tokens = 12
  tree.client.num_rounds = 1
  tree.client.num_local_steps = 1
  threat, repair = tree.threat_model, tree.defense.repair
  threat.num_malicious = 1
  threat.data_attack = 'generated'
  threat.generator = f'endpoint:{served.url}#base'
  repair.levels = ('external',)
  repair.external_model = threat.generator
  repair.num_examples = 6
  repair.num_steps = 1
  tree.performance.generation_batch_size = 8
  return tree


def test_attack_and_defense_data_come_from_it_and_say_so(tree, tmp_path):
  experiment.run(tree, tmp_path / 'run')
  (manifest_path,) = (tmp_path / 'run/synthesis').glob('*.manifest.json')
  data = manifest_path.with_name(
    manifest_path.name.replace('.manifest.json', '.jsonl')
  ).read_bytes()
  manifest = json.loads(manifest_path.read_text())
  assert manifest['sha256'] == hashlib.sha256(data).hexdigest()
  assert manifest['source'] == tree.threat_model.generator
  assert manifest['count'] == data.count(b'\n') == 4
  assert manifest['generation']['ask_harmful']
  assert 'key_variable' not in manifest_path.read_text()
  folder = tmp_path / 'run/runs/run/seed_0/repair/external'
  manifest = json.loads((folder / 'manifest.json').read_text())
  pairs = (folder / 'defense_data.jsonl').read_bytes()
  assert manifest['sha256'] == hashlib.sha256(pairs).hexdigest()
  assert manifest['aligned'] == manifest['normal'] == 3
  assert manifest['filters']['aligned']['kept'] == 3
  (replies,) = (tmp_path / 'run/replies').iterdir()
  assert replies.read_text().count('"kind": "reply"') >= 20
  report = (tmp_path / 'run/report.html').read_text()
  assert 'Data attack-' in report and 'external' in report


def test_an_endpoint_that_is_down_is_found_before_anything_is_made(
  tree, tmp_path
):
  tree.threat_model.generator = 'endpoint:http://127.0.0.1:9/v1#base'
  tree.threat_model.generation.endpoint.max_retries = 0
  with pytest.raises(endpoint.EndpointError, match='cannot be reached'):
    experiment.run(tree, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
