"""Tests of reading models, tokenizers and adapters from directories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import (
  export,
  leaves,
  load,
  sharding,
  tensor_files,
  weights,
)

EMBED = 'model.embed_tokens.weight'
UP = 'model.layers.1.mlp.up_proj.weight'


def _assert_trees_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def save(tmp_path, hf_config, random_params):
  """Returns `(**overrides) -> (directory, params)` that writes a model."""

  def write(max_shard_bytes=export.MAX_SHARD_BYTES, **overrides):
    raw = hf_config(**overrides)
    params = random_params(config_lib.from_hf(raw))
    directory = tmp_path / 'model'
    export.export_model(
      directory, params, hf_config=raw, max_shard_bytes=max_shard_bytes
    )
    return directory, params

  return write


def _edit(path, change):
  """Rewrites a safetensors file after `change(tensors)`."""
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'tie_word_embeddings': True},
    {'attention_bias': True, 'mlp_bias': True},
    {'dtype': 'bfloat16'},
    {'dtype': 'float16'},
  ],
)
def test_what_was_written_is_loaded(save, overrides):
  directory, params = save(**overrides)
  config, found = load.load(directory)
  assert config.dtype == overrides.get('dtype', 'float32')
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {config.dtype}
  _assert_trees_equal(found, params)


@pytest.mark.parametrize('quantization', [None, 'int8'])
def test_large_leaves_are_loaded_layer_by_layer(
  save, monkeypatch, quantization
):
  directory, _ = save()
  _, whole = load.load(directory, quantization=quantization)
  puts = []
  put = leaves._put_layer
  monkeypatch.setattr(leaves, 'WHOLE_BYTES', 0)
  # As where an accelerator has memory of its own.
  monkeypatch.setattr(leaves, '_in_host_memory', lambda mesh: False)
  monkeypatch.setattr(
    leaves, '_put_layer', lambda *args: puts.append(args) or put(*args)
  )
  _, found = load.load(directory, quantization=quantization)
  _assert_trees_equal(found, whole)
  # Each of nine leaves of each of three layers, and into donated memory.
  assert len(puts) == 9 * 3 and all(leaf.is_deleted() for leaf, *_ in puts)
  assert all(part.shape[0] == 1 for _, part, *_ in puts)


@pytest.mark.parametrize('with_mesh', [False, True])
def test_a_cpu_holds_what_was_read_without_a_copy(save, monkeypatch, with_mesh):
  directory, params = save()
  mesh = sharding.make_mesh(devices=jax.devices()[:1]) if with_mesh else None
  read, empty = [], leaves._empty
  monkeypatch.setattr(leaves, 'WHOLE_BYTES', 0)
  monkeypatch.setattr(
    leaves, '_empty', lambda *args: read.append(empty(*args)) or read[-1]
  )
  _, found = load.load(directory, mesh=mesh)
  held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(found)}
  assert held == {array.ctypes.data for array in read}
  _assert_trees_equal(found, params)


def test_names_and_orientation_are_those_of_the_format(save):
  directory, params = save()
  tensors = safetensors.numpy.load_file(directory / 'model.safetensors')
  assert len(tensors) == 2 + 1 + 3 * 9
  np.testing.assert_array_equal(
    tensors[UP], params['layers']['up_proj']['kernel'][1].T
  )
  np.testing.assert_array_equal(tensors[EMBED], params['embed_tokens'])
  np.testing.assert_array_equal(tensors['lm_head.weight'], params['lm_head'].T)


def test_tall_kernels_are_transposed_in_panels(tmp_path, hf_config):
  # More rows than one panel, and no multiple of it.
  raw = hf_config(
    intermediate_size=2 * tensor_files.PANEL + 3, num_hidden_layers=1
  )
  config = config_lib.from_hf(raw)
  shapes = {'gate_proj': (16, 515), 'down_proj': (515, 16)}
  draw = np.random.default_rng(0).normal
  params = {}
  for weight in weights.table(config):
    weights.put(params, weight.path, jnp.float32(draw(size=weight.shape)))
  for target, shape in shapes.items():
    assert params['layers'][target]['kernel'].shape == (1, *shape)
  export.export_model(tmp_path / 'model', params, hf_config=raw)
  _assert_trees_equal(load.load(tmp_path / 'model')[1], params)


def test_mixed_dtypes_become_one(save):
  directory, params = save(dtype='bfloat16')

  def widen_norms(tensors):
    for name in tensors:
      if 'norm' in name:
        tensors[name] = tensors[name].astype(np.float32)

  _edit(directory / 'model.safetensors', widen_norms)
  _assert_trees_equal(load.load(directory)[1], params)
  wide = load.load(directory, dtype=jnp.float32)[1]
  _assert_trees_equal(wide, jax.tree.map(jnp.float32, params))


def test_several_files_are_read_through_their_index(save):
  directory, params = save(max_shard_bytes=4000)
  assert len(list(directory.glob('model-*.safetensors'))) > 3
  _assert_trees_equal(load.load(directory)[1], params)


def test_a_mesh_places_every_leaf(save):
  directory, params = save()
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  _, found = load.load(directory, mesh=mesh)
  _assert_trees_equal(found, params)
  assert found['lm_head'].sharding == jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('fsdp', 'tp')
  )
  # Loaded without a mesh, a model is not committed to a device.
  assert not load.load(directory)[1]['lm_head'].committed


def test_rotary_buffers_are_ignored(save):
  directory, params = save()
  buffer = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  _edit(
    directory / 'model.safetensors',
    lambda tensors: tensors.update({buffer: np.zeros(5, np.float32)}),
  )
  _assert_trees_equal(load.load(directory)[1], params)


def test_a_tied_head_may_be_stored_but_not_differ(save):
  directory, params = save(tie_word_embeddings=True)
  path = directory / 'model.safetensors'
  _edit(
    path, lambda tensors: tensors.update({'lm_head.weight': tensors[EMBED]})
  )
  _assert_trees_equal(load.load(directory)[1], params)

  def change(tensors):
    tensors['lm_head.weight'][-1, -1] += 1

  _edit(path, change)
  with pytest.raises(ValueError, match='lm_head.weight in .* differs from'):
    load.load(directory)


def test_no_bar_is_drawn_outside_a_terminal(save, capfd):
  directory, _ = save()
  load.load(directory)
  load.load(directory, progress=False)
  assert capfd.readouterr().err == ''


def _remove(name):
  return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
  'change, message',
  [
    (_remove(UP), f'{UP} is missing from .*model.safetensors .1 of 30'),
    (_remove('lm_head.weight'), 'set tie_word_embeddings to true'),
    (
      lambda tensors: tensors.update({UP: tensors[UP].T.copy()}),
      rf'{UP} in .*model.safetensors has shape \(16, 24\); .*\(24, 16\)',
    ),
    (
      lambda tensors: tensors.update(odd=np.zeros(2)),
      'odd in .*model.safetensors is no part of the model',
    ),
    (
      lambda tensors: tensors.update({UP: np.zeros((24, 16), np.int8)}),
      f'{UP} in .*model.safetensors is stored as I8',
    ),
  ],
)
def test_wrong_tensors_are_named(save, change, message):
  directory, _ = save()
  _edit(directory / 'model.safetensors', change)
  with pytest.raises(ValueError, match=message):
    load.load(directory)


@pytest.mark.parametrize('kept', [4, 300, -1])
def test_a_truncated_file_is_named(save, kept):
  directory, _ = save()
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match='model.safetensors is truncated'):
    load.load(directory)


def test_a_missing_or_lying_shard_is_named(save):
  directory, _ = save(max_shard_bytes=4000)
  index = directory / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  file = content['weight_map'][UP]
  content['weight_map'][UP] = content['weight_map'][EMBED]
  index.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=f'{UP} is not in .*model-00001'):
    load.load(directory)
  content['weight_map'][UP] = '../elsewhere.safetensors'
  index.write_text(json.dumps(content))
  with pytest.raises(ValueError, match='outside its directory'):
    load.load(directory)
  content['weight_map'][UP] = file
  index.write_text(json.dumps(content))
  (directory / file).unlink()
  with pytest.raises(ValueError, match=f'{file} is missing'):
    load.load(directory)
  index.write_text('{}')
  with pytest.raises(ValueError, match='index.json is not a valid index'):
    load.load(directory)


def test_a_tensor_in_two_shards_is_named(save):
  directory, _ = save(max_shard_bytes=4000)
  _edit(
    sorted(directory.glob('model-00002-of-*.safetensors'))[0],
    lambda tensors: tensors.update({EMBED: np.zeros((48, 16), np.float32)}),
  )
  with pytest.raises(ValueError, match=f'{EMBED} is in both .*00001.*00002'):
    load.load(directory)


def test_a_directory_without_safetensors_says_what_to_do(save):
  directory, _ = save()
  (directory / 'model.safetensors').unlink()
  with pytest.raises(ValueError, match='has no weights'):
    load.load(directory)
  (directory / 'pytorch_model.bin').touch()
  with pytest.raises(ValueError, match='pickled .*pytorch_model.bin.*convert'):
    load.load(directory)
  with pytest.raises(ValueError, match='is not a Hugging Face model directory'):
    load.load(directory / 'nowhere')


def _save_tokenizer(directory, size=6, **special):
  """Writes a word-level tokenizer with ids below a size."""
  vocabulary = {'<unk>': 0} | {f'word{i}': i for i in range(1, size)}
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='<unk>')
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, padding_side='left', **special
  ).save_pretrained(directory)


@pytest.mark.parametrize(
  'special, pad',
  [
    ({'pad_token': 'word1', 'eos_token': 'word2'}, 'word1'),
    ({'eos_token': 'word2', 'unk_token': '<unk>'}, 'word2'),
    ({'unk_token': '<unk>'}, '<unk>'),
  ],
)
def test_tokenizer_pads_on_the_right(tmp_path, special, pad):
  _save_tokenizer(tmp_path, **special)
  tokenizer = load.load_tokenizer(tmp_path)
  assert tokenizer.pad_token == pad
  padded = tokenizer(['word3', 'word3 word4'], padding=True)['input_ids']
  assert padded[0] == [3, tokenizer.pad_token_id]


def test_tokenizer_errors_say_what_is_wrong(tmp_path):
  with pytest.raises(ValueError, match='has no tokenizer'):
    load.load_tokenizer(tmp_path)
  _save_tokenizer(tmp_path)
  with pytest.raises(ValueError, match='has no pad, eos or unk token'):
    load.load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match='cannot be read'):
    load.load_tokenizer(tmp_path)


class _Words:
  eos_token_id = 2


@pytest.mark.parametrize(
  ('files', 'want'),
  [
    ({}, (2,)),
    ({'generation_config.json': {'eos_token_id': [7, 5]}}, (2, 5, 7)),
    (
      {
        'generation_config.json': {'eos_token_id': 9},
        'config.json': {'eos_token_id': [2, 4]},
      },
      (2, 4, 9),
    ),
    ({'config.json': {'eos_token_id': None}}, (2,)),
  ],
)
def test_every_named_token_ends_an_answer(tmp_path, files, want):
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  assert load.load_stop_ids(tmp_path, _Words()) == want


@pytest.mark.parametrize('content', ['[1]', '{', '{"eos_token_id": "</s>"}'])
def test_unreadable_stop_tokens_are_refused(tmp_path, content):
  (tmp_path / 'generation_config.json').write_text(content)
  with pytest.raises(ValueError, match='generation_config'):
    load.load_stop_ids(tmp_path, _Words())


def test_ids_beyond_the_embedding_are_refused(tmp_path, hf_config):
  _save_tokenizer(tmp_path, size=48, eos_token='word2')
  tokenizer = load.load_tokenizer(tmp_path)
  load.check_tokenizer(tokenizer, config_lib.from_hf(hf_config()))
  small = config_lib.from_hf(hf_config(vocab_size=47))
  message = "'word47' the id 47, but the model embeds vocab_size=47"
  with pytest.raises(ValueError, match=message):
    load.check_tokenizer(tokenizer, small)


@pytest.fixture
def adapter_directory(tmp_path, hf_config, random_adapter):
  """Returns a config, an adapter and where it is saved with scale 2.5."""
  config = config_lib.from_hf(hf_config())
  adapter = random_adapter(config, 4, ['q_proj', 'down_proj'])
  directory = tmp_path / 'adapter'
  export.export_adapter(
    directory, adapter, config=config, scale=2.5, base_model_name='tiny'
  )
  return config, adapter, directory


def test_adapter_is_loaded_as_it_was_written(adapter_directory):
  config, adapter, directory = adapter_directory
  found, scale = load.load_adapter(directory, config)
  _assert_trees_equal(found, adapter)
  assert scale == 2.5


def _edit_json(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_rank_stabilized_scale_is_understood(adapter_directory):
  config, _, directory = adapter_directory
  _edit_json(directory / 'adapter_config.json', use_rslora=True)
  assert load.load_adapter(directory, config)[1] == 10 / 2


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'use_dora': True}, 'use_dora=True is not supported'),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save=.*is not supported'),
    ({'rank_pattern': {'q_proj': 8}}, 'rank_pattern=.*is not supported'),
    ({'init_lora_weights': 'pissa'}, "='pissa' is not supported"),
    ({'r': None}, "adapter_config.json lacks the field 'r'"),
    ({'r': 3}, r'q_proj.lora_A.weight in .* has shape \(4, 16\)'),
    (
      {'target_modules': ['q_proj', 'down_proj', 'k_proj']},
      'k_proj.lora_A.weight is missing from .*adapter_model.safetensors',
    ),
  ],
)
def test_adapter_configs_beyond_plain_lora_are_refused(
  adapter_directory, fields, message
):
  config, _, directory = adapter_directory
  _edit_json(directory / 'adapter_config.json', **fields)
  with pytest.raises(ValueError, match=message):
    load.load_adapter(directory, config)


def test_adapter_tensors_of_another_layout_are_refused(adapter_directory):
  config, _, directory = adapter_directory
  path = directory / 'adapter_model.safetensors'
  whole = path.read_bytes()
  name = 'base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight'
  _edit(path, lambda tensors: tensors.pop(name))
  with pytest.raises(ValueError, match=f'{name} is missing'):
    load.load_adapter(directory, config)
  path.write_bytes(whole)

  def drop_prefix(tensors):
    for key in list(tensors):
      tensors[key.removeprefix('base_model.model.')] = tensors.pop(key)

  _edit(path, drop_prefix)
  with pytest.raises(ValueError, match='^model.layers.0.* is no LoRA factor'):
    load.load_adapter(directory, config)
  path.write_bytes(whole[:100])
  with pytest.raises(ValueError, match='adapter_model.safetensors is trunc'):
    load.load_adapter(directory, config)
  (directory / 'adapter_config.json').unlink()
  with pytest.raises(ValueError, match='adapter_config.json is missing'):
    load.load_adapter(directory, config)
