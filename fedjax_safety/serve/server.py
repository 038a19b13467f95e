"""Puts a run's models behind the application and serves it."""

import functools
import pathlib
import socket
from collections.abc import Callable, Mapping, Sequence

import uvicorn

from fedjax_safety import assembly, config, types, workdir
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import templates
from fedjax_safety.models import decoder, load
from fedjax_safety.serve import app, engine, protocol

BASE = 'base'


def adapters(
  root: pathlib.Path, chosen: settings_lib.ExperimentConfig
) -> dict[str, pathlib.Path]:
  """Returns every adapter of a run over the same model, by name.

  Args:
    root: the work directory.
    chosen: the settings of an arm, whose model and scale it must share.

  Returns:
    `<arm>/seed_<n>/<stage>` to directory, in the order of the run.
  """
  found = {}
  for (arm, seed), settings in config.resolve(
    workdir.read_config(root)
  ).items():
    same = (settings.model, settings.lora.scale)
    if same != (chosen.model, chosen.lora.scale):
      continue
    directory = workdir.arm_directory(root, arm, seed)
    for path in sorted((directory / 'adapters').glob('*')):
      found[f'{arm}/seed_{seed}/{path.name}'] = path
  return found


def serving(
  settings: settings_lib.ExperimentConfig, paths: Mapping[str, pathlib.Path]
) -> app.Served:
  """Loads a model and starts the engine.

  Args:
    settings: of the arm whose model, template and lengths are used.
    paths: adapters by name; the bare base is served besides, as `base`.
  """
  model = assembly.tuned_model(settings)
  tokenizer = model.tokenizer
  end_ids = load.load_stop_ids(model.directory, tokenizer)
  loaders: dict[str, Callable[[], types.Adapter | None]] = {
    BASE: lambda: None,
    **{
      name: functools.partial(_adapter, path, model)
      for name, path in paths.items()
    },
  }
  return app.Served(
    engine=engine.Engine(
      decoder.Decoder(model.config, lora_scale=settings.lora.scale),
      model.base_params,
      loaders,
      batch_size=settings.performance.generation_batch_size,
      end_ids=end_ids,
    ),
    models=tuple(loaders),
    encode=lambda text: tokenizer(text)['input_ids'],
    encode_chat=functools.partial(_encode_chat, model),
    decode=functools.partial(tokenizer.decode, skip_special_tokens=True),
    decode_token=tokenizer.decode,
    end_ids=end_ids,
    max_positions=model.config.max_positions,
    vocab_size=model.config.vocab_size,
    chat_tokens=settings.evaluation.max_new_tokens,
  )


def _adapter(
  path: pathlib.Path, model: assembly.LanguageModel
) -> types.Adapter:
  """Loads one adapter."""
  return load.load_adapter(path, model.config)[0]


def _encode_chat(
  model: assembly.LanguageModel, messages: Sequence[Mapping[str, str]]
) -> list[int]:
  """Returns the tokens of a chat as the run's template writes it."""
  if model.template.name == 'chat':
    try:
      text = model.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
      )
    # The templates are programs that may refuse a role or an order of them.
    except Exception as error:
      raise protocol.RequestError(
        f"the tokenizer's chat template refuses these messages: {error}",
        'messages',
      ) from None
    return model.tokenizer(text, add_special_tokens=False)['input_ids']
  if [message['role'] for message in messages] != ['user']:
    raise protocol.RequestError(
      f'the template {model.template.name} of this run writes one message of '
      f'role user, and no others',
      'messages',
    )
  (ids,) = templates.encode_prompts(
    model.template, model.tokenizer, [messages[0]['content']]
  )
  return ids


class Listening:
  """A server that has its port and has not started yet."""

  def __init__(self, served: app.Served, listener: socket.socket):
    self._served, self._listener = served, listener
    self._server = uvicorn.Server(
      uvicorn.Config(app.build(served), log_level='warning')
    )

  @property
  def url(self) -> str:
    """Where it answers."""
    return f'http://127.0.0.1:{self._listener.getsockname()[1]}/v1'

  def run(self) -> None:
    """Serves until a signal ends it."""
    try:
      self._server.run(sockets=[self._listener])
    finally:
      self._served.engine.close()

  def stop(self) -> None:
    """Lets `run` return once the requests in flight are answered."""
    self._server.should_exit = True


def listen(
  settings: settings_lib.ExperimentConfig,
  paths: Mapping[str, pathlib.Path],
  *,
  port: int,
) -> Listening:
  """Takes a port of this machine's own, and loads what is served.

  Args:
    settings: as for `serving`.
    paths: as for `serving`.
    port: 0 takes a free one.

  Raises:
    ValueError: the port is taken, or the model cannot be loaded.
  """
  try:
    listener = socket.create_server(('127.0.0.1', port))
  except (OSError, OverflowError) as error:
    raise ValueError(
      f'--port={port} cannot be taken on this machine: {error}; choose '
      f'another, or 0 for a free one'
    ) from None
  return Listening(serving(settings, paths), listener)
