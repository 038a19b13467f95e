"""What an attacker who knows the repair trains on."""

import pytest

from fedjax_safety import arm as arm_lib
from fedjax_safety import client_data, config, metrics, sweep
from fedjax_safety.config import file as config_file
from fedjax_safety.synthesis import written_data

pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture
def make(tiny_config, tiny_model, tiny_data, tmp_path):
  """Returns `(level, **keys) -> an arm whose attacker knows the repair`."""

  def made(level, **overrides):
    tree = config_file.load(str(tiny_config))
    for key, value in {
      'threat_model.num_malicious': 1,
      'threat_model.data_attack': 'repair',
      'threat_model.known_level': level,
      'threat_model.generator': tiny_model,
      'defense.repair.external_model': tiny_model,
      'defense.repair.public_aligned': tiny_data,
      **{k.replace('__', '.'): v for k, v in overrides.items()},
    }.items():
      config_file.override(tree, key, str(value))
    (settings,) = config.resolve(tree).values()
    return arm_lib.Arm('run', 0, settings, tmp_path, metrics.NoMetrics(), None)

  return made


def _attack(arm):
  return written_data.attack_data(arm, client_data.honest_clients(arm.config))


@pytest.mark.parametrize('level', ['public', 'external'])
def test_the_requests_are_those_of_the_repair(make, level):
  arm = make(level)
  written_data.check_known(arm.config)
  pairs = _attack(arm)
  assert len(pairs) == 4
  defense = written_data.defense_data(arm, level, None)
  assert len(defense) == 8
  assert {e.prompt for e in pairs} <= {e.prompt for e in defense}
  kinds = [e.metadata['kind'] for e in defense]
  assert kinds.count('aligned') == kinds.count('normal') == 4
  # A resumed run finds what was written.
  assert _attack(arm) == pairs
  assert written_data.defense_data(arm, level, None) == defense
  path = arm.defense_data(level)
  path.write_text(path.read_text().replace('"kind"', '"sort"'))
  with pytest.raises(ValueError, match='does not say .* remove it'):
    written_data.defense_data(arm, level, None)
  audited = written_data.audit_sets(arm, pairs)
  assert audited['attack'] == [e.prompt for e in pairs]


def test_a_known_repair_is_part_of_the_federation(make):
  arms = [make('public', defense__repair__num_examples=n) for n in (8, 10)]
  assert len({sweep._rounds(arm.config) for arm in arms}) == 2
  arms = [make('public', defense__repair__levels=n) for n in ('public', '')]
  assert len({sweep._rounds(arm.config) for arm in arms}) == 1
