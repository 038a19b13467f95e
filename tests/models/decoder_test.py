"""Tests of the decoder against transformers, peft and itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import lora as lora_lib
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder, kv_cache, load

# Nine tokens fit the context of the tiny models; forty are beyond it.
SHORT, LONG = 9, 40


def _tokens(length, rows=2):
  return np.random.default_rng(0).integers(0, 48, (rows, length), np.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames='keep')
def _apply(model, variables, tokens, positions=None, **kwargs):
  """Runs a decoder; equal decoders and shapes compile once for all tests."""
  return model.apply(variables, tokens, positions, **kwargs)


def _logits(config, params, tokens):
  return _apply(decoder.Decoder(config), {'params': params}, tokens)


ROPE = {
  'default': {},
  'linear': {'factor': 4.0},
  'dynamic': {'factor': 2.0},
  'yarn': {'factor': 4.0, 'original_max_position_embeddings': 8},
  'yarn_full': {
    'rope_type': 'yarn',
    'factor': 4.0,
    'original_max_position_embeddings': 16,
    'beta_fast': 4.0,
    'beta_slow': 0.5,
    'mscale': 0.7,
    'mscale_all_dim': 1.3,
    'truncate': False,
  },
  'longrope': {
    'short_factor': [1.0, 1.1, 1.2, 1.3, 1.4],
    'long_factor': [1.0, 2.0, 3.0, 4.0, 5.0],
    'original_max_position_embeddings': 14,
  },
  'llama3': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
  },
}

# What else varies, each beside one of the rope types to save compilations.
# The default is grouped queries, an untied head, no biases, and a head width
# that is not the quotient of width and heads.
BESIDE = {
  'linear': {'num_key_value_heads': 4},
  'dynamic': {'tie_word_embeddings': True},
  'yarn': {'attention_bias': True, 'mlp_bias': True},
  'llama3': {'head_dim': 4, 'num_key_value_heads': 1},
}

# Types whose frequencies depend on the length; others are told by the longer.
LENGTHS = {'dynamic': (SHORT, LONG), 'longrope': (SHORT, LONG)}


@pytest.mark.parametrize('kind', ROPE)
def test_logits_equal_transformers(
  tmp_path, hf_config, save_reference, reference_logits, kind
):
  rope = {'rope_type': kind, 'rope_theta': 1000.0} | ROPE[kind]
  raw = hf_config(rope_parameters=rope, **BESIDE.get(kind, {}))
  reference = save_reference(tmp_path, raw)
  config, params = load.load(tmp_path)
  for length in LENGTHS.get(kind, (LONG,)):
    tokens = _tokens(length)
    ours = _logits(config, params, tokens)
    theirs = reference_logits(reference, tokens)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('stored', ['bfloat16', 'float16'])
def test_narrow_files_compute_in_float32_on_request(
  tmp_path, hf_config, save_reference, reference_logits, stored
):
  reference = save_reference(tmp_path, hf_config(), stored)
  config, params = load.load(tmp_path, dtype='float32')
  assert params['lm_head'].dtype == jnp.float32
  tokens = _tokens(SHORT)
  np.testing.assert_allclose(
    _logits(config, params, tokens),
    reference_logits(reference, tokens),
    atol=1e-4,
    rtol=0,
  )


def test_bfloat16_computation_stays_near_float32(hf_config, random_params):
  config = config_lib.from_hf(hf_config(), 'bfloat16')
  params = random_params(config)
  wide = jax.tree.map(jnp.float32, params)
  tokens = _tokens(SHORT)
  narrow = _logits(config, params, tokens)
  exact = _logits(config_lib.from_hf(hf_config(), 'float32'), wide, tokens)
  # Eight bits of mantissa through three blocks of two residual additions.
  assert narrow.dtype == jnp.float32
  np.testing.assert_allclose(narrow, exact, atol=6 * 2**-7)
  assert np.abs(narrow - exact).max() > 1e-4


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gemma3_text'])
def test_cached_decode_equals_the_forward(hf_config, random_params, family):
  """Rows at positions of their own write one slot after another, in a ring."""
  config = config_lib.from_hf(hf_config(family))
  params, model = random_params(config), decoder.Decoder(config)
  tokens, lengths = _tokens(SHORT + 3), np.array([3, 6])
  logits, kept = _apply(model, {'params': params}, tokens[:, :6], keep=True)
  cache = kv_cache.replace_rows(
    kv_cache.empty(config, 3, 6 + 4), np.array([2, 0]), kept, lengths
  )
  found = [logits[np.arange(2), lengths - 1]]
  full = _logits(config, params, tokens)
  for step in range(4):
    position = np.array([6, 0, 3]) + step
    # The second row is idle, and a third of the ring is used before.
    token = tokens[[1, 0, 0], position]
    logits, cache = _apply(
      model,
      {'params': params},
      token[:, None],
      position[:, None],
      cache=cache,
      slot=6 + (3 + step) % 4,
    )
    found.append(logits[[2, 0], 0])
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(
      [logits[row] for logits in found],
      full[row, length - 1 : length + 4],
      atol=1e-5 * np.abs(full).max(),
    )


def test_right_padding_is_harmless(hf_config, random_params):
  config = config_lib.from_hf(hf_config())
  params, tokens = random_params(config), _tokens(SHORT)
  other = tokens.copy()
  other[:, 5:] = 0
  changed = _logits(config, params, other)
  plain = _logits(config, params, tokens)
  np.testing.assert_array_equal(changed[:, :5], plain[:, :5])
  assert np.abs(changed[:, 5:] - plain[:, 5:]).max() > 0.1


def test_last_only_picks_one_token_of_each_row(hf_config, random_params):
  config = config_lib.from_hf(hf_config())
  params, tokens = random_params(config), _tokens(SHORT)
  last = np.array([2, 6])
  picked = jax.jit(decoder.Decoder(config).apply)(
    {'params': params}, tokens, last_only=last
  )
  expected = _logits(config, params, tokens)[np.arange(2), last]
  np.testing.assert_allclose(picked, expected, atol=1e-5)


def test_adapter_equals_merged_kernels(
  hf_config, random_params, random_adapter
):
  config = config_lib.from_hf(hf_config())
  params, tokens = random_params(config), _tokens(SHORT)
  adapter = random_adapter(config, 2, config_lib.TARGET_MODULES)
  variables = {'params': params, 'lora': adapter}
  ours = _apply(decoder.Decoder(config, lora_scale=0.5), variables, tokens)
  merged = _logits(config, lora_lib.merge(params, adapter, 0.5), tokens)
  np.testing.assert_allclose(ours, merged, atol=1e-4)
  assert np.abs(ours - _logits(config, params, tokens)).max() > 0.1


def _dots(jaxpr):
  """Yields `(operand shapes, batch dimensions)` of every product inside."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      _, (batch, _) = equation.params['dimension_numbers']
      yield [v.aval.shape for v in equation.invars], batch
    for value in equation.params.values():
      for inner in jax.tree.leaves(
        value, is_leaf=lambda node: hasattr(node, 'eqns')
      ):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from _dots(inner)


