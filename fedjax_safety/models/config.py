"""What a decoder is: sizes and numerics, read from a Hugging Face config."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fedjax_safety import _validate

TARGET_MODULES = (
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding: the type and its parameters.

  Attributes:
    theta: base of the geometric series of wavelengths.
    kind: default, linear, dynamic, yarn, longrope or llama3.
    parameters: the type's own parameters, as sorted (name, value) pairs so
      that the config can be hashed.
  """

  theta: float = 10_000.0
  kind: str = 'default'
  parameters: tuple[tuple[str, Any], ...] = ()

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a parameter of this type, or the default."""
    return dict(self.parameters).get(name, default)


ROPE_REQUIRED = {
  'default': (),
  'linear': ('factor',),
  'dynamic': ('factor',),
  'yarn': ('factor', 'original_max_position_embeddings'),
  'longrope': (
    'short_factor',
    'long_factor',
    'original_max_position_embeddings',
  ),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes and numerics of a Llama-architecture decoder.

  Attributes:
    vocab_size: rows of the embedding, V.
    width: residual stream width, D.
    num_layers: number of blocks.
    num_heads: query heads, H.
    num_kv_heads: key and value heads; divides `num_heads`.
    head_width: width of one head, K.
    mlp_width: hidden width of the gated MLP, F.
    rope: rotary position embedding.
    norm_eps: epsilon of RMSNorm.
    tied_head: whether the output head is the transposed embedding.
    attention_bias: whether q, k, v and o projections carry a bias.
    mlp_bias: whether the MLP projections carry a bias.
    max_positions: longest sequence the model was made for.
    dtype: dtype of weights and activations.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  mlp_width: int
  rope: RopeConfig = RopeConfig()
  norm_eps: float = 1e-6
  tied_head: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  max_positions: int = 2048
  dtype: Any = jnp.float32

  def __post_init__(self):
    _validate.positive(
      vocab_size=self.vocab_size,
      width=self.width,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_width=self.head_width,
      mlp_width=self.mlp_width,
      max_positions=self.max_positions,
    )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_attention_heads={self.num_heads} must be a multiple of '
        f'num_key_value_heads={self.num_kv_heads}'
      )
    if self.head_width % 2:
      raise ValueError(f'head_dim={self.head_width} must be even for RoPE')
    for name in ('short_factor', 'long_factor'):
      factors = self.rope.get(name)
      if factors is not None and len(factors) != self.head_width // 2:
        raise ValueError(
          f'{name} has {len(factors)} entries; '
          f'head_dim={self.head_width} needs {self.head_width // 2}'
        )


# Fields of a Llama config.json that change the function computed, with the one
# value supported where the decoder does not implement the alternative.
_ONLY_VALUE = {
  'hidden_act': 'silu',
  'attention_dropout': 0.0,
  'pretraining_tp': 1,
  'rope_interleaved': False,
}

_DTYPES = ('bfloat16', 'float16', 'float32')

# Fields that are read, or that do not change the function computed.
_KNOWN = frozenset(_ONLY_VALUE) | {
  'architectures',
  'model_type',
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'max_position_embeddings',
  'rms_norm_eps',
  'rope_parameters',
  'rope_theta',
  'rope_scaling',
  'original_max_position_embeddings',
  'tie_word_embeddings',
  'attention_bias',
  'mlp_bias',
  'dtype',
  'torch_dtype',
  'initializer_range',
  'use_cache',
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'transformers_version',
  'return_dict',
  'output_hidden_states',
  'output_attentions',
  'chunk_size_feed_forward',
  'is_encoder_decoder',
  'problem_type',
  'id2label',
  'label2id',
  'name_or_path',
  '_name_or_path',
  '_attn_implementation_autoset',
  'is_llama_config',
  'max_sequence_length',
  'transformers.js_config',
  'unsloth_fixed',
  'unsloth_version',
}


def _rope_from_hf(raw: Mapping[str, Any]) -> RopeConfig:
  """Reads RoPE in the layout of transformers 5 or of older releases."""
  parameters = dict(raw.get('rope_scaling') or raw.get('rope_parameters') or {})
  theta = parameters.pop('rope_theta', None) or raw.get('rope_theta')
  old_kind = parameters.pop('type', 'default')
  kind = parameters.pop('rope_type', old_kind)
  _validate.one_of(ROPE_REQUIRED, rope_type=kind)
  original = 'original_max_position_embeddings'
  if original in ROPE_REQUIRED[kind]:
    # The order of precedence is that of transformers.
    parameters[original] = (
      raw.get(original)
      or parameters.get(original)
      or raw.get('max_position_embeddings', 2048)
    )
  missing = [n for n in ROPE_REQUIRED[kind] if parameters.get(n) is None]
  if missing:
    raise ValueError(
      f'rope_parameters of type {kind!r} lack {", ".join(missing)}'
    )
  if parameters.pop('partial_rotary_factor', 1.0) != 1.0:
    raise ValueError('partial_rotary_factor other than 1.0 is not supported')
  frozen = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in parameters.items()
  }
  return RopeConfig(
    float(theta or 10_000.0), kind, tuple(sorted(frozen.items()))
  )


def from_hf(raw: Mapping[str, Any], dtype: Any = None) -> DecoderConfig:
  """Returns the decoder's config for the contents of a `config.json`.

  Args:
    raw: the parsed `config.json` of a Llama-architecture model.
    dtype: dtype to compute in; the file's own by default.

  Raises:
    ValueError: the architecture, a field or a field's value is one that this
      decoder does not implement; the message names it.
  """
  if raw.get('model_type') != 'llama':
    raise ValueError(
      f'model_type={raw.get("model_type")!r} is not supported; known: llama'
    )
  unknown = sorted(set(raw) - _KNOWN)
  if unknown:
    raise ValueError(
      f'config.json has fields this decoder does not implement: '
      f'{", ".join(unknown)}'
    )
  for name, value in _ONLY_VALUE.items():
    if raw.get(name, value) not in (value, None):
      raise ValueError(
        f'{name}={raw[name]!r} is not supported; only {value!r} is'
      )
  dtype = dtype or raw.get('dtype') or raw.get('torch_dtype') or 'float32'
  dtype = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  _validate.one_of(_DTYPES, dtype=dtype)
  heads = raw['num_attention_heads']
  return DecoderConfig(
    vocab_size=raw['vocab_size'],
    width=raw['hidden_size'],
    num_layers=raw['num_hidden_layers'],
    num_heads=heads,
    num_kv_heads=raw.get('num_key_value_heads') or heads,
    head_width=raw.get('head_dim') or raw['hidden_size'] // heads,
    mlp_width=raw['intermediate_size'],
    rope=_rope_from_hf(raw),
    norm_eps=raw.get('rms_norm_eps', 1e-6),
    tied_head=raw.get('tie_word_embeddings', False),
    attention_bias=raw.get('attention_bias', False),
    mlp_bias=raw.get('mlp_bias', False),
    max_positions=raw.get('max_position_embeddings', 2048),
    dtype=jnp.dtype(dtype),
  )


def read_hf(directory: str | pathlib.Path, dtype: Any = None) -> DecoderConfig:
  """Reads `config.json` of a Hugging Face model directory.

  Raises:
    ValueError: the file is missing, is not JSON, or describes a model that
      this decoder does not implement.
  """
  path = pathlib.Path(directory) / 'config.json'
  try:
    raw = json.loads(path.read_text())
  except FileNotFoundError:
    raise ValueError(
      f'{directory} is not a Hugging Face model directory: no config.json'
    ) from None
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from None
  try:
    return from_hf(raw, dtype)
  except KeyError as error:
    raise ValueError(f'{path} lacks the field {error.args[0]!r}') from None
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
