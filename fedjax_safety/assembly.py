"""Builds the parts of a run from its settings: models, losses, examples."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fedjax_safety import losses, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import sources, templates
from fedjax_safety.demo_world import named
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
def read(path: str, fields: tuple, need_response: bool) -> tuple:
  """Returns the examples of a file, which is read once a process."""
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
  return list(read(source, tuple(sorted((fields or {}).items())), True))


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
