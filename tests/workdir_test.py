"""What a work directory accepts, and that its files are whole or absent."""

import errno
import fcntl
import json
import pathlib

import pytest

from fedjax_safety import config, workdir


@pytest.fixture
def settings():
  return config.default()


@pytest.fixture
def claimed(tmp_path, settings):
  folder = tmp_path / 'new' / 'run'
  workdir.check(folder, settings)
  workdir.claim(folder, settings)
  return folder


def test_a_new_directory_is_claimed_by_its_config(claimed, settings):
  assert workdir.read_config(claimed) == config.to_json(settings)
  workdir.check(claimed, settings)


def test_the_same_config_leaves_the_file_alone(claimed, settings):
  before = (claimed / 'config.json').stat().st_mtime_ns
  workdir.claim(claimed, settings)
  assert (claimed / 'config.json').stat().st_mtime_ns == before


def test_another_config_is_refused_by_key_unless_allowed(claimed, settings):
  settings.client.num_rounds += 1
  with pytest.raises(ValueError, match=r'client\.num_rounds.*--workdir'):
    workdir.check(claimed, settings)
  workdir.check(claimed, settings, allow_config_change=True)
  workdir.claim(claimed, settings)
  workdir.check(claimed, settings)


def test_many_differences_are_counted(claimed, settings):
  for group in (settings.client, settings.evaluation):
    for key in group:
      group[key] = None
  with pytest.raises(ValueError, match=r'and \d+ more\)'):
    workdir.check(claimed, settings)


def test_a_directory_with_other_files_is_refused(tmp_path, settings):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(ValueError, match='not empty and holds no run'):
    workdir.check(tmp_path, settings)


@pytest.mark.parametrize('below', ['', 'deeper/still'])
def test_a_file_is_refused(tmp_path, settings, below):
  path = tmp_path / 'file'
  path.write_text('x')
  with pytest.raises(ValueError, match='is a file'):
    workdir.check(path / below, settings)


def test_an_unwritable_directory_is_refused(tmp_path, settings, monkeypatch):
  # The superuser may write anywhere, so permissions would prove nothing.
  monkeypatch.setattr(workdir.os, 'access', lambda *_: False)
  with pytest.raises(ValueError, match='is not writable'):
    workdir.check(tmp_path / 'run', settings)


@pytest.mark.parametrize(
  ('text', 'words'), [(None, 'holds no run'), ('{', 'not valid JSON')]
)
def test_what_is_no_run_is_named(tmp_path, text, words):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=words):
    workdir.read_config(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'rows.jsonl'
  workdir.write_lines(path, [{'a': 1}])

  def rows():
    yield {'a': 2}
    raise OSError('no space')

  with pytest.raises(OSError, match='no space'):
    workdir.write_lines(path, rows())
  assert path.read_text() == '{"a": 1}\n'


def test_a_write_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'value.json'
  workdir.write_json(path, 1)

  def full(*_):
    raise OSError('no space')

  monkeypatch.setattr(workdir.os, 'fsync', full)
  with pytest.raises(OSError, match='no space'):
    workdir.write_json(path, 2)
  assert json.loads(path.read_text()) == 1


def test_each_arm_and_seed_has_its_directory():
  found = {
    workdir.arm_directory(pathlib.Path('w'), arm, seed)
    for arm in ('clean', 'attacked')
    for seed in (0, 1)
  }
  assert len(found) == 4


def test_a_lock_is_taken_once_and_given_back(tmp_path):
  with workdir.lock(tmp_path, 'a') as first:
    with workdir.lock(tmp_path, 'a') as second:
      with workdir.lock(tmp_path, 'b') as other:
        assert (first, second, other) == (True, False, True)
  with workdir.lock(tmp_path, 'a') as again:
    assert again


def test_without_locks_on_the_file_system_all_are_free(tmp_path, monkeypatch):
  def refuse(*unused):
    raise OSError(errno.ENOLCK, 'no locks')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with workdir.lock(tmp_path, 'a') as is_free:
    assert is_free


def test_a_file_that_another_process_is_making_is_no_other_file(
  tmp_path, settings
):
  (tmp_path / '.config.json.1.part').write_text('{')
  workdir.check(tmp_path, settings)
