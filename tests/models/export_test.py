"""Tests of writing adapters and models, against peft and transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fedjax_safety import lora
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder, export, load, tensor_files, weights

TARGETS = ('q_proj', 'v_proj', 'down_proj')
SCALE = 1.5


@pytest.fixture
def model(tmp_path, hf_config, random_params, random_adapter):
  """Returns a config, its parameters, an adapter and the saved model."""
  raw = hf_config()
  config = config_lib.from_hf(raw)
  params, adapter = random_params(config), random_adapter(config, 4, TARGETS)
  directory = tmp_path / 'model'
  export.export_model(directory, params, hf_config=raw)
  return config, params, adapter, directory


@pytest.fixture
def export_adapter(tmp_path, model):
  """Returns `(**overrides) -> directory` that writes the adapter."""
  config, _, adapter, base = model

  def write(**overrides):
    arguments = {
      'adapter': adapter,
      'config': config,
      'scale': SCALE,
      'base_model_name': str(base),
    }
    export.export_adapter(tmp_path / 'adapter', **arguments | overrides)
    return tmp_path / 'adapter'

  return write


def _logits(config, params, adapter=None):
  """Returns logits on some tokens, and the tokens."""
  tokens = np.random.default_rng(0).integers(0, 48, (2, 9), np.int32)
  variables = {'params': params} | ({'lora': adapter} if adapter else {})
  model = decoder.Decoder(config, lora_scale=SCALE)
  return jax.jit(model.apply)(variables, tokens), tokens


def _torch_logits(torch_model, tokens):
  import torch

  with torch.no_grad():
    return torch_model(torch.asarray(tokens).long()).logits.numpy()


def _torch_model(directory):
  pytest.importorskip('torch')
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(directory)


def test_peft_computes_what_we_compute(model, export_adapter):
  peft = pytest.importorskip('peft')
  config, params, adapter, base = model
  ours, tokens = _logits(config, params, adapter)
  adapted = peft.PeftModel.from_pretrained(_torch_model(base), export_adapter())
  theirs = _torch_logits(adapted, tokens)
  np.testing.assert_allclose(theirs, ours, atol=1e-4)
  plain, _ = _logits(config, params)
  assert np.abs(ours - plain).max() > 0.1


def test_adapter_files_are_those_that_servers_read(export_adapter):
  directory = export_adapter()
  raw = json.loads((directory / 'adapter_config.json').read_text())
  expected = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'r': 4,
    'lora_alpha': 6,
    'target_modules': list(TARGETS),
    'bias': 'none',
    'use_dora': False,
    'modules_to_save': None,
    'inference_mode': True,
  }
  assert expected.items() <= raw.items()
  assert isinstance(raw['lora_alpha'], int)
  tensors = safetensors.numpy.load_file(directory / 'adapter_model.safetensors')
  prefix = 'base_model.model.model.layers'
  assert len(tensors) == 2 * 3 * len(TARGETS)
  assert tensors[f'{prefix}.2.mlp.down_proj.lora_A.weight'].shape == (4, 24)
  assert tensors[f'{prefix}.0.self_attn.v_proj.lora_B.weight'].shape == (20, 4)


def test_padded_modules_change_nothing(model, export_adapter):
  config, params, adapter, _ = model
  directory = export_adapter(pad_modules=['k_proj', 'v_proj'])
  padded, scale = load.load_adapter(directory, config)
  assert list(padded['layers']) == ['q_proj', 'k_proj', 'v_proj', 'down_proj']
  assert not padded['layers']['k_proj']['a'].any()
  merged = lora.merge(params, padded, scale)
  expected = lora.merge(params, adapter, scale)
  jax.tree.map(np.testing.assert_array_equal, merged, expected)


def test_a_scale_that_is_no_fraction_survives(model, export_adapter):
  directory = export_adapter(scale=0.1234567)
  _, scale = load.load_adapter(directory, model[0])
  assert scale == pytest.approx(0.1234567, rel=1e-6)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'scale': 0.0}, 'scale=0.0 must be greater than 0'),
    ({'pad_modules': ['qkv']}, "pad_modules='qkv' is unknown; known: q_proj"),
    ({'adapter': {'layers': {}}}, 'an adapter holds projections'),
    ({'adapter': {'layers': {'wq': {}}}}, r"got \['layers'\] and \['wq'\]"),
    (
      {'adapter': {'layers': {'q_proj': {'a': np.zeros((3, 16, 4))}}}},
      'the adapter of q_proj has shapes',
    ),
  ],
)
def test_what_is_no_adapter_is_refused(export_adapter, change, message):
  with pytest.raises(ValueError, match=message):
    export_adapter(**change)


def test_stacked_and_broken_adapters_are_refused(model, export_adapter):
  adapter = model[2]
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), adapter)
  with pytest.raises(ValueError, match='_proj has shapes'):
    export_adapter(adapter=stacked)
  broken = jax.tree.map(lambda leaf: leaf / 0, adapter)
  with pytest.raises(ValueError, match='values that are not finite'):
    export_adapter(adapter=broken)


def _rename(tensors):
  return {
    name.replace('self_attn', 'attn'): value for name, value in tensors.items()
  }


def _without_prefix(tensors):
  return {
    name.removeprefix('base_model.model.'): value
    for name, value in tensors.items()
  }


def _zero_one(tensors):
  first = next(iter(tensors))
  return tensors | {first: np.zeros_like(tensors[first])}


def _narrow(tensors):
  return {name: value.astype(np.float16) for name, value in tensors.items()}


@pytest.mark.parametrize(
  'spoil', [_rename, _without_prefix, _zero_one, _narrow]
)
def test_a_spoiled_export_never_appears(
  tmp_path, model, export_adapter, monkeypatch, spoil
):
  save_file = safetensors.numpy.save_file
  monkeypatch.setattr(
    safetensors.numpy,
    'save_file',
    lambda tensors, *args, **kwargs: save_file(spoil(tensors), *args, **kwargs),
  )
  before = sorted(tmp_path.iterdir())
  with pytest.raises(ValueError, match='adapter_model.safetensors'):
    export_adapter()
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize('spoil', [_rename, _without_prefix, _zero_one])
def test_an_adapter_that_reads_back_otherwise_never_appears(
  tmp_path, export_adapter, monkeypatch, spoil
):
  # Spoiled before the file's own check, so that only reading the adapter back
  # as an adapter can tell.
  write = tensor_files.write
  monkeypatch.setattr(
    tensor_files, 'write', lambda path, tensors: write(path, spoil(tensors))
  )
  before = sorted(tmp_path.iterdir())
  with pytest.raises(ValueError, match='no LoRA factor|does not read back'):
    export_adapter()
  assert sorted(tmp_path.iterdir()) == before


def test_an_existing_directory_is_not_overwritten(export_adapter):
  directory = export_adapter()
  before = (directory / 'adapter_model.safetensors').read_bytes()
  with pytest.raises(ValueError, match='exists and is not an empty directory'):
    export_adapter(scale=2.0)
  assert (directory / 'adapter_model.safetensors').read_bytes() == before


@pytest.mark.parametrize('max_shard_bytes', [10**9, 4000])
def test_transformers_computes_what_we_merge(tmp_path, model, max_shard_bytes):
  config, params, adapter, source = model
  for name in ('tokenizer.json', 'generation_config.json'):
    (source / name).write_text('{}')
  merged = tmp_path / 'merged'
  export.export_merged(
    merged,
    params,
    adapter,
    config=config,
    source_directory=source,
    scale=SCALE,
    max_shard_bytes=max_shard_bytes,
  )
  assert (merged / 'tokenizer.json').read_text() == '{}'
  assert (merged / 'model.safetensors').exists() == (max_shard_bytes > 4000)
  found = load.load(merged)[1]
  jax.tree.map(
    lambda left, right: np.testing.assert_allclose(left, right, atol=1e-6),
    found,
    lora.merge(params, adapter, SCALE),
  )
  ours, tokens = _logits(config, params, adapter)
  theirs = _torch_logits(_torch_model(merged), tokens)
  np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_shards_stay_within_their_size_and_total(tmp_path, model):
  config, params, _, _ = model
  raw = json.loads((model[3] / 'config.json').read_text())
  directory = tmp_path / 'sharded'
  export.export_model(directory, params, hf_config=raw, max_shard_bytes=4000)
  index = json.loads((directory / 'model.safetensors.index.json').read_text())
  sizes = {}
  for file in directory.glob('model-*.safetensors'):
    tensors = safetensors.numpy.load_file(file)
    sizes[file.name] = sum(value.nbytes for value in tensors.values())
    assert all(index['weight_map'][name] == file.name for name in tensors)
  assert max(sizes.values()) <= 4000
  assert sum(sizes.values()) == index['metadata']['total_size']
  assert len(index['weight_map']) == sum(
    len(weight.names) for weight in weights.table(config)
  )


def test_merged_export_keeps_the_base_dtype(tmp_path, model):
  config, params, adapter, source = model
  narrow = jax.tree.map(jnp.bfloat16, params)
  export.export_merged(
    tmp_path / 'merged',
    narrow,
    adapter,
    config=config,
    source_directory=source,
    scale=SCALE,
    progress=False,
  )
  raw = json.loads((tmp_path / 'merged' / 'config.json').read_text())
  assert raw['dtype'] == 'bfloat16'
  found = load.load(tmp_path / 'merged')[1]
  jax.tree.map(
    np.testing.assert_array_equal, found, lora.merge(narrow, adapter, SCALE)
  )


def test_merged_export_checks_its_source(tmp_path, model, hf_config):
  config, params, adapter, source = model
  (source / 'config.json').write_text(json.dumps(hf_config(vocab_size=49)))
  with pytest.raises(ValueError, match='config.json describes another model'):
    export.export_merged(
      tmp_path / 'merged',
      params,
      adapter,
      config=config,
      source_directory=source,
      scale=SCALE,
    )
  assert not (tmp_path / 'merged').exists()


def test_a_half_precision_model_is_written_and_read(tmp_path, model):
  config, params, _, source = model
  raw = json.loads((source / 'config.json').read_text())
  half = tmp_path / 'half'
  export.export_model(half, params, hf_config=raw, dtype='float16')
  written = json.loads((half / 'config.json').read_text())
  assert written == raw | {'dtype': 'float16'}
  assert written['architectures'] == ['LlamaForCausalLM']
  stored = safetensors.numpy.load_file(half / 'model.safetensors')
  assert {value.dtype for value in stored.values()} == {np.dtype('float16')}
  found = load.load(half, dtype='float32')[1]
  rounded = jax.tree.map(lambda leaf: jnp.float32(jnp.float16(leaf)), params)
  jax.tree.map(np.testing.assert_array_equal, found, rounded)


def test_values_beyond_half_precision_are_refused(tmp_path, model):
  _, params, _, source = model
  raw = json.loads((source / 'config.json').read_text())
  params['norm']['scale'] = params['norm']['scale'].at[3].set(1e5)
  message = 'model.norm.weight has values that are not finite in float16'
  with pytest.raises(ValueError, match=message):
    export.export_model(
      tmp_path / 'half', params, hf_config=raw, dtype='float16'
    )
  export.export_model(
    tmp_path / 'wide', params, hf_config=raw, dtype='bfloat16'
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(tmp_path, model, dtype, value):
  _, params, _, source = model
  raw = json.loads((source / 'config.json').read_text())
  params['lm_head'] = params['lm_head'].at[3, 5].set(value)
  message = f'lm_head.weight has values that are not finite in {dtype}'
  with pytest.raises(ValueError, match=message):
    export.export_model(tmp_path / 'bad', params, hf_config=raw, dtype=dtype)
  assert not (tmp_path / 'bad').exists()


@pytest.mark.parametrize(
  'spoil, message',
  [
    (lambda p: p['layers'].pop('up_proj'), 'lack layers/up_proj/kernel'),
    (lambda p: p.update(extra=p['norm']['scale']), 'the unknown leaf extra'),
    (
      lambda p: p.update(lm_head=p['lm_head'].T),
      r'lm_head has shape \(48, 16\); the config implies \(16, 48\)',
    ),
  ],
)
def test_parameters_of_another_model_are_refused(
  tmp_path, model, spoil, message
):
  _, params, _, source = model
  raw = json.loads((source / 'config.json').read_text())
  spoil(params)
  with pytest.raises(ValueError, match=message):
    export.export_model(tmp_path / 'other', params, hf_config=raw)
  assert not (tmp_path / 'other').exists()
