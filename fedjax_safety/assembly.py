"""Builds the parts of a run from its settings: models, judges, prompts."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fedjax_safety import endpoint, losses, replies, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import poison, sources, templates
from fedjax_safety.demo_world import named
from fedjax_safety.evaluation import (
  checks,
  code,
  judge_formats,
  reward,
  sandbox,
)
from fedjax_safety.evaluation import judges as judges_lib
from fedjax_safety.evaluation import rubric as rubric_lib
from fedjax_safety.models import attention, decoder, load, sampler, sharding
from fedjax_safety.models import config as model_config
from fedjax_safety.models import quantization as quantization_lib

Examples = list[sources.Example]


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A loaded model with its tokenizer and prompt template."""

  directory: pathlib.Path
  config: model_config.DecoderConfig
  base_params: types.BaseParams
  tokenizer: Any
  template: templates.Template


def mesh_of(config: settings_lib.PerformanceConfig) -> jax.sharding.Mesh | None:
  """Returns the mesh that the settings ask for, None for one device."""
  if config.mesh == (1, 1, 1):
    return None
  devices = jax.devices()[: math.prod(config.mesh)]
  return sharding.make_mesh(*config.mesh, devices=devices)


@functools.lru_cache(maxsize=4)
def load_model(
  path: str,
  dtype: str,
  template: str,
  mesh_shape: tuple[int, ...] = (1, 1, 1),
  quantization: str = '',
) -> LanguageModel:
  """Loads a Hugging Face directory or a named model of the demo world.

  Raises:
    ValueError: it cannot be read, is not supported, its tokenizer does not
      fit it, or the device has no products of that quantization.
  """
  directory = (
    named.model_directory(path) if named.is_named(path) else pathlib.Path(path)
  )
  tokenizer = load.load_tokenizer(directory)
  chosen = templates.get(template, tokenizer)
  config = model_config.read_hf(directory, dtype)
  load.check_tokenizer(tokenizer, config)
  mesh = mesh_of(settings_lib.PerformanceConfig(mesh=mesh_shape))
  quantization_lib.check_device(quantization, jax.devices()[0])
  config, base_params = load.load(
    directory, dtype=dtype, mesh=mesh, quantization=quantization or None
  )
  return LanguageModel(directory, config, base_params, tokenizer, chosen)


def tuned_model(config: settings_lib.ExperimentConfig) -> LanguageModel:
  """Loads the model that the federation tunes."""
  return load_model(
    config.model.path,
    config.model.dtype,
    config.model.template,
    config.performance.mesh,
    config.model.quantization,
  )


def make_decoder(
  language_model: LanguageModel,
  config: settings_lib.ExperimentConfig,
  mesh: jax.sharding.Mesh | None = None,
) -> decoder.Decoder:
  """Returns the decoder that trains, with the adapter's scale and dropout.

  On a mesh it takes batches whose size is a multiple of its axis `fsdp`.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  return decoder.Decoder(
    language_model.config,
    lora_scale=config.lora.scale,
    lora_dropout=config.lora.dropout,
    remat=config.performance.remat,
    mesh=mesh,
    attention=attention.choose(
      config.performance.attention,
      language_model.config,
      device,
      tp=config.performance.mesh[2],
      length=config.model.max_length,
    ),
  )


@functools.lru_cache(maxsize=4)
def make_loss(
  model: decoder.Decoder, loss_chunk: int = 0
) -> Callable[..., jax.Array]:
  """Returns `(base_params, adapter, tokens, loss_mask, key) -> loss`.

  The same arguments give the same function, so that what was compiled with it
  is found again.

  Args:
    model: the decoder that trains.
    loss_chunk: `performance.loss_chunk`.
  """
  vocab_size = model.config.vocab_size

  def loss_fn(base_params, adapter, tokens, loss_mask, key):
    chunk = loss_chunk or losses.chunk_of(vocab_size, tokens.size)
    made = model.apply(
      {'params': base_params, 'lora': adapter},
      tokens,
      rngs={'dropout': key} if model.lora_dropout else None,
      head_apart=chunk < vocab_size,
    )
    if chunk >= vocab_size:
      return losses.next_token_loss(made, tokens, loss_mask)
    return losses.chunked_next_token_loss(
      *made,
      tokens,
      loss_mask,
      chunk=chunk,
      shards=1 if model.mesh is None else model.mesh.shape['tp'],
      to_logits=functools.partial(decoder.to_logits, model.config),
    )

  return loss_fn


def make_sampler(
  language_model: LanguageModel,
  config: settings_lib.ExperimentConfig,
  *,
  lora_scale: float | None = None,
) -> sampler.Sampler:
  """Returns a sampler of a model; the run's own adapter scale by default."""
  scale = config.lora.scale if lora_scale is None else lora_scale
  return sampler.Sampler(
    model=decoder.Decoder(language_model.config, lora_scale=scale),
    base_params=language_model.base_params,
    tokenizer=language_model.tokenizer,
    stop_ids=load.load_stop_ids(
      language_model.directory, language_model.tokenizer
    ),
    encode_prompts=functools.partial(
      templates.encode_prompts,
      language_model.template,
      language_model.tokenizer,
    ),
    max_new_tokens=config.evaluation.max_new_tokens,
    batch_size=config.performance.generation_batch_size,
  )


