"""Tests of the attention backends against XLA's, and of their choice."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from fedjax_safety.models import attention, decoder, fused_attention
from fedjax_safety.models import config as config_lib

LENGTH, CLIENTS = 9, 2


@pytest.fixture
def on_cuda(monkeypatch):
  """Lets cuDNN's calls be traced where there is no cuDNN."""
  from jax._src.cudnn import fused_attention_stablehlo as stablehlo

  monkeypatch.setattr(stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(stablehlo, 'check_compute_capability', lambda _: True)


@pytest.fixture
def interpreted(monkeypatch):
  """Lets splash attention run where there is no TPU."""
  monkeypatch.setattr(
    splash_attention,
    'make_splash_mha',
    functools.partial(splash_attention.make_splash_mha, interpret=True),
  )


def _config(hf_config, family, **overrides):
  return config_lib.from_hf(hf_config(family, **overrides))


def _losses(model, params, tokens):
  """Returns a function of a stack of adapters: their losses and gradients."""

  def loss(adapter, tokens):
    variables = {'params': params, 'lora': adapter}
    return jnp.square(model.apply(variables, tokens)).mean()

  step = jax.vmap(jax.value_and_grad(loss), spmd_axis_name='clients')
  return jax.jit(lambda adapters: step(adapters, tokens))


# Plain and grouped heads; a window everywhere; soft caps and a window in every
# other layer.
@pytest.mark.parametrize(
  'family, layers', [('llama', 1), ('mistral', 1), ('gemma2', 2)]
)
def test_splash_attention_gives_what_xla_gives(
  family, layers, hf_config, random_params, random_adapter, interpreted
):
  config = _config(hf_config, family, num_hidden_layers=layers)
  params = random_params(config)
  adapter = random_adapter(config, 2, ['q_proj', 'v_proj'])
  adapters = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), adapter)
  tokens = np.random.default_rng(0).integers(0, 48, (CLIENTS, 2, LENGTH))
  mesh = jax.make_mesh(
    (1, 1, 1),
    ('clients', 'fsdp', 'tp'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  found = []
  for backend in (attention.XLA, attention.SPLASH):
    model = decoder.Decoder(config, mesh=mesh, attention=backend)
    found.append(_losses(model, params, tokens)(adapters))
  expected, got = found
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=2e-4, atol=1e-5 * np.abs(a).max()
    ),
    expected,
    got,
  )


def test_splash_attention_over_several_blocks(interpreted, monkeypatch):
  monkeypatch.setattr(fused_attention, '_MOST_ROWS', 128)
  length, window = 200, 150
  config = types.SimpleNamespace(
    attention_cap=None, windowed=(True,), window=window
  )
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.float32(rng.normal(size=(1, length, heads, 8))) for heads in (2, 1, 1)
  )
  distance = np.arange(length)[:, None] - np.arange(length)
  mask = jnp.asarray((distance >= 0) & (distance < window))[None]

  def splash(q, k, v):
    return fused_attention.attend(
      q, k, v, None, config=config, backend=attention.SPLASH, mesh=None
    )

  def loss(attend):
    return lambda q, k, v: jnp.square(attend(q, k, v)).sum()

  expected, got = (
    jax.jit(jax.value_and_grad(loss(attend), argnums=(0, 1, 2)))(q, k, v)
    for attend in (lambda *args: attention.attend(*args, mask), splash)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    expected,
    got,
  )


def _lowered(model, params, adapters, tokens):
  """Returns the text of a training step, lowered for a GPU."""
  traced = _losses(model, params, tokens).trace(adapters)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


def test_cudnn_gets_clients_as_examples(
  hf_config, random_params, random_adapter, on_cuda
):
  config = _config(hf_config, 'mistral', head_dim=16, dtype='bfloat16')
  params = random_params(config)
  # Nothing of the first layer's keys depends on a client.
  adapter = random_adapter(config, 2, ['q_proj', 'v_proj'])
  adapters = jax.tree.map(lambda x: jnp.stack([x] * CLIENTS), adapter)
  tokens = jnp.zeros((CLIENTS, 3, LENGTH), jnp.int32)
  model = decoder.Decoder(config, attention=attention.CUDNN)
  text = _lowered(model, params, adapters, tokens)
  calls = [line for line in text.splitlines() if 'fmhaSoftmax' in line]
  assert any('Backward' in line for line in calls)
  # 2 clients of 3 examples each, 4 heads, 2 of keys; an even length.
  for line in calls:
    assert f'{CLIENTS * 3}x{LENGTH + 1}x4x16xbf16' in line
    assert f'{CLIENTS * 3}x{LENGTH + 1}x2x16xbf16' in line
    assert r'sliding_window_length\22: 3' in line


def _device(platform, capability=None):
  return types.SimpleNamespace(
    platform=platform, device_kind='a device', compute_capability=capability
  )


CPU, TPU = _device('cpu'), _device('tpu')
HOPPER, AMPERE, AMD = (_device('gpu', c) for c in ('9.0', '8.0', 'gfx942'))


def _choose(name, config, device, *, tp=1, length=512):
  return attention.choose(name, config, device, tp=tp, length=length)


def test_auto_takes_the_kernel_of_the_device(hf_config):
  half = _config(hf_config, 'llama', head_dim=128, dtype='bfloat16')
  assert _choose('auto', half, CPU) == 'xla'
  assert _choose('auto', half, TPU) == 'splash'
  assert _choose('auto', half, HOPPER) == _choose('auto', half, AMPERE)
  assert _choose('auto', half, HOPPER) == 'cudnn'
  assert _choose('xla', half, HOPPER) == 'xla'
  assert _choose('auto', half, HOPPER, length=64) == 'xla'
  assert _choose('cudnn', half, HOPPER, length=64) == 'cudnn'


@pytest.mark.parametrize(
  'name, device, overrides, tp, why',
  [
    ('cudnn', CPU, {}, 1, 'NVIDIA'),
    ('cudnn', AMD, {}, 1, 'NVIDIA'),
    ('cudnn', HOPPER, {'dtype': 'float32'}, 1, 'model.dtype=float32'),
    ('cudnn', HOPPER, {'model_type': 'gemma2'}, 1, 'soft cap'),
    ('cudnn', HOPPER, {'head_dim': 10}, 1, 'head_dim=10'),
    ('cudnn', AMPERE, {'head_dim': 256}, 1, 'head_dim=256'),
    ('cudnn', HOPPER, {}, 4, '2 key-value heads over tp=4'),
    ('splash', CPU, {}, 1, 'TPU'),
    ('splash', TPU, {'dtype': 'float16'}, 1, 'float16'),
    ('splash', TPU, {}, 4, '2 key-value heads over tp=4'),
  ],
)
def test_what_a_kernel_cannot_do_is_refused_or_left_to_xla(
  name, device, overrides, tp, why, hf_config
):
  sizes = {'model_type': 'llama', 'head_dim': 128, 'dtype': 'bfloat16'}
  config = config_lib.from_hf(hf_config(**(sizes | overrides)))
  with pytest.raises(ValueError, match=f'(?s)attention.*{name}.*{why}'):
    _choose(name, config, device, tp=tp)
  assert _choose('auto', config, device, tp=tp) == 'xla'
