"""What is compiled: the round's program and the shapes it is called with.

No weight is read and no array is made: a model is its `config.json`, or one
of the published shapes below.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, assembly, federation, probe
from fedjax_safety import round as round_lib
from fedjax_safety import settings as settings_lib
from fedjax_safety.demo_world import named
from fedjax_safety.models import config as model_config
from fedjax_safety.models import quantization, sharding, weights


def _llama(vocab, width, mlp, layers, heads, kv_heads, tied=False, **rest):
  """Returns the sizes of a Llama, named as in its `config.json`."""
  return {
    'model_type': 'llama',
    'vocab_size': vocab,
    'hidden_size': width,
    'intermediate_size': mlp,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'tie_word_embeddings': tied,
    'max_position_embeddings': 4096,
    **rest,
  }


# Published sizes. Those of RoPE move no byte and no operation.
SHAPES = {
  'tinyllama-1.1b': _llama(32000, 2048, 5632, 22, 32, 4),
  'llama2-7b': _llama(32000, 4096, 11008, 32, 32, 32),
  'llama2-13b': _llama(32000, 5120, 13824, 40, 40, 40),
  'llama2-70b': _llama(32000, 8192, 28672, 80, 64, 8),
  'llama3-8b': _llama(128256, 4096, 14336, 32, 32, 8),
  'llama3-70b': _llama(128256, 8192, 28672, 80, 64, 8),
  'llama3.2-1b': _llama(128256, 2048, 8192, 16, 32, 8, True, head_dim=64),
  'llama3.2-3b': _llama(128256, 3072, 8192, 28, 24, 8, True, head_dim=128),
}


def decoder_config(
  model: settings_lib.ModelConfig, shape: str | None
) -> model_config.DecoderConfig:
  """Returns the model's sizes: of a named shape, or of the config's model.

  Args:
    model: settings; its dtype is used in both cases.
    shape: a name in `SHAPES`, or None for `model.path`, of which only
      `config.json` is read.

  Raises:
    ValueError: the shape is unknown, or the directory has no such file.
  """
  if shape is not None:
    _validate.one_of(SHAPES, shape=shape)
    made = model_config.from_hf(SHAPES[shape], model.dtype)
  elif named.is_named(model.path):
    made = model_config.read_hf(named.model_directory(model.path), model.dtype)
  else:
    made = model_config.read_hf(model.path, model.dtype)
  return dataclasses.replace(made, quantization=model.quantization or None)


@dataclasses.dataclass(frozen=True)
class RoundShapes:
  """A round that can be traced: its program and its arguments' shapes."""

  round_fn: Any
  arguments: tuple[Any, ...]

  @property
  def base_params(self) -> Any:
    """Shapes of the frozen parameters."""
    return self.arguments[0]

  @property
  def cohort(self) -> round_lib.Cohort:
    """Shapes of a round's data."""
    return self.arguments[2]


def _laid_out(tree: Any, layout: Any) -> Any:
  """Returns shapes with a sharding each."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    tree,
    layout,
  )


def _base_params(config, mesh):
  """Returns the shapes of the frozen parameters, laid out as they load."""
  params = {}
  for weight in weights.table(config):
    where = mesh and jax.NamedSharding(mesh, sharding.spec_of(weight.path))
    dtype = config.dtype
    if config.quantization and weight.path[-1] == 'kernel':
      dtype = quantization.MODES[config.quantization].dtype
      path, shape = (*weight.path[:-1], 'kernel_scale'), weight.shape
      scales = mesh and jax.NamedSharding(mesh, sharding.spec_of(path))
      scale = jax.ShapeDtypeStruct(
        (*shape[:-2], shape[-1]), 'float32', sharding=scales
      )
      weights.put(params, path, scale)
    leaf = jax.ShapeDtypeStruct(weight.shape, dtype, sharding=where)
    weights.put(params, weight.path, leaf)
  return params


def _cohort(config, mesh):
  """Returns the shapes of a round's data, every example of full length."""
  client = config.client
  rows = (client.cohort_size,)
  shape = (*rows, client.num_local_steps, client.batch_size)
  shape = (*shape, config.model.max_length)
  cohort = round_lib.Cohort(
    jax.ShapeDtypeStruct(shape, jnp.int32),
    jax.ShapeDtypeStruct(shape, jnp.bool_),
    jax.ShapeDtypeStruct(rows, jnp.int32),
    jax.ShapeDtypeStruct(rows, jnp.float32),
    jax.ShapeDtypeStruct(rows, jnp.bool_),
  )
  if mesh is None:
    return cohort
  specs = federation.cohort_specs()
  places = [jax.NamedSharding(mesh, spec) for spec in specs]
  return _laid_out(cohort, round_lib.Cohort(*places))


def of_round(
  config: settings_lib.ExperimentConfig,
  model: model_config.DecoderConfig,
  mesh: jax.sharding.Mesh | None,
) -> RoundShapes:
  """Returns the round that a run of these settings would compile.

  Args:
    config: an arm's settings.
    model: the model's sizes.
    mesh: from `sharding.make_mesh`, of any devices; None for one at hand.

  Raises:
    ValueError: the mesh does not divide the model.
  """
  if mesh is not None:
    sharding.check_divisible(model, mesh)
  language_model = assembly.LanguageModel(
    pathlib.Path(config.model.path),
    model,
    _base_params(model, mesh),
    None,
    None,
  )
  parts = federation.choose_parts(config)
  state = jax.eval_shape(
    lambda: parts.init_state(
      federation.fresh_adapter(config, language_model, None)
    )
  )
  layout = mesh and sharding.like_adapter(state, state.adapter, mesh)
  if mesh is not None:
    state = _laid_out(state, layout)
  return RoundShapes(
    federation.make_round(
      config, language_model, parts, mesh, layout, probe.blank(config)
    ),
    (
      language_model.base_params,
      state,
      _cohort(config, mesh),
      jax.eval_shape(lambda: jax.random.key(0)),
      jax.ShapeDtypeStruct((), jnp.float32),
    ),
  )
