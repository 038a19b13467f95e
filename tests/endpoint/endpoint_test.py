"""Tests of models behind an endpoint, against servers on this machine."""

import dataclasses
import json
import socket

import jax
import pytest

from fedjax_safety import endpoint, interrupt, settings, synthesis
from fedjax_safety.endpoint import replies
from fedjax_safety.settings import endpoint as endpoint_settings

pytest.importorskip('openai')
SETTING = 'threat_model.generator'
KEY = jax.random.key(0)


def _config(**changes):
  quick = {'timeout': 60.0, 'max_retries': 1, 'concurrency': 3}
  return endpoint_settings.EndpointConfig(**(quick | changes))


def _endpoint(name, **changes):
  return endpoint.Endpoint(name, SETTING, _config(**changes))


def _sampler(name, directory=None, **changes):
  return replies.EndpointSampler(_endpoint(name, **changes), directory, 16)


def _prompt(body):
  return body['messages'][0]['content']


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('endpoint:127.0.0.1:8000/v1#base', 'must read endpoint:URL#MODEL'),
    ('endpoint:http://127.0.0.1:8000/v1', 'must read endpoint:URL#MODEL'),
    ('endpoint:http://127.0.0.1:port/v1#a', 'must read endpoint:URL#MODEL'),
    ('endpoint:http://me:secret@127.0.0.1/v1#a', 'without user'),
    ('endpoint:http://127.0.0.1/v1?key=secret#a', 'without user'),
  ],
)
def test_a_name_is_an_address_and_a_model_and_no_more(name, words):
  with pytest.raises(ValueError, match=words) as error:
    endpoint.check_settings(name, SETTING, _config(), 'here')
  assert SETTING in str(error.value) and 'secret' not in str(error.value)


def test_a_model_s_name_may_hold_slashes():
  name = 'endpoint:http://127.0.0.1:8000/v1/#attacked/seed_0/federated'
  assert endpoint.split(name, SETTING) == (
    'http://127.0.0.1:8000/v1',
    'attacked/seed_0/federated',
  )


def test_settings_out_of_range_and_a_key_instead_of_its_name_are_told():
  for changes, words in (
    ({'timeout': 0.0}, 'timeout=0.0 must be greater'),
    ({'max_retries': -1}, 'max_retries=-1'),
    ({'key_variable': 'sk-secret'}, 'not a key'),
  ):
    with pytest.raises(ValueError, match=words) as error:
      endpoint.check_settings('', SETTING, _config(**changes), 'x')
    assert 'secret' not in str(error.value)


def test_the_key_is_sent_from_its_variable_and_nowhere_shown(
  chat_server, monkeypatch, tmp_path
):
  server = chat_server(lambda body: 'yes')
  monkeypatch.setenv('MY_KEY', 'hush')
  monkeypatch.setenv('OPENAI_API_KEY', 'of another service')
  _sampler(server.name, tmp_path, key_variable='MY_KEY').generate(
    None, ['a'], key=KEY
  )
  _endpoint(server.name).check()
  assert server.keys == ['Bearer hush', 'Bearer none']
  (log,) = tmp_path.iterdir()
  assert 'hush' not in log.read_text()
  with pytest.raises(endpoint.EndpointError, match='UNSET_KEY.*is not set'):
    _endpoint(server.name, key_variable='UNSET_KEY')


def test_parameters_change_and_leave_out_fields(chat_server):
  server = chat_server(lambda body: 'yes')
  parameters = {'max_tokens': None, 'max_completion_tokens': 7}
  _endpoint(server.name, parameters=parameters).check()
  (body,) = server.bodies
  assert body['max_completion_tokens'] == 7 and 'max_tokens' not in body
  assert body['model'] == 'scripted'


def test_each_prompt_has_its_own_seed_and_equal_questions_are_asked_once(
  chat_server, tmp_path
):
  server = chat_server(lambda body: f'{_prompt(body)} {body.get("seed")}')
  sampler = _sampler(server.name, tmp_path)
  drawn = sampler.generate(None, ['a'] * 4, key=KEY, temperature=0.7)
  assert len(set(drawn)) == 4
  greedy = sampler.generate(None, ['a', 'b', 'a'], key=KEY)
  assert greedy == ['a None', 'b None', 'a None']
  assert len(server.bodies) == 6
  again = _sampler(server.name, tmp_path)
  assert again.generate(None, ['a'] * 4, key=KEY, temperature=0.7) == drawn
  assert len(server.bodies) == 6