@functools.lru_cache(maxsize=16)
def _read(path: str, fields: tuple, need_response: bool) -> tuple:
  """Reads a file's examples once a process."""
  return tuple(
    sources.load_examples(
      path,
      fields=dict(fields) or None,
      need_response=need_response,
      skip_empty=need_response,
    )
  )


def examples(
  source: str,
  *,
  count: int | None,
  seed: int,
  fields: Mapping[str, str] | None = None,
) -> Examples:
  """Returns examples of a file, or of a named data set of the demo world.

  Args:
    source: a path, glob, or `demo_world:` name.
    count: how many to draw of a named set; files are read whole.
    seed: of that draw.
    fields: columns of a file, if they are not recognized.
  """
  if named.is_named(source):
    return named.examples(source, count=count, seed=seed)
  return list(_read(source, tuple(sorted((fields or {}).items())), True))


def encode(
  pairs: Sequence[sources.Example],
  language_model: LanguageModel,
  config: settings_lib.ExperimentConfig,
) -> templates.EncodedExamples:
  """Tokenizes pairs for training."""
  encoded = templates.encode_all(
    pairs,
    language_model.template,
    language_model.tokenizer,
    max_length=config.model.max_length,
  )
  load.check_ids(encoded.tokens, language_model.config)
  return encoded


def _prompts(
  chosen: settings_lib.EvaluationSetConfig, *, run_code: bool
) -> Examples:
  """Returns the prompts of a file; tasks have a reference, checks or tests."""
  fields = tuple(sorted(chosen.fields.items()))
  if chosen.role != 'task':
    return list(_read(chosen.source, fields, False))
  (first,) = sources.load_examples(
    chosen.source,
    fields=dict(fields) or None,
    need_response=False,
    skip_empty=True,
    limit=1,
  )
  if code.is_problem(first):
    if not run_code:
      raise ValueError(
        f'{chosen.source} has tests, which run what the model writes: allow '
        f'that with evaluation.allow_code_execution=true, or leave it out'
      )
    return code.questions(_read(chosen.source, fields, False))
  if 'checks' not in first.metadata:
    return list(_read(chosen.source, fields, True))
  return checks.usable(_read(chosen.source, fields, False))


def evaluation_sets(
  config: settings_lib.EvaluationConfig,
) -> dict[str, tuple[str, Examples]]:
  """Returns every set's role and prompts.

  Raises:
    ValueError: a set cannot be read or is empty.
  """
  sets = {}
  for name, chosen in config.sets.items():
    if not chosen.source:
      continue
    if named.is_named(chosen.source):
      prompts = named.prompts(chosen.source, limit=chosen.limit)
    else:
      prompts = _prompts(chosen, run_code=config.allow_code_execution)
      if chosen.where:
        prompts = sources.select(prompts, chosen.where)
      if chosen.role == 'harmful':
        prompts = [dataclasses.replace(p, response='') for p in prompts]
      prompts = prompts[: chosen.limit or None]
    if chosen.trigger:
      prompts = [
        dataclasses.replace(
          p, prompt=poison.with_trigger(p.prompt, chosen.trigger)
        )
        for p in prompts
      ]
    sets[name] = (chosen.role, prompts)
  return sets


