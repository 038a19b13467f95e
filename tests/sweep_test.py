"""A table of arms: what is run, skipped, shared, resumed and refused."""

import collections
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest

from fedjax_safety import (
  config,
  experiment,
  federation,
  interrupt,
  main,
  metrics,
  stages,
  sweep,
  workdir,
)
from fedjax_safety.config import file as config_file

PAPER = pathlib.Path(__file__).parents[1] / 'configs' / 'paper'
pytestmark = pytest.mark.usefixtures('quick_compiles')

_ROWS = (
  {'row': 'mean', 'arm': 'mean', 'numbers': {'rule': 50.0}},
  {'row': 'repaired', 'arm': 'mean', 'stage': 'repair_public'},
  {'row': 'longer', 'arm': 'longer', 'stage': 'repair_public'},
)
_LEVELS = {'levels': ['public'], 'num_steps': 2}
_ARMS = (
  {'name': 'mean', 'defense': {'repair': _LEVELS}},
  {'name': 'longer', 'defense': {'repair': {**_LEVELS, 'num_steps': 3}}},
)


@pytest.fixture
def tree(tiny_config):
  """A table of two arms that differ in their repair alone."""
  made = runpy.run_path(str(tiny_config))['get_config']()
  made.client.num_rounds = 1
  made.seeds = (0, 1)
  made.arms = _ARMS
  made.paper = {'source': 'a paper, table 1', 'rows': _ROWS}
  return config.to_json(made)


@pytest.fixture
def called(monkeypatch):
  """Returns the (arm, seed) that have been run, and those federated."""
  ran, federated = [], []
  run_arm, federate = experiment.run_arm, federation.federate

  def note_arm(arm):
    ran.append((arm.name, arm.config.seed))
    return run_arm(arm)

  def note_rounds(made, *args, arm, **kwargs):
    federated.append((arm, made.seed))
    return federate(made, *args, arm=arm, **kwargs)

  monkeypatch.setattr(experiment, 'run_arm', note_arm)
  monkeypatch.setattr(federation, 'federate', note_rounds)
  return ran, federated


ALL = [('mean', 0), ('longer', 0), ('mean', 1), ('longer', 1)]


def _adapters(root):
  """Returns the bytes of every adapter, by its path."""
  return {
    str(path.relative_to(root)): path.read_bytes()
    for path in root.glob('runs/*/*/adapters/*/*.safetensors')
  }