def _weights_in_unbatched_dots(config, params, adapters, params_axis):
  """Counts the weights that enter products without a batch dimension."""
  model, tokens = decoder.Decoder(config), _tokens(SHORT)

  def apply(params, adapter):
    return model.apply({'params': params, 'lora': adapter}, tokens)

  mapped = jax.vmap(apply, in_axes=(params_axis, 0))
  jaxpr = jax.make_jaxpr(mapped)(params, adapters).jaxpr
  return sum(
    int(np.prod(shapes[1])) for shapes, batch in _dots(jaxpr) if not batch
  )


def test_mapping_over_adapters_leaves_base_products_unbatched(
  hf_config, random_params, random_adapter
):
  config = config_lib.from_hf(hf_config())
  params = random_params(config)
  adapter = random_adapter(config, 2, config_lib.TARGET_MODULES)
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), adapter)
  # The blocks are scanned, so one block's kernels are in the program.
  kernels = sum(
    leaf['kernel'][0].size
    for leaf in params['layers'].values()
    if 'kernel' in leaf
  )
  base = kernels + params['lm_head'].size
  assert _weights_in_unbatched_dots(config, params, stacked, None) >= base
  repeated = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
  assert _weights_in_unbatched_dots(config, repeated, stacked, 0) < base / 10


def test_mapped_adapters_equal_one_at_a_time(
  hf_config, random_params, random_adapter
):
  config = config_lib.from_hf(hf_config())
  params = random_params(config)
  adapter = random_adapter(config, 2, config_lib.TARGET_MODULES)
  adapters = [jax.tree.map(lambda leaf, s=s: s * leaf, adapter) for s in (1, 2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
  model, tokens = decoder.Decoder(config, lora_scale=0.5), _tokens(SHORT)

  def apply(adapter):
    return _apply(model, {'params': params, 'lora': adapter}, tokens)

  for found, adapter in zip(jax.vmap(apply)(stacked), adapters, strict=True):
    np.testing.assert_allclose(found, apply(adapter), atol=1e-5)


def test_gradient_equals_peft_with_and_without_remat(
  tmp_path, hf_config, save_reference, loss_and_gradient, peft_gradient
):
  reference = save_reference(tmp_path / 'model', hf_config())
  peft = pytest.importorskip('peft')
  import torch

  adapted = peft.get_peft_model(
    reference,
    peft.LoraConfig(
      r=2,
      lora_alpha=5,
      target_modules=['q_proj', 'o_proj', 'down_proj'],
      task_type='CAUSAL_LM',
    ),
  )
  for name, parameter in adapted.named_parameters():
    if 'lora_B' in name:
      torch.nn.init.normal_(parameter, std=0.3)
  adapted.save_pretrained(tmp_path / 'adapter')
  config, params = load.load(tmp_path / 'model')
  adapter, scale = load.load_adapter(tmp_path / 'adapter', config)
  tokens = _tokens(SHORT)
  labels = torch.asarray(tokens).long()
  loss = adapted(labels, labels=labels).loss
  loss.backward()
  for remat in (False, True):
    model = decoder.Decoder(config, lora_scale=scale, remat=remat)
    ours, gradient, _ = loss_and_gradient(model, params, adapter, tokens)
    np.testing.assert_allclose(ours, loss.item(), atol=1e-5)
    for target in ('q_proj', 'down_proj'):
      for factor in 'ab':
        found = gradient['layers'][target][factor]
        expected = peft_gradient(adapted, config, target, factor)
        assert np.abs(found).max() > 1e-3
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_dropout_acts_only_with_a_key(hf_config, random_params, random_adapter):
  config = config_lib.from_hf(hf_config())
  adapter = random_adapter(config, 2, config_lib.TARGET_MODULES)
  variables = {'params': random_params(config), 'lora': adapter}
  tokens = _tokens(SHORT)
  model = decoder.Decoder(config, lora_scale=0.5)
  dropping = model.clone(lora_dropout=0.5)
  plain = _apply(model, variables, tokens)
  np.testing.assert_array_equal(_apply(dropping, variables, tokens), plain)
  keys = {'dropout': jax.random.key(0, impl='rbg')}
  noisy = jax.jit(dropping.apply)(variables, tokens, rngs=keys)
  assert np.abs(noisy - plain).max() > 1e-2
