"""Reading whole, torn and odd files."""

import json
import shutil

import pytest

from fedjax_safety import metrics, report
from fedjax_safety.report import _details, _read


def edit_header(path, **kwargs):
  """Changes fields of an evaluation's header."""
  first, *rest = path.read_text().splitlines()
  header = json.loads(first) | kwargs
  path.write_text('\n'.join([json.dumps(header), *rest]) + '\n')


def evaluation(workdir, arm='mean', stage='federated', seed=0):
  """Returns the path of an evaluation."""
  folder = workdir / 'runs' / arm / f'seed_{seed}' / 'evaluations'
  return folder / f'{stage}.jsonl'


def test_rows_come_in_the_order_of_their_headers(workdir):
  run = _read.load(workdir)
  assert [row.label for row in run.rows] == [
    'no attack',
    'attacked, plain averaging',
    'attacked, krum',
    'attacked, median',
    'repaired, public data',
    'repaired, its own data',
  ]
  assert run.missing == []
  assert run.name == 'my_run'
  assert run.believe == 'truth'
  assert list(run.judges) == ['rule', 'judge', 'truth']


def test_every_seed_is_in_its_row(three_seeds):
  run = _read.load(three_seeds)
  assert all(list(row.records) == [0, 1, 2] for row in run.rows)


def test_a_torn_last_answer_is_left_out_and_named(workdir):
  path = evaluation(workdir)
  whole = len(_read.load(workdir).rows[1].records[0])
  path.write_bytes(path.read_bytes()[:-9])
  run = _read.load(workdir)
  assert len(run.rows[1].records[0]) == whole - 1
  assert run.missing == [
    'mean/seed_0/evaluations/federated.jsonl: the last line was torn and is '
    'left out'
  ]


def test_unreadable_lines_are_counted(workdir):
  path = workdir / 'metrics.jsonl'
  path.write_text('not json\n[1]\n' + path.read_text())
  run = _read.load(workdir)
  assert run.missing == ['metrics.jsonl: 2 unreadable lines left out']
  assert len(run.of_kind('round')) == 24


@pytest.mark.parametrize('content', ['', '{"kind": "record"}\n', '{"kind"'])
def test_an_evaluation_without_a_header_is_left_out_and_named(workdir, content):
  evaluation(workdir).write_text(content)
  run = _read.load(workdir)
  assert len(run.rows) == 5
  assert any('no header line' in line for line in run.missing)


def test_a_header_alone_is_a_row_without_answers(workdir):
  path = evaluation(workdir)
  path.write_text(path.read_text().splitlines()[0] + '\n')
  run = _read.load(workdir)
  assert run.rows[1].records == {0: []}
  assert any('no answers' in line for line in run.missing)


def test_a_resumed_round_is_read_once(workdir):
  path = workdir / 'metrics.jsonl'
  again = json.loads(path.read_text().splitlines()[0]) | {'client/loss': 9.0}
  path.write_text(path.read_text() + json.dumps(again) + '\n')
  rounds = _read.load(workdir).of_kind('round')
  assert len(rounds) == 24
  assert rounds[0]['client/loss'] == 9.0


def test_labels_that_repeat_are_told_apart(workdir):
  edit_header(evaluation(workdir), label='no attack')
  labels = [row.label for row in _read.load(workdir).rows]
  assert labels[:2] == [
    'no attack (no_attack, federated)',
    'no attack (mean, federated)',
  ]


def test_headers_that_disagree_on_whom_to_believe_are_named(workdir):
  edit_header(evaluation(workdir), believe='rule', believe_reason='why not.')
  run = _read.load(workdir)
  assert run.believe == 'truth'
  assert any('rule' in line and 'truth' in line for line in run.missing)


def test_an_arm_known_from_its_metrics_alone_is_missing(workdir):
  shutil.rmtree(workdir / 'runs' / 'krum')
  assert _read.load(workdir).missing == ['arm krum, seed 0: not evaluated yet']


def test_equal_audits_are_merged_with_where_they_hold(three_seeds):
  run = _read.load(three_seeds)
  assert len(run.overlaps) == 1
  assert len(run.overlaps[0]['where']) == 12


@pytest.mark.parametrize('content', ['{', '{}', '3'])
def test_an_audit_that_is_no_list_is_named(workdir, content):
  (workdir / 'runs' / 'mean' / 'seed_0' / 'audit.json').write_text(content)
  missing = _read.load(workdir).missing
  assert len(missing) == 1
  assert 'audit.json of arm mean, seed 0' in missing[0]


def test_manifests_of_repairs_are_read(workdir):
  folder = workdir / 'runs' / 'mean' / 'seed_0' / 'repair' / 'public'
  folder.mkdir(parents=True)
  (folder / 'manifest.json').write_text('{"num_examples": 40}')
  run = _read.load(workdir)
  assert run.manifests == [('mean/seed_0/repair/public', {'num_examples': 40})]


def test_what_filters_dropped_of_written_data_is_shown(workdir):
  account = {'requests': 9, 'kept': 6, 'dropped': {'distinct': 3}}
  account['would_drop'] = {'refusal': 2}
  (workdir / 'synthesis').mkdir()
  (workdir / 'synthesis' / 'attack-1.manifest.json').write_text(
    json.dumps({'filters': {'unaligned': account, 'odd': 3}})
  )
  table = _details.filter_table(_read.load(workdir))
  assert table.header[3:] == ('distinct', 'refusal')
  ((label, boxes),) = table.rows
  assert label == 'attack-1: unaligned'
  assert [box.text for box in boxes] == ['9', '6', '3', '—']
  assert boxes[-1].note == 'not applied: would drop 2'
  page = report.build(workdir)
  for path in (page['html'], page['markdown']):
    assert 'What was kept of the written data?' in path.read_text()


def test_a_loss_that_diverged_is_named(workdir):
  path = workdir / 'metrics.jsonl'
  with metrics.MetricsWriter(path) as writer:
    for number in (6, 7):
      writer.write(
        {
          'kind': 'round',
          'arm': 'mean',
          'seed': 0,
          'round': number,
          'client/loss': float('nan'),
        }
      )
  run = _read.load(workdir)
  assert run.missing == ['client/loss of arm mean was not finite in 2 records']
