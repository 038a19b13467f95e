"""A model behind a server that speaks OpenAI's chat interface.

A setting names one as `endpoint:URL#MODEL`, such as
`endpoint:http://127.0.0.1:8000/v1#base`. Its key, if it wants one, stays in an
environment variable: it is neither written anywhere nor part of any message.
"""

import dataclasses
import importlib
import json
import os
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from fedjax_safety import _validate
from fedjax_safety.settings import endpoint as endpoint_settings

PREFIX = 'endpoint:'
_FORM = 'endpoint:URL#MODEL, such as endpoint:http://127.0.0.1:8000/v1#base'
_LOOPBACK = ('127.0.0.1', 'localhost', '::1')
# What the client wants where there is no key; servers without one ignore it.
_NO_KEY = 'none'
_LONGEST_QUOTE = 200
_LONGEST_WAIT = 8.0


class EndpointError(ValueError):
  """An endpoint cannot be asked, or its answers cannot be used."""


@dataclasses.dataclass(frozen=True)
class Reply:
  """What came back: the text, and why it ended (stop, length, ...)."""

  text: str
  finish_reason: str


def is_endpoint(name: str) -> bool:
  """Whether a setting names an endpoint and not a directory."""
  return name.startswith(PREFIX)


def split(name: str, setting: str) -> tuple[str, str]:
  """Returns (URL, model) of `endpoint:URL#MODEL`.

  Args:
    name: the value of the setting.
    setting: its key, for messages.

  Raises:
    ValueError: it does not have that form, or holds more than an address.
  """
  url, _, model = name.removeprefix(PREFIX).partition('#')
  try:
    parts = urllib.parse.urlsplit(url)
    whole = parts.scheme in ('http', 'https') and parts.hostname and model
    # Reading the port checks it.
    _ = parts.port
  except ValueError:
    whole = False
  if whole and (parts.username or parts.password or parts.query):
    # It may hold a key, so it is not shown.
    raise ValueError(
      f'{setting} must hold an address alone, without user, password or '
      f'query: put a key into an environment variable and name that in the '
      f'key_variable beside it'
    )
  if not whole:
    raise ValueError(f'{setting}={name!r} must read {_FORM}')
  return url.rstrip('/'), model


def check_settings(
  name: str, setting: str, config: endpoint_settings.EndpointConfig, path: str
) -> None:
  """Raises unless an endpoint is well named and its numbers are in range.

  Args:
    name: a model's name, an endpoint or not.
    setting: the key of the name.
    config: how endpoints are asked there.
    path: the key of `config`.
  """
  if is_endpoint(name):
    split(name, setting)
  _validate.positive(
    **{
      f'{path}.timeout': config.timeout,
      f'{path}.concurrency': config.concurrency,
    }
  )
  _validate.non_negative(**{f'{path}.max_retries': config.max_retries})
  if config.key_variable and not re.fullmatch(r'\w+', config.key_variable):
    # Perhaps the key itself, so it is not shown.
    raise ValueError(
      f'{path}.key_variable must be the name of an environment variable, of '
      f'letters, digits and "_", not a key'
    )


def _openai() -> Any:
  """Returns the client's module, which is slow to load and seldom needed."""
  try:
    return importlib.import_module('openai')
  except ModuleNotFoundError:
    raise EndpointError(
      "an endpoint needs the package openai; pip install 'fedjax_safety"
      "[endpoint]'"
    ) from None


