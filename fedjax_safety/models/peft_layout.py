"""How PEFT lays out an adapter: file names, tensor names and config fields.

PEFT stores `lora_A` as `[R, D_in]` and `lora_B` as `[D_out, R]`, the transposes
of our factors, and scales the product by `lora_alpha / r`.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import tensor_files, weights

WEIGHTS = 'adapter_model.safetensors'
CONFIG = 'adapter_config.json'

# Fields of adapter_config.json that change what an adapter computes, each with
# the values for which it is a plain LoRA adapter.
_PLAIN = {
  'peft_type': ('LORA',),
  'bias': (None, 'none'),
  'fan_in_fan_out': (None, False),
  'use_dora': (None, False),
  'use_qalora': (None, False),
  'lora_bias': (None, False),
  'modules_to_save': (None, []),
  'rank_pattern': (None, {}),
  'alpha_pattern': (None, {}),
  'layers_to_transform': (None, []),
  'layer_replication': (None, []),
  'trainable_token_indices': (None, [], {}),
  'target_parameters': (None, []),
  'alora_invocation_tokens': (None, []),
  'arrow_config': (None,),
  'kasa_config': (None,),
  'use_bdlora': (None, False),
  # Other ways to begin also change the base that the adapter belongs to.
  'init_lora_weights': (None, True, False, 'gaussian'),
}


def pair_names(
  target: str, config: config_lib.DecoderConfig
) -> dict[str, list[str]]:
  """Returns PEFT's names of both factors of a projection, one per layer."""
  module = f'base_model.model.{weights.module_name(target)}'
  return {
    factor: [
      f'{module.format(layer=i)}.lora_{factor.upper()}.weight'
      for i in range(config.num_layers)
    ]
    for factor in ('a', 'b')
  }


def read_config(path: pathlib.Path) -> Mapping[str, Any]:
  """Reads an `adapter_config.json` that describes plain LoRA.

  Raises:
    ValueError: the file is missing, is not JSON, lacks a field, or asks for
      more than plain LoRA.
  """
  try:
    raw = json.loads(path.read_text())
  except FileNotFoundError:
    raise ValueError(f'{path} is missing; this is no PEFT adapter') from None
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from None
  for name in ('peft_type', 'r', 'lora_alpha', 'target_modules'):
    if raw.get(name) is None:
      raise ValueError(f'{path} lacks the field {name!r}')
  for name, plain in _PLAIN.items():
    if raw.get(name) not in plain:
      raise ValueError(
        f'{path}: {name}={raw[name]!r} is not supported; only plain LoRA is'
      )
  return raw


def scale_of(raw: Mapping[str, Any]) -> float:
  """Returns the factor of the product that a config states."""
  rank = raw['r']
  return raw['lora_alpha'] / (
    math.sqrt(rank) if raw.get('use_rslora') else rank
  )


def adapted(
  files: tensor_files.TensorFiles,
  raw: Mapping[str, Any],
  config: config_lib.DecoderConfig,
) -> list[str]:
  """Returns the adapted projections, after checking every tensor's shape.

  Args:
    files: the open `adapter_model.safetensors`.
    raw: contents of `adapter_config.json`.
    config: the decoder's config.

  Raises:
    ValueError: a tensor is missing, is of another shape, or is no factor of a
      projection of the decoder.
  """
  expected, targets, path = {}, [], files.paths[0]
  for target, (d_in, d_out) in weights.projection_sizes(config).items():
    names = pair_names(target, config)
    listed = raw['target_modules']
    if files.names & {*names['a'], *names['b']} or (
      isinstance(listed, list) and target in listed
    ):
      targets.append(target)
      expected |= dict.fromkeys(names['a'], (raw['r'], d_in))
      expected |= dict.fromkeys(names['b'], (d_out, raw['r']))
  extra = sorted(files.names - set(expected))
  if extra:
    raise ValueError(
      f'{extra[0]} in {path} is no LoRA factor of a projection of this model'
    )
  for name, shape in expected.items():
    if name not in files.names:
      raise ValueError(f'{name} is missing from {path}')
    files.check(name, shape)
  if not targets:
    raise ValueError(f'{path} holds no LoRA factors')
  return targets


def check(adapter: Mapping[str, Any], config: config_lib.DecoderConfig) -> int:
  """Returns the rank of an adapter that fits the decoder.

  Raises:
    ValueError: it adapts something else than projections, or a factor has
      another shape than the decoder and the first factor's rank imply.
  """
  blocks = dict(adapter.get('layers', {}))
  sizes = weights.projection_sizes(config)
  if set(adapter) != {'layers'} or not blocks or not set(blocks) <= set(sizes):
    raise ValueError(
      f'an adapter holds projections under layers, known: '
      f'{", ".join(sizes)}; got {sorted(adapter)} and {sorted(blocks)}'
    )
  first = next(iter(blocks.values()))
  rank = first['a'].shape[-1] if 'a' in first else 0
  for target, pair in blocks.items():
    d_in, d_out = sizes[target]
    expected = {
      'a': (config.num_layers, d_in, rank),
      'b': (config.num_layers, rank, d_out),
    }
    found = {name: tuple(factor.shape) for name, factor in pair.items()}
    if found != expected:
      raise ValueError(
        f'the adapter of {target} has shapes {found}; expected {expected}'
      )
  return rank


def make_config(
  targets: Sequence[str], rank: int, scale: float, base_model_name: str
) -> dict[str, Any]:
  """Returns the contents of an `adapter_config.json`.

  Args:
    targets: names of the adapted projections.
    rank: R.
    scale: factor of the adapter's product.
    base_model_name: directory or name of the model that it adapts.
  """
  alpha = scale * rank
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_model_name,
    'r': rank,
    # Servers declare it an integer; it is one wherever a user chose it.
    'lora_alpha': round(alpha) if near(alpha, round(alpha)) else alpha,
    'target_modules': list(targets),
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'use_rslora': False,
    'use_dora': False,
    'modules_to_save': None,
    'init_lora_weights': True,
    'inference_mode': True,
  }


def near(left: float, right: float) -> bool:
  """Whether two scales agree to float32."""
  return abs(left - right) <= 1e-6 * max(abs(left), abs(right))
