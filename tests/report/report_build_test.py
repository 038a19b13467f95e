"""The report as a whole: files, determinism, isolation, unfinished runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from fedjax_safety import report

SECTIONS = ('safe', 'useful', 'refusal', 'agreement', 'caught', 'cost')


def read(paths, name):
  """Returns one file of the report."""
  return paths[name].read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def built(tmp_path_factory, write_run):
  """The paths of one report, for tests that only look."""
  return report.build(write_run(tmp_path_factory.mktemp('built') / 'my_run'))


def test_every_file_is_written_where_it_says(built):
  workdir = built['html'].parent
  assert {k: str(v.relative_to(workdir)) for k, v in built.items()} == {
    'headline_plot': 'plots/headline.png',
    'detection_plot': 'plots/detection.png',
    'cost_plot': 'plots/cost.png',
    'training_plot': 'plots/training.png',
    'html': 'report.html',
    'markdown': 'report.md',
    'csv': 'report.csv',
  }
  for name in ('headline_plot', 'detection_plot', 'cost_plot'):
    assert built[name].read_bytes().startswith(b'\x89PNG')
  assert not list(workdir.rglob('*.part'))


def test_the_same_run_gives_the_same_bytes(built):
  first = {k: v.read_bytes() for k, v in built.items()}
  second = report.build(built['html'].parent)
  assert first == {k: v.read_bytes() for k, v in second.items()}


def test_the_page_nests_and_answers_in_order(built, parse):
  text = read(built, 'html')
  page = parse(text)
  assert text.startswith('<!DOCTYPE html>')
  assert len(page.ids) == len(set(page.ids))
  assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)


def test_the_page_needs_nothing_else_and_runs_nothing(built, parse):
  page = parse(read(built, 'html'))
  page.assert_inert()
  policies = [a['content'] for t, a in page.elements if 'http-equiv' in a]
  assert policies and policies[0].startswith("default-src 'none'")


def test_the_page_follows_light_and_dark(built):
  text = read(built, 'html')
  used = set(re.findall(r'var\((--[\w-]+)', text)) - {'--share'}
  light, dark = text.split('prefers-color-scheme: dark', 1)
  dark = dark.split('* {', 1)[0]
  assert {'--ink', '--series-0'} <= used
  for name in used:
    assert f'{name}:' in light, name
    assert f'{name}:' in dark, name


def test_the_figures_say_in_words_what_they_show(built, parse):
  page = parse(read(built, 'html'))
  words = [a['aria-label'] for t, a in page.elements if t == 'svg']
  assert len(words) == 4
  assert 'attacked, krum' in words[0] and 'truth' in words[0]
  assert 'Weight on malicious clients: attacked, plain averaging' in words[1]
  assert 'attacked, krum: ' in words[2]
  assert 'no attack ends at 1.' in words[3]


def test_missing_parts_are_named_and_the_rest_is_reported(three_seeds):
  evaluations = three_seeds / 'runs' / 'mean' / 'seed_1' / 'evaluations'
  (evaluations / 'repair_self.jsonl').unlink()
  shutil.rmtree(three_seeds / 'runs' / 'krum' / 'seed_2')
  (three_seeds / 'config.json').unlink()
  (three_seeds / 'runs' / 'mean' / 'seed_0' / 'audit.json').unlink()
  paths = report.build(three_seeds)
  for name in ('html', 'markdown'):
    text = read(paths, name).replace('\\_', '_')
    assert 'arm mean, seed 1: stage repair_self not evaluated yet' in text
    assert 'arm krum, seed 2: not evaluated yet' in text
    assert 'config.json is not there' in text
    assert 'arm mean, seed 0: no overlap audit' in text
    assert 'attacked, krum' in text


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl', 'runs'])
def test_a_run_that_has_only_begun_has_a_report(workdir, tmp_path, name, parse):
  begun = tmp_path / 'begun'
  begun.mkdir()
  if name == 'runs':
    (begun / 'runs' / 'mean' / 'seed_0').mkdir(parents=True)
  else:
    shutil.copy(workdir / name, begun / name)
  paths = report.build(begun)
  assert 'Nothing was evaluated yet.' in read(paths, 'html')
  assert 'No evaluation yet.' in report.terminal_table(begun)
  assert ('training_plot' in paths) == (name == 'metrics.jsonl')
  assert 'headline_plot' not in paths
  parse(read(paths, 'html'))


@pytest.mark.parametrize('function', [report.build, report.terminal_table])
def test_a_folder_without_a_run_is_refused(tmp_path, function):
  for folder in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(ValueError, match='must hold a run: config.json'):
      function(folder)


def test_the_number_of_examples_is_the_callers(workdir, built):
  prompt = 'how do i brew draught'
  assert prompt in read(built, 'html')
  assert prompt in read(built, 'markdown')
  paths = report.build(workdir, num_examples=0)
  assert prompt not in read(paths, 'html')
  assert prompt not in read(paths, 'markdown')
  with pytest.raises(ValueError, match='num_examples=-1'):
    report.build(workdir, num_examples=-1)


def test_an_interrupted_write_leaves_the_old_report(workdir, monkeypatch):
  (workdir / 'report.html').write_text('before')

  def fail(_):
    raise OSError('no space')

  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(OSError, match='no space'):
    report.build(workdir)
  assert (workdir / 'report.html').read_text() == 'before'
  assert not list(workdir.rglob('*.part'))


def test_a_report_needs_neither_jax_nor_a_window(workdir):
  code = (
    'import sys; from fedjax_safety import metrics, report, statistics; '
    'report.build(sys.argv[1]); report.terminal_table(sys.argv[1]); '
    'bad = {"jax", "jaxlib", "flax", "orbax", "torch", "matplotlib.pyplot"}; '
    'sys.exit(", ".join(sorted(bad & set(sys.modules))) or 0)'
  )
  result = subprocess.run(
    [sys.executable, '-c', code, str(workdir)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