def test_what_was_answered_before_a_failure_is_not_asked_again(
  chat_server, tmp_path
):
  server = chat_server(
    lambda body: 500 if _prompt(body) == 'p20' else _prompt(body)[::-1]
  )
  prompts = [f'p{i:02}' for i in range(24)]
  sampler = _sampler(server.name, tmp_path, max_retries=0, concurrency=2)
  with pytest.raises(endpoint.EndpointError) as error:
    sampler.generate(None, prompts, key=KEY)
  kept = sampler.path.read_text().count('\n')
  assert kept >= 19 and f'its {kept} replies so far are kept' in str(
    error.value
  )
  # A machine that stopped in the middle of a line loses that one alone.
  with sampler.path.open('a') as log:
    log.write('{"kind": "rep')
  server.answer, server.bodies = (lambda body: _prompt(body)[::-1]), []
  again = _sampler(server.name, tmp_path)
  assert again.generate(None, prompts, key=KEY) == [p[::-1] for p in prompts]
  assert len(server.bodies) == len(prompts) - kept


def test_what_is_stopped_in_between_goes_on_from_there(chat_server, tmp_path):
  server = chat_server(lambda body: 'yes')

  def stop():
    raise interrupt.Interrupted

  sampler = _sampler(server.name, tmp_path, concurrency=1)
  sampler = dataclasses.replace(sampler, between=stop)
  prompts = [str(i) for i in range(20)]
  with pytest.raises(interrupt.Interrupted):
    sampler.generate(None, prompts, key=KEY)
  assert 0 < len(server.bodies) < len(prompts)
  _sampler(server.name, tmp_path).generate(None, prompts, key=KEY)
  assert len(server.bodies) == len(prompts)


def test_what_is_empty_is_asked_again_and_odd_text_can_be_written(
  chat_server, tmp_path
):
  odd = b'{"choices": [{"message": {"content": "a \\ud800 b"}}]}'
  server = chat_server(lambda body: '' if _prompt(body) == 'a' else odd)
  for _ in range(2):
    found = _sampler(server.name, tmp_path).generate(None, ['a', 'b'], key=KEY)
    assert found == ['', 'a ? b']
  assert [_prompt(body) for body in server.bodies].count('a') == 2
  assert len(server.bodies) == 3


def test_what_may_pass_is_tried_again(chat_server):
  answers = iter([503, b'<html>', 'there'])
  server = chat_server(lambda body: next(answers))
  assert _sampler(server.name).generate(None, ['a'], key=KEY) == ['there']


@pytest.mark.parametrize(
  ('answer', 'words'),
  [
    (b'<html>oops</html>', "is not JSON .it reads '<html>oops"),
    (b'{"choices": []}', r'no choices\[0\].message.content'),
    (b'[1, 2]', r'no choices\[0\].message.content'),
    (b'{"choices": [{"message": {"content": 3}}]}', 'is no text'),
    ('', 'empty text; check the model'),
    (401, 'HTTP 401: no .31m luck; name the environment variable'),
    (404, "HTTP 404.*check the address and the model 'scripted'"),
    (400, 'HTTP 400.*endpoint.parameters'),
    (429, 'HTTP 429.*lower the concurrency'),
  ],
)
def test_nonsense_is_told_in_a_sentence_with_the_address(
  chat_server, answer, words
):
  server = chat_server(lambda body: answer)
  sampler = _sampler(server.name, max_retries=0)
  with pytest.raises(endpoint.EndpointError, match=words) as error:
    sampler.generate(None, ['a', 'b'], key=KEY)
  assert server.url in str(error.value)
  assert str(error.value).isprintable()


def test_a_slow_endpoint_is_told(chat_server):
  server = chat_server(lambda body: (1, 'late'))
  slow = _endpoint(server.name, max_retries=0, timeout=0.2)
  words = r'did not answer within 0.2 s, asked 1 times; raise the timeout'
  with pytest.raises(endpoint.EndpointError, match=words):
    slow.check()


def test_an_endpoint_that_is_down_is_told():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    url = f'http://127.0.0.1:{taken.getsockname()[1]}/v1'
  with pytest.raises(endpoint.EndpointError, match='cannot be reached') as info:
    _endpoint(f'endpoint:{url}#a', max_retries=0).check()
  assert url in str(info.value) and 'start the server' in str(info.value)


def test_a_pipeline_writes_with_it(chat_server, tmp_path):
  counter = iter(range(1000))
  server = chat_server(
    lambda body: (
      '\n'.join(f'{i}. request {next(counter)}' for i in range(5))
      if _prompt(body) == 'ask'
      else json.dumps(_prompt(body))
    )
  )
  writer = synthesis.Writer(
    _sampler(server.name, tmp_path),
    None,
    settings.GenerationConfig(ask_harmful='ask', direct_hint='now'),
  )
  pairs = writer.unaligned(12, key=KEY).pairs
  assert len({p.prompt for p in pairs}) == 12
  assert all(p.response == f'"{p.prompt} now"' for p in pairs)