class Endpoint:
  """One model of one server; may be asked by several threads at once.

  Args:
    name: `endpoint:URL#MODEL`.
    setting: the key that names it, for messages.
    config: key, timeout, retries.

  Raises:
    ValueError: the name is malformed, the variable of the key is not set, or
      the package openai is missing. Nothing is sent.
  """

  def __init__(
    self, name: str, setting: str, config: endpoint_settings.EndpointConfig
  ):
    self.url, self.model = split(name, setting)
    self.config, self._setting = config, setting
    self._openai, self._key = _openai(), self._read_key()
    host = urllib.parse.urlsplit(self.url).hostname
    self._client = self._openai.OpenAI(
      base_url=self.url,
      api_key=self._key or _NO_KEY,
      timeout=config.timeout,
      max_retries=config.max_retries,
      # What runs on this machine is not reached through a proxy.
      http_client=self._openai.DefaultHttpxClient(
        trust_env=host not in _LOOPBACK
      ),
    )

  def _read_key(self) -> str:
    """Returns the key from its variable, '' where none is named."""
    variable = self.config.key_variable
    key = os.environ.get(variable, '').strip() if variable else ''
    if variable and not (key and key.isascii() and key.isprintable()):
      raise EndpointError(
        f'the environment variable {variable}, which should hold the key of '
        f'{self.url} ({self._setting}), is not set to one; export it first'
      )
    return key

  def _error(self, problem: str, remedy: str) -> EndpointError:
    """Returns one sentence: where, what happened, what to do."""
    return EndpointError(f'{self.url} ({self._setting}) {problem}; {remedy}')

  def _shown(self, text: Any) -> str:
    """Returns a server's words for a message: short, inert, without the key."""
    words = str(text).replace(self._key or _NO_KEY, '***')
    plain = ''.join(c if c.isprintable() else ' ' for c in words)
    return ' '.join(plain.split())[:_LONGEST_QUOTE]

  def ask(self, body: Mapping[str, Any]) -> Reply:
    """Asks one question and returns the reply, whose text may be empty.

    No connection, no answer in time and errors that may pass are tried again
    with growing waits, and so is an answer that is no chat completion.

    Args:
      body: of the request, without the model.

    Raises:
      EndpointError: all of that was in vain, or the server refuses.
    """
    problem = ''
    for attempt in range(self.config.max_retries + 1):
      if attempt:
        time.sleep(min(_LONGEST_WAIT, 0.25 * 2**attempt))
      text = self._send(body)
      try:
        return _read(text)
      except ValueError as error:
        problem = f'{error} (it reads {self._shown(text)!r})'
    raise self._error(
      f'answers what is no chat completion: {problem}',
      'check that the address ends as the server wants it, such as in /v1',
    )

  def _send(self, body: Mapping[str, Any]) -> str:
    """Returns the body of the answer to one request."""
    rest = {**body, **self.config.parameters}
    rest = {key: value for key, value in rest.items() if value is not None}
    create = self._client.chat.completions.with_raw_response.create
    api = self._openai
    try:
      raw = create(
        model=self.model, messages=rest.pop('messages'), extra_body=rest
      )
      return raw.http_response.text
    except api.APITimeoutError:
      raise self._error(
        f'did not answer within {self.config.timeout:g} s, asked '
        f'{self.config.max_retries + 1} times',
        'raise the timeout of its settings or lower their concurrency',
      ) from None
    except api.APIConnectionError as error:
      raise self._error(
        f'cannot be reached ({self._shown(error.__cause__ or error)})',
        'start the server or correct the address',
      ) from None
    except api.APIStatusError as error:
      raise self._refused(error) from None

  def _refused(self, error: Any) -> EndpointError:
    """Returns what a status other than success says."""
    status, told = error.status_code, error.body
    words = told.get('message') if isinstance(told, dict) else None
    words = self._shown(words or error.message)
    if status in (401, 403):
      remedy = 'name the environment variable of its key as key_variable'
    elif status == 404:
      remedy = f'check the address and the model {self.model!r}'
    elif status < 500 and status not in (408, 409, 429):
      remedy = (
        'change what its settings send, such as endpoint.parameters, where '
        'None leaves a field out'
      )
    else:
      remedy = 'wait and run again, or lower the concurrency of its settings'
    return self._error(f'answers HTTP {status}: {words}', remedy)

  def check(self) -> None:
    """Asks one short question, whatever the answer says.

    Raises:
      EndpointError: as in `ask`.
    """
    question = {'role': 'user', 'content': 'Say yes.'}
    self.ask({'messages': [question], 'max_tokens': 8, 'temperature': 0.0})


def _read(text: str) -> Reply:
  """Reads a chat completion.

  Raises:
    ValueError: it is none; says what is wrong.
  """
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    raise ValueError('the answer is not JSON') from None
  try:
    choice = found['choices'][0]
    content, reason = choice['message']['content'], choice.get('finish_reason')
  except (TypeError, KeyError, IndexError, AttributeError):
    raise ValueError('the answer has no choices[0].message.content') from None
  if not isinstance(content, str | None):
    raise ValueError('choices[0].message.content is no text')
  # Half a pair of surrogates, which JSON may spell, could not be written down.
  plain = (content or '').encode('utf-8', 'replace').decode()
  return Reply(plain.strip(), str(reason or ''))
