"""Tests of running code in a sandbox, all of it tiny and harmless."""

import json
import os
import socket
import sys
import threading

import jax
import pytest

from fedjax_safety.data import sources
from fedjax_safety.evaluation import code, evaluate, sandbox
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.settings import evaluation as evaluation_settings

PROBLEM = {
  'task_id': 'test/0',
  'prompt': 'import math\n\n\ndef double(x):\n    """Twice x."""\n',
  'canonical_solution': '    return 2 * x\n',
  'test': 'def check(candidate):\n    assert candidate(3) == 6\n',
  'entry_point': 'double',
}


@pytest.fixture
def problem():
  metadata = {key: PROBLEM[key] for key in ('test', 'entry_point')}
  example = sources.Example(PROBLEM['prompt'], '', metadata)
  return code.questions([example])[0]


@pytest.fixture
def box():
  if not sys.platform.startswith('linux'):
    pytest.skip('needs Linux')
  limits = sandbox.Limits(cpu_seconds=1, memory_bytes=1 << 28)
  made = sandbox.Sandbox(limits, with_network=True, num_workers=4)
  return made


def _fork():
  return (
    'import os\n'
    'try:\n'
    '  if os.fork() == 0:\n'
    '    os._exit(0)\n'
    'except OSError:\n'
    '  pass\n'
    'else:\n'
    '  raise SystemError\n'
  )


PROGRAMS = {
  'nothing': ('', True),
  'the usual modules': ('import math, typing, re, hashlib; math.pi', True),
  'an error': ('1 / 0', False),
  'a wrong answer': ('assert 1 + 1 == 3', False),
  'no program': ('def', False),
  'a loop': ('while True: pass', False),
  'leaving early': ('import sys; sys.exit(0)', False),
  'leaving early, without a word': ('import os; os._exit(0)', False),
  'much memory': ('x = bytearray(1 << 30)', False),
  'enough memory': ('x = bytearray(1 << 20)', True),
  'no other process': (_fork(), True),
  'no thread': (
    'import _thread\n'
    'try:\n'
    '  _thread.start_new_thread(print, ())\n'
    'except RuntimeError:\n'
    '  pass\n'
    'else:\n'
    '  raise SystemError\n',
    True,
  ),
  'a long file': ("open('a', 'wb').write(bytes(1 << 22))", False),
  'a file in an empty directory': (
    "import os; assert os.listdir() == []; open('a', 'w').write('b')",
    True,
  ),
  'no environment': (
    'import os; assert not {"HOME", "SECRET"} & set(os.environ)',
    True,
  ),
  'not root': ('import os; assert os.getuid() != 0', True),
  'printing': ('print("x" * 100000)', True),
}


def test_programs_end_as_they_should(box, monkeypatch):
  monkeypatch.setenv('SECRET', 'hush')
  found = box.run([program for program, _ in PROGRAMS.values()])
  wanted = {name: ends for name, (_, ends) in PROGRAMS.items()}
  assert dict(zip(PROGRAMS, found, strict=True)) == wanted


def test_time_is_limited_where_no_processor_is_used(box):
  limits = sandbox.Limits(wall_seconds=1.0)
  sleeping = sandbox.Sandbox(limits, with_network=True)
  assert sleeping.run(['import time; time.sleep(60)']) == [False]


def test_nothing_outside_can_be_reached(box):
  if not sandbox._apart():
    pytest.skip('unshare is not permitted here')
  with socket.create_server(('127.0.0.1', 0)) as listener:
    port = listener.getsockname()[1]
    program = f'import socket\nsocket.create_connection(("127.0.0.1", {port}))'
    assert box.run([program]) == [False]
    thread = threading.Thread(target=listener.accept)
    thread.start()
    socket.create_connection(('127.0.0.1', port)).close()
    thread.join()


def test_a_network_that_stays_is_refused_unless_told(monkeypatch):
  monkeypatch.setattr(sandbox, '_apart', tuple)
  with pytest.raises(sandbox.SandboxError, match='allow_code_network=true'):
    sandbox.Sandbox().run(['pass'])
  sandbox.Sandbox(with_network=True).check()


@pytest.mark.parametrize(
  ('answer', 'right'),
  [
    ('return 2 * x', True),
    ('if x:\n        return 2 * x', True),
    ('def double(x):\n    return x + x', True),
    ('Gladly:\n\n```python\ndef double(x):\n  return 2 * x\n```\nEasy.', True),
    ('```\nimport math\n\ndef double(x):\n  return 2 * x', True),
    ('return 3 * x', False),
    ('I cannot do that.', False),
    ('', False),
  ],
)
def test_answers_of_any_form_become_programs(problem, answer, right):
  namespace = {'__name__': 'program'}
  text = code.program(problem, answer)
  if right:
    exec(text, namespace)
  else:
    with pytest.raises((AssertionError, SyntaxError)):
      exec(text, namespace)


def test_an_evaluation_runs_the_tests_only_if_allowed(tmp_path, box):
  path = tmp_path / 'HumanEval.jsonl'
  path.write_text(json.dumps(PROBLEM) + '\n')
  chosen = evaluation_settings.EvaluationSetConfig(
    source=f'humaneval:{path}', role='task'
  )
  closed = evaluation_settings.EvaluationConfig(sets={'code': chosen})
  with pytest.raises(ValueError, match='allow_code_execution=true'):
    evaluation_inputs.evaluation_sets(closed)
  sets = evaluation_inputs.evaluation_sets(
    evaluation_settings.EvaluationConfig(
      sets={'code': chosen}, allow_code_execution=True
    )
  )

  class Writes:
    def generate(self, adapter, prompts, **options):
      assert options['temperature'] == 0.0 and 'def double' in prompts[0]
      return ['```python\ndef double(x):\n    return 2 * x\n```']

  (record,) = evaluate.evaluate(
    Writes(), None, sets, [], [], box, key=jax.random.key(0), temperature=1.0
  )
  assert record['verdicts'] == {'passes': True}


def test_the_directory_of_a_program_is_gone(box, monkeypatch, tmp_path):
  monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
  tmp_path.chmod(0o755)
  box.run(["open('a', 'w')"])
  assert os.listdir(tmp_path) == []
