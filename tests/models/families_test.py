"""Tests of every family of models against transformers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from fedjax_safety.models import batcher, decoder, families, load
from fedjax_safety.models import config as config_lib

pytestmark = pytest.mark.usefixtures('quick_compiles')

NAMES = tuple(families.FAMILIES)
LENGTH, LENGTHS, NUM_NEW = 12, (12, 7, 1), 6

_ROPE = (
  {'rope_type': 'default'},
  {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8},
  {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
  },
  {'rope_type': 'linear', 'factor': 3.0},
)
# Their rotation depends on the longest row, so that padding changes it.
_ROPE_BY_LENGTH = (
  {'rope_type': 'dynamic', 'factor': 2.0},
  {'rope_type': 'longrope', 'original_max_position_embeddings': 9},
)
_BY_LENGTH = 1

# Three models a family, which together have every flag on and off; the one of
# index `_BY_LENGTH` has such a RoPE. Llama's flags have tests of their own.
_SLIDING, _FULL = 'sliding_attention', 'full_attention'
_VARIANTS = {
  'llama': ({'attention_bias': True, 'mlp_bias': True},),
  'mistral': (
    {'tie_word_embeddings': True},
    {'sliding_window': 1},
    {'sliding_window': None},
  ),
  'qwen2': (
    {'num_hidden_layers': 3, 'max_window_layers': 2},
    {'use_sliding_window': False, 'tie_word_embeddings': True},
    {'layer_types': [_SLIDING, _FULL]},
  ),
  'qwen3': (
    {'attention_bias': True},
    {'use_sliding_window': False, 'tie_word_embeddings': True},
    {'layer_types': [_SLIDING, _FULL]},
  ),
  'gemma2': (
    {'num_hidden_layers': 3},
    {
      'attention_bias': True,
      'attn_logit_softcapping': None,
      'final_logit_softcapping': None,
      'tie_word_embeddings': False,
    },
    {'layer_types': [_FULL, _SLIDING]},
  ),
  'gemma3_text': (
    # Deep enough for the loop over layers not to be unrolled.
    {'num_hidden_layers': 9, 'sliding_window_pattern': 3},
    {
      'attention_bias': True,
      'final_logit_softcapping': None,
      'tie_word_embeddings': False,
    },
    {'layer_types': [_SLIDING] * 2},
  ),
}
MODELS = [(n, i) for n in NAMES for i in range(len(_VARIANTS[n]))]


def _rope(types, index, half, rng):
  """Returns the parameters of one of some types of RoPE, of random base."""
  rope = types[index % len(types)] | {
    'rope_theta': float(rng.integers(50, 5000))
  }
  if rope['rope_type'] == 'longrope':
    rope['short_factor'] = rng.uniform(1, 2, half).tolist()
    rope['long_factor'] = rng.uniform(2, 5, half).tolist()
  return rope


def _draw(hf_config, family, index):
  """Returns a config.json of random sizes."""
  rng = np.random.default_rng([NAMES.index(family), index])
  groups, heads_each = rng.integers(1, 4, 2).tolist()
  # transformers wants Gemma's width to be a multiple of the heads.
  heads = groups * heads_each
  width = heads * 2 * int(rng.integers(2, 5))
  head = width // heads if family == 'qwen2' else 2 * int(rng.integers(2, 7))
  types = _ROPE_BY_LENGTH if index == _BY_LENGTH else _ROPE
  kind = NAMES.index(family) + index
  rope = _rope(types, kind, head // 2, rng)
  if family == 'gemma3_text':
    rope = {_FULL: rope, _SLIDING: _rope(types, kind + 1, head // 2, rng)}
  sizes = {
    'num_hidden_layers': 2,
    'hidden_size': width,
    'num_attention_heads': heads,
    'num_key_value_heads': groups,
    'head_dim': head,
    'rope_parameters': rope,
  }
  if family != 'llama':
    sizes['sliding_window'] = int(rng.integers(2, 6))
  if family == 'qwen2':
    del sizes['head_dim']
  raw = hf_config(family, **sizes | _VARIANTS[family][index])
  if family == 'qwen2':
    del raw['head_dim']
  return raw


def _tokens():
  return np.random.default_rng(0).integers(1, 48, (3, LENGTH), np.int32)


@pytest.mark.parametrize('family, index', MODELS)
def test_logits_and_answers_equal_transformers(
  tmp_path, hf_config, save_reference, reference_logits, family, index
):
  raw = _draw(hf_config, family, index)
  reference = save_reference(tmp_path, raw)
  config, params = load.load(tmp_path)
  tokens, lengths = _tokens(), np.array(LENGTHS)
  if index == _BY_LENGTH:
    lengths[:] = LENGTH
  model = decoder.Decoder(config)
  # Padding on the right, which no real token may see.
  padded = np.where(np.arange(LENGTH) < lengths[:, None], tokens, 0)
  ours = jax.jit(model.apply)({'params': params}, padded)
  for row, length, found in zip(tokens, lengths, ours, strict=True):
    expected = reference_logits(reference, row[None, :length])[0]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found[:length], expected, atol=1e-4, rtol=0)
  if index == _BY_LENGTH:
    return
  key = np.zeros(2, np.uint32)
  requests = [
    batcher.Request(row[:length], key, NUM_NEW)
    for row, length in zip(tokens, lengths, strict=True)
  ]
  # The third prompt takes the place of the first that ends.
  answers = batcher.run(
    model,
    params,
    {},
    requests,
    rows=2,
    new_slots=NUM_NEW,
    length_bucket=LENGTH,
    stop_ids=(),
  )
  for index, found in answers:
    expected = _answer(reference, tokens[index, : lengths[index]])
    np.testing.assert_array_equal(found, expected)


def _answer(reference, prompt):
  """Returns what transformers generates after a prompt, greedily."""
  import torch

  prompt = torch.asarray(prompt[None]).long()
  whole = reference.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    do_sample=False,
    max_new_tokens=NUM_NEW,
    eos_token_id=None,
    pad_token_id=0,
  )
  return whole[0, prompt.shape[1] :].numpy()


@pytest.mark.parametrize('kind, shifted', [('Llama', False), ('Gemma2', True)])
def test_norms_round_where_transformers_does(kind, shifted):
  torch = pytest.importorskip('torch')
  module = importlib.import_module(
    f'transformers.models.{kind.lower()}.modeling_{kind.lower()}'
  )
  draw = np.random.default_rng(0).normal
  x, scale = draw(0, 3, (200, 64)), draw(0, 1, 64)
  theirs = getattr(module, f'{kind}RMSNorm')(64, 1e-6)
  theirs.weight.data = torch.asarray(scale)
  with torch.no_grad():
    expected = theirs.bfloat16()(torch.asarray(x).bfloat16()).float().numpy()

  def found(shifted, scale):
    norm = decoder.RMSNorm(1e-6, shifted)
    params = {'scale': jnp.bfloat16(scale)}
    return np.float32(norm.apply({'params': params}, jnp.bfloat16(x)))

  # The last bit of a float32 may round a bfloat16 the other way.
  assert np.mean(found(shifted, scale) != expected) < 1e-3
  # One more or less in the scale, so that only the rounding is another.
  other = found(not shifted, scale + 1 if shifted else scale - 1)
  assert np.mean(other != expected) > 0.05


@pytest.mark.parametrize('family, index', MODELS)
def test_what_transformers_writes_is_read_alike(hf_config, family, index):
  raw = _draw(hf_config, family, index)
  written = transformers.CONFIG_MAPPING[family].from_dict(raw).to_dict()
  found = config_lib.from_hf(written)
  assert found == config_lib.from_hf(raw)
  assert bool(found.windowed) == (
    family != 'llama'
    and raw['sliding_window'] is not None
    and raw.get('use_sliding_window', True)
  )
