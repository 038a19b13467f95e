"""Tiny models for the tests of reading, writing and running decoders."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import weights

# Every size differs from every other, so that no two can be confused.
_TINY = {
  'model_type': 'llama',
  'vocab_size': 48,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 10,
  'max_position_embeddings': 16,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': False,
  'attention_bias': False,
  'mlp_bias': False,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 1000.0},
  'dtype': 'float32',
}


def _normal(seed: int, shape: tuple[int, ...], mean=0.0, std=0.2):
  """Draws with NumPy: JAX would compile a generator for every shape."""
  return np.random.default_rng(seed).normal(mean, std, shape)


@pytest.fixture
def hf_config():
  """Returns `(**overrides) -> contents of config.json` of a tiny model."""
  return lambda **overrides: _TINY | overrides


@pytest.fixture
def random_params():
  """Returns `config -> base parameters` that leave no leaf at its default."""

  def make(config: config_lib.DecoderConfig):
    params = {}
    for seed, weight in enumerate(weights.table(config)):
      mean = 1.0 if weight.path[-1] == 'scale' else 0.0
      leaf = _normal(seed, weight.shape, mean)
      weights.put(params, weight.path, jnp.asarray(leaf, config.dtype))
    return params

  return make


@pytest.fixture
def random_adapter():
  """Returns `(config, rank, targets) -> adapter` with a product that counts."""

  def make(config: config_lib.DecoderConfig, rank: int, targets):
    sizes, out = weights.projection_sizes(config), {}
    for seed, target in enumerate(targets):
      d_in, d_out = sizes[target]
      a = _normal(100 + seed, (config.num_layers, d_in, rank), std=0.3)
      b = _normal(200 + seed, (config.num_layers, rank, d_out), std=0.3)
      out[target] = {'a': jnp.float32(a), 'b': jnp.float32(b)}
    return {'layers': out}

  return make