class TestSweep:
  def test_stops_resumes_and_then_skips(
    self, tree, called, monkeypatch, tmp_path
  ):
    ran, federated = called
    evaluate = stages.evaluate

    def stop(arm, stage, *args):
      if (arm.name, arm.config.seed, stage) == ('mean', 1, 'repair_public'):
        raise interrupt.Interrupted
      evaluate(arm, stage, *args)

    with monkeypatch.context() as patch:
      patch.setattr(stages, 'evaluate', stop)
      with pytest.raises(interrupt.Interrupted):
        sweep.run(tree, tmp_path / 'run')
    assert ran == ALL[:3]

    ran.clear()
    html, failures = sweep.run(tree, tmp_path / 'run')
    assert (ran, failures) == (ALL[2:], [])
    # Arms of the same rounds share them, whoever ran first, and once.
    assert federated == [('mean', 0), ('mean', 1)]

    ran.clear()
    before = _adapters(tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'plots', ignore_errors=True)
    sweep.run(tree, tmp_path / 'run')
    assert ran == [] and _adapters(tmp_path / 'run') == before
    assert len(before) == 8
    page = html.read_text()
    assert 'Beside the paper' in page and 'a paper, table 1' in page
    assert len((tmp_path / 'run' / 'paper.csv').read_text().splitlines()) > 3

    # What is shared is what the arm would have come to on its own.
    alone = {**tree, 'seeds': [0], 'arms': [_ARMS[1]], 'paper': {}}
    experiment.run(alone, tmp_path / 'alone')
    for name, data in _adapters(tmp_path / 'alone').items():
      assert before[name] == data

  def test_more_seeds_only_run_the_new_ones(self, tree, called, tmp_path):
    tree['arms'] = tree['arms'][:1]
    tree['paper']['rows'] = tree['paper']['rows'][:2]
    sweep.run({**tree, 'seeds': [0]}, tmp_path / 'run')
    called[0].clear()
    with pytest.raises(ValueError, match='another config'):
      sweep.run(tree, tmp_path / 'run')
    sweep.run(tree, tmp_path / 'run', allow_config_change=True)
    assert called[0] == [('mean', 1)]

  def test_one_arm_that_fails_keeps_no_other_from_running(
    self, tiny_config, tree, monkeypatch, tmp_path, capsys
  ):
    repair = stages.repair

    def fails(arm, level, adapter):
      if arm.name == 'mean':
        raise ValueError('the model wrote nonsense')
      return repair(arm, level, adapter)

    monkeypatch.setattr(stages, 'repair', fails)
    monkeypatch.setattr(config_file, 'load', lambda path: tree)
    code = main.run(
      [
        'sweep',
        f'--config={tiny_config}',
        f'--workdir={tmp_path / "run"}',
        '--config.seeds=0',
      ]
    )
    out, err = capsys.readouterr()
    assert code == main.USER_ERROR
    assert '1 of the arms failed' in err
    assert 'mean, seed 0: the model wrote nonsense' in err
    assert '[2/2] longer, seed 0' in err
    # The row that failed is there and empty; the others have their numbers.
    lines = [line for line in out.splitlines() if '[' in line]
    assert [line.split()[0] for line in lines] == ['mean', 'longer']
    assert lines[0].split()[1] == '50.00'
    assert any(line.startswith('repaired') for line in out.splitlines())

  def test_what_another_process_runs_is_left_to_it(
    self, tree, called, tmp_path, capsys
  ):
    root = tmp_path / 'run'
    workdir.claim(root, tree)
    first = sweep._rounds(config.resolve(tree)['mean', 0])
    with workdir.lock(root, first) as is_free:
      assert is_free
      sweep.run(tree, root)
    assert called[0] == ALL[2:]
    assert 'seed 0, longer, seed 0: another process' in capsys.readouterr().err
    sweep.run(tree, root)
    assert called[0] == ALL[2:] + ALL[:2]

  def test_two_processes_share_the_work(self, tiny_config, tmp_path):
    file, root = tmp_path / 'table.py', tmp_path / 'run'
    file.write_text(
      f"""
import runpy
def get_config():
  made = runpy.run_path({str(tiny_config)!r})['get_config']()
  made.client.num_rounds = 1
  made.seeds = (0, 1)
  made.arms = {_ARMS!r}
  made.paper = {{'rows': {_ROWS!r}}}
  return made
"""
    )
    command = [sys.executable, '-m', 'fedjax_safety.main', 'sweep']
    command += [f'--config={file}', f'--workdir={root}']
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    rounds = collections.Counter(
      (record['arm'], record['seed'])
      for record in metrics.read(root / 'metrics.jsonl')
      if record['kind'] == 'round'
    )
    # One of the arms that share a federation has it, once.
    assert sorted(seed for _, seed in rounds) == [0, 1]
    assert set(rounds.values()) == {1}
    assert len(_adapters(root)) == 8
    assert not list(root.rglob('*.part'))

  def test_settings_that_the_device_decides_change_no_rounds(
    self, tree, called, tmp_path
  ):
    tree['performance']['clients_per_chunk'] = 'auto'
    sweep.run({**tree, 'seeds': [0]}, tmp_path / 'run')
    assert called[0] == ALL[:2] and called[1] == [('mean', 0)]

  def test_needs_a_table(self, tree, tmp_path):
    tree['paper'] = {}
    with pytest.raises(ValueError, match='paper.rows is empty'):
      sweep.run(tree, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


class TestPaper:
  @pytest.mark.parametrize(
    ('row', 'words'),
    [
      ({'row': 'x', 'arm': 'meen'}, "did you mean 'mean'"),
      ({'row': 'x', 'arm': 'mean', 'stage': 'repair'}, 'repair_public'),
      ({'row': 'x', 'arm': 'mean', 'numbers': {'rul': 1.0}}, 'rule'),
      ({'row': 'x', 'arm': 'mean', 'numbers': {'rule': 'a'}}, 'type float'),
      ({'row': 'x', 'arm': 'mean', 'against': 'y'}, 'does not have'),
      ({'row': 'mean', 'arm': 'mean'}, 'two have the name'),
      ({'row': 'x', 'arm': 'mean', 'number': {}}, 'unknown config key'),
    ],
  )
  def test_a_row_that_cannot_be_filled_is_refused(self, tree, row, words):
    tree['paper']['rows'].append(row)
    with pytest.raises(ValueError, match=words):
      config.resolve(tree)


class TestConfigs:
  @pytest.mark.parametrize('size', ['', ':demo'])
  @pytest.mark.parametrize(
    'file', sorted(PAPER.glob('[!_]*.py')), ids=lambda path: path.stem
  )
  def test_every_row_of_every_table_resolves(self, file, size):
    made = config_file.load(f'{file}{size}')
    arms = {name for name, _ in config.resolve(made)}
    assert {row['arm'] for row in made['paper']['rows']} == arms
    assert len(made['seeds']) >= 3

  def test_a_table_has_the_numbers_and_rules_of_the_paper(self):
    made = config_file.load(str(PAPER / 'table1.py'))
    rows = {(x['setting'], x['row']): x for x in made['paper']['rows']}
    assert len(rows) == 22
    found = rows['WildChat', 'FedAvg + L3']
    assert found['stage'] == 'repair_self' and found['against'] == 'FedAvg'
    numbers = {'rule': 51.54, 'md_judge': 57.69, 'rm': -1.90, 'mt_1': 4.39}
    assert found['numbers'] == numbers
    arms = config.resolve(made)
    krum = arms['lmsys_krum', 0].defense
    assert krum.aggregator == 'multi_krum'
    # Three of ten clients, of whom three take part in a round.
    assert krum.aggregator_kwargs['num_byzantine'] == 1
    assert arms['lmsys_fedavg_no_attack', 0].threat_model.num_malicious == 0

  @pytest.mark.parametrize('size', ['', ':demo'])
  def test_all_tables_at_once_run_what_each_would_and_once(self, size):
    together = config_file.load(f'{PAPER / "tables.py"}{size}')
    arms = config.resolve(together)
    rows = iter(together['paper']['rows'])
    for number in range(1, 9):
      alone = config_file.load(f'{PAPER}/table{number}.py{size}')
      alone_arms = config.resolve(alone)
      for row in alone['paper']['rows']:
        found = next(rows)
        place = {'setting': f'Table {number}, {row["setting"]}'}
        assert found == {**row, **place, 'arm': found['arm']}
        ours, its = arms[found['arm'], 0], alone_arms[row['arm'], 0]
        assert sweep._rounds(ours) == sweep._rounds(its)
        levels = ('federated', *ours.defense.repair.levels)
        assert row['stage'].removeprefix('repair_') in levels
    assert next(rows, None) is None
    once = [sweep._rounds(made) for (_, seed), made in arms.items() if not seed]
    assert len(once) == len(set(once))

  def test_every_defense_meets_every_attacker(self):
    name = PAPER.parent / 'defenses_x_attackers.py'
    made = config_file.load(str(name))
    rows = made['paper']['rows']
    attackers, defenses = (
      {row[key] for row in rows} for key in ('setting', 'row')
    )
    assert len(rows) == len(attackers) * len(defenses) >= 50
    arms = {arm for arm, _ in config.resolve(made)}
    assert {row['arm'] for row in rows} == arms
    some = config_file.load(f'{name}:mean,external,dnc/none,gap')
    assert [arm['name'] for arm in some['arms']] == [
      'none-mean',
      'none-dnc',
      'gap-mean',
      'gap-dnc',
    ]
    assert some['arms'][0]['defense']['repair']['levels'] == ['external']
    with pytest.raises(ValueError, match="'dmc' is unknown"):
      config_file.load(f'{name}:dmc')

  def test_an_unknown_size_is_refused(self):
    with pytest.raises(ValueError, match="'small' is unknown"):
      config_file.load(f'{PAPER / "table1.py"}:small')

  def test_ways_of_repair_share_the_federation_that_they_repair(self):
    made = config_file.load(str(PAPER.parent / 'repair_beyond.py'))
    arms = {
      arm: settings for (arm, _), settings in config.resolve(made).items()
    }
    assert {row['arm'] for row in made['paper']['rows']} == set(arms)
    attacked = [arms[name] for name in arms if name != 'no_attack']
    assert len({sweep._rounds(settings) for settings in attacked}) == 1
    both = arms['self_all'].defense.repair
    assert both.kl_weight and both.anchor_weight
    assert both.early_stopping.held_out_share
    assert 'agreement' in both.generation.filter
    assert arms['attacked'].defense.repair.kl_weight == 0