def code_sandbox(
  config: settings_lib.ExperimentConfig,
) -> sandbox.Sandbox | None:
  """Returns where a model's code is run, None if it must not be.

  Raises:
    ValueError: it should be, but cannot safely be on this machine.
  """
  if not config.evaluation.allow_code_execution:
    return None
  made = sandbox.Sandbox(with_network=config.evaluation.allow_code_network)
  made.check()
  return made


def _asked(
  config: settings_lib.ExperimentConfig,
  setting: str,
  name: str,
  directory: pathlib.Path | None,
) -> replies.EndpointSampler:
  """Returns the endpoint that judges, which has not been asked anything."""
  rubric = config.evaluation.rubric
  return replies.EndpointSampler(
    endpoint.Endpoint(name, setting, rubric.endpoint),
    directory,
    rubric.max_new_tokens,
  )


def scorers(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path | None = None
) -> list[Any]:
  """Returns what gives an answer a number: a reward model, a rubric.

  Args:
    config: the settings.
    directory: where the replies of endpoints are kept, None for nowhere.

  Raises:
    ValueError: one of them cannot be loaded.
  """
  rubric, chosen = config.evaluation.rubric, []
  if config.evaluation.reward_model:
    chosen.append(reward.load(config.evaluation.reward_model))
  if rubric.judge:
    chosen.append(
      rubric_lib.RubricScorer(
        _asked(config, 'evaluation.rubric.judge', rubric.judge, directory),
        rubric.prompt or rubric_lib.GRADE,
        rubric.low,
        rubric.high,
        rubric.roles,
      )
    )
  return chosen


def learned_judge(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path | None = None
) -> (
  judges_lib.LearnedJudge | judges_lib.FormatJudge | rubric_lib.EndpointJudge
):
  """Loads the judge that the settings name, with its way of being asked.

  Args:
    config: the settings.
    directory: where the replies of endpoints are kept, None for nowhere.

  Raises:
    ValueError: the judge cannot be read, or does not fit its format.
  """
  evaluation = config.evaluation
  if endpoint.is_endpoint(evaluation.judge):
    return rubric_lib.EndpointJudge(
      _asked(config, 'evaluation.judge', evaluation.judge, directory),
      evaluation.rubric.safety_prompt or rubric_lib.SAFETY,
      evaluation.judge_words,
    )
  name = evaluation.judge_format
  if name == judge_formats.QUESTION:
    model = load_model(
      evaluation.judge, config.model.dtype, evaluation.judge_template
    )
    return judges_lib.LearnedJudge(
      make_sampler(model, config, lora_scale=1.0),
      evaluation.judge_prompt,
      evaluation.judge_words,
    )
  chosen = judge_formats.FORMATS[name]
  if not pathlib.Path(evaluation.judge).is_dir():
    raise ValueError(
      chosen.how_to_get(
        f'evaluation.judge={evaluation.judge!r} is no directory'
      )
    )
  # The question is the format's; the template of the loader is not used.
  model = load_model(evaluation.judge, config.model.dtype, 'alpaca')
  chosen.question(model.tokenizer, '', '')
  sampler = dataclasses.replace(
    make_sampler(model, config, lora_scale=1.0),
    encode_prompts=functools.partial(chosen.encode, model.tokenizer),
    max_new_tokens=chosen.max_new_tokens,
  )
  return judges_lib.FormatJudge(sampler, name)


def judges(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path | None = None
) -> list[Any]:
  """Returns the judges: rule lists, the learned one, the world's truth.

  Args:
    config: the settings.
    directory: where the replies of endpoints are kept, None for nowhere.
  """
  evaluation = config.evaluation
  chosen: list[Any] = [judges_lib.RuleJudge(rule) for rule in evaluation.rules]
  if evaluation.judge:
    chosen.append(learned_judge(config, directory))
  worlds = {
    named.world(s.source)
    for s in evaluation.sets.values()
    if named.is_named(s.source)
  }
  if len(worlds) == 1:
    chosen.append(judges_lib.TruthJudge(worlds.pop()))
  return chosen
