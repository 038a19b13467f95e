"""Tests of meshes and of a model that is spread over eight devices."""

import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from fedjax_safety import lora
from fedjax_safety.models import (
  batcher,
  decoder,
  export,
  families,
  sharding,
  weights,
)
from fedjax_safety.models import config as config_lib

P = jax.sharding.PartitionSpec

# Sizes that every axis of the meshes below divides.
SIZES = {
  'vocab_size': 48,
  'head_dim': 4,
  'num_hidden_layers': 2,
  'attention_bias': True,
}

# Runs on eight devices: loads the model, and maps loss and gradient over two
# adapters; prints digests to compare with those of one device.
PROGRAM = """
  import json, sys
  import jax, jax.numpy as jnp, numpy as np
  from fedjax_safety import lora
  from fedjax_safety.models import (
    decoder, leaves, load, sharding, tensor_files
  )

  P, NamedSharding = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
  def values_of(tree):
    return {
      jax.tree_util.keystr(path): np.asarray(leaf).tolist()
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  read, sizes_read = tensor_files.TensorFiles.read, []

  def counting_read(*args):
    out = read(*args)
    sizes_read.append(out.size)
    return out

  tensor_files.TensorFiles.read = counting_read
  for sizes in json.loads(sys.argv[2]):
    sizes_read.clear()
    # First as a CPU loads, then layer by layer, as an accelerator large leaves.
    if sizes == [1, 4, 2]:
      leaves.WHOLE_BYTES, leaves._in_host_memory = 0, lambda mesh: False
    mesh = sharding.make_mesh(*sizes)
    config, params = load.load(sys.argv[1], mesh=mesh)
    split = {
      jax.tree_util.keystr(path): leaf.sharding.shard_shape(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    adapter = lora.init(
      jax.random.key(0), params, rank=2, target_modules=['q_proj', 'down_proj']
    )
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1]), adapter)
    stacked = sharding.place(
      stacked, mesh, sharding.adapter_specs(stacked, stacked=True)
    )
    tokens = np.random.default_rng(0).integers(0, 48, (2, 4, 9), np.int32)
    tokens = jax.device_put(
      tokens, NamedSharding(mesh, P('clients', 'fsdp'))
    )
    model = decoder.Decoder(config)

    def loss(adapter, params, tokens):
      logits = model.apply({'params': params, 'lora': adapter}, tokens)
      return jnp.square(logits).mean(), logits

    step = jax.jit(jax.vmap(
      jax.grad(loss, has_aux=True), (0, None, 0), spmd_axis_name='clients'
    ))
    with jax.set_mesh(mesh):
      gradient, logits = step(stacked, params, tokens)
    print(json.dumps({
      'params': values_of(params),
      'split': split,
      'numbers_read': sum(sizes_read),
      'gradient': values_of(gradient),
      'logits': np.asarray(logits).tolist(),
    }))
"""

# Generates on eight devices; prints the tokens, and every collective of a step.
GENERATE = """
  import json, re, sys
  import numpy as np
  from fedjax_safety.models import (
    batcher, decoder, load, sharding, stepper
  )

  GATHER = r'= [a-z0-9]+\\[([0-9,]*)\\]\\S* all-gather'
  mesh = sharding.make_mesh(2, 2, 2)
  config, params = load.load(sys.argv[1], mesh=mesh)
  model = decoder.Decoder(config)
  requests = [
    batcher.Request(prompt, np.zeros(2, np.uint32), 5)
    for prompt in json.loads(sys.argv[2])
  ]
  found = dict(batcher.run(
    model, params, {}, requests,
    rows=4, new_slots=5, length_bucket=8, stop_ids=(),
  ))
  table = stepper.empty(config, rows=4, slots=13, mesh=mesh)
  step = stepper.extend.lower(
    model, params, {}, table, np.ones(4, bool), np.int32(4), prompt_slots=8,
    num_steps=5, stop_ids=(), num_top=None, greedy=True, mesh=mesh,
  ).compile()
  print(json.dumps({
    'tokens': [found[i].tolist() for i in range(len(requests))],
    'split': table.cache.layers[0][0].sharding.shard_shape((4, 2, 13, 4)),
    'gathered': re.findall(GATHER, step.as_text()),
  }))
"""

# Looks tokens up, then keeps the examples split, in our partition of the
# embedding and in one that would be wrong.
LOOKUP = """
  import sys
  import jax, jax.numpy as jnp
  from fedjax_safety.models import sharding

  P, NamedSharding = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
  mesh = sharding.make_mesh(2, 2, 2)
  tokens = jax.device_put(
    jnp.zeros((2, 4, 9), int), NamedSharding(mesh, P('clients', 'fsdp'))
  )

  def lookup(table, tokens):
    x = jax.lax.with_sharding_constraint(table[tokens], P('fsdp', None, None))
    return x @ table.T

  mapped = jax.jit(jax.vmap(lookup, (None, 0), spmd_axis_name='clients'))
  for spec in (sharding.spec_of(('embed_tokens',)), P('tp', 'fsdp')):
    table = jax.device_put(jnp.ones((48, 16)), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
      mapped.lower(table, tokens).compile()
    print('compiled', file=sys.stderr, flush=True)
"""

WARNING = 'Involuntary full rematerialization'


def _run_on_eight(program, *arguments):
  """Runs a program in a fresh process; returns its output and its errors."""
  root = str(pathlib.Path(sharding.__file__).parents[2])
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '8',
    # A program that was compiled before is not warned of again.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'TF_CPP_MIN_LOG_LEVEL': '0',
    'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]),
  }
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(program), *arguments],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, done.stderr


@pytest.fixture
def model(tmp_path, hf_config, random_params):
  """Returns a model and the directory in which it is saved."""
  raw = hf_config(**SIZES)
  config = config_lib.from_hf(raw)
  params = random_params(config)
  export.export_model(tmp_path / 'model', params, hf_config=raw)
  return config, params, tmp_path / 'model'


def _on_one_device(config, params):
  """Does what PROGRAM does, without a mesh."""
  adapter = lora.init(
    jax.random.key(0), params, rank=2, target_modules=['q_proj', 'down_proj']
  )
  stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 0.1]), adapter)
  tokens = np.random.default_rng(0).integers(0, 48, (2, 4, 9), np.int32)
  model = decoder.Decoder(config)

  def loss(adapter, tokens):
    logits = model.apply({'params': params, 'lora': adapter}, tokens)
    return (logits**2).mean(), logits

  return jax.jit(jax.vmap(jax.grad(loss, has_aux=True)))(stacked, tokens)


def _assert_close(found, expected):
  """Compares a record of the program with a tree, leaf by leaf."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
    np.testing.assert_allclose(
      found[jax.tree_util.keystr(path)], leaf, atol=1e-5 * np.abs(leaf).max()
    )


def test_eight_devices_equal_one(model):
  config, params, directory = model
  output, errors = _run_on_eight(
    PROGRAM, str(directory), '[[2, 2, 2], [1, 4, 2]]'
  )
  assert WARNING not in errors
  gradient, logits = _on_one_device(config, params)
  first, second = records = [json.loads(line) for line in output.splitlines()]
  for record in records:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      found = np.float32(record['params'][jax.tree_util.keystr(path)])
      np.testing.assert_array_equal(found, leaf)
    # Devices that hold the same slice share one reading of it.
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert record['numbers_read'] == numbers
    # Sums over 16 to 48 terms in another order.
    np.testing.assert_allclose(record['logits'], logits, atol=1e-5)
    _assert_close(record['gradient'], gradient)
  kernel = "['layers']['q_proj']['kernel']"
  assert first['split'][kernel] == [2, 8, 8]
  assert second['split'][kernel] == [2, 4, 8]
  assert second['split']["['embed_tokens']"] == [24, 16]


def test_generation_leaves_the_weights_where_they_are(model):
  config, params, directory = model
  rng = np.random.default_rng(2)
  prompts = [rng.integers(0, 48, n).tolist() for n in (3, 7, 2, 5, 4, 6)]
  output, _ = _run_on_eight(GENERATE, str(directory), json.dumps(prompts))
  record = json.loads(output)
  alone = batcher.run(
    decoder.Decoder(config),
    params,
    {},
    [batcher.Request(p, np.zeros(2, np.uint32), 5) for p in prompts],
    rows=2,
    new_slots=5,
    length_bucket=8,
    stop_ids=(),
  )
  for index, tokens in alone:
    assert record['tokens'][index] == tokens.tolist()
  # Rows over clients and fsdp, heads over tp.
  assert record['split'] == [1, 1, 13, 4]
  # Of a token a row, and of nothing as large as a kernel's shard.
  sizes = [math.prod(map(int, s.split(','))) for s in record['gathered']]
  assert max(sizes, default=0) < 16 * 8 / 4


def test_token_lookup_does_not_gather_the_table():
  _, errors = _run_on_eight(LOOKUP)
  ours, wrong, _ = errors.split('compiled')
  assert WARNING not in ours
  assert WARNING in wrong


def _is_spec(node):
  return isinstance(node, P)


def test_every_leaf_has_a_partition_of_its_rank(hf_config, random_params):
  raw = hf_config(attention_bias=True, mlp_bias=True)
  params = random_params(config_lib.from_hf(raw))
  specs = sharding.param_specs(jax.eval_shape(lambda: params))
  assert jax.tree.structure(specs, is_leaf=_is_spec) == jax.tree.structure(
    params
  )
  for spec, leaf in zip(
    jax.tree.leaves(specs, is_leaf=_is_spec),
    jax.tree.leaves(params),
    strict=True,
  ):
    assert len(spec) in (0, leaf.ndim)
  blocks = specs['layers']
  assert specs['embed_tokens'] == P('tp', None)
  assert specs['lm_head'] == P('fsdp', 'tp')
  assert blocks['k_proj'] == {
    'kernel': P(None, 'fsdp', 'tp'),
    'bias': P(None, 'tp'),
  }
  assert blocks['down_proj'] == {'kernel': P(None, 'tp', 'fsdp'), 'bias': P()}


@pytest.mark.parametrize('family', families.FAMILIES)
def test_every_weight_of_every_family_has_a_partition(hf_config, family):
  for weight in weights.table(config_lib.from_hf(hf_config(family))):
    assert len(sharding.spec_of(weight.path)) in (0, len(weight.shape))


def test_factors_are_split_like_their_kernel():
  pair = {'a': None, 'b': None}
  adapter = {'layers': {'up_proj': pair, 'o_proj': pair}}
  specs = sharding.adapter_specs(adapter)['layers']
  assert specs['up_proj'] == {
    'a': P(None, 'fsdp', None),
    'b': P(None, None, 'tp'),
  }
  assert specs['o_proj'] == {
    'a': P(None, 'tp', None),
    'b': P(None, None, 'fsdp'),
  }
  stacked = sharding.adapter_specs(adapter, stacked=True)['layers']
  assert stacked['up_proj']['a'] == P('clients', None, 'fsdp', None)


def test_what_resembles_an_adapter_is_split_like_one():
  mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
  pair = {'a': np.zeros((3, 8, 2)), 'b': np.zeros((3, 2, 4))}
  adapter = {'layers': {'q_proj': pair}}
  rows = jax.tree.map(lambda leaf: np.stack([leaf] * 5), adapter)
  state = (adapter, np.zeros(()), {'moments': rows}, np.zeros((3, 8, 2)))
  same, count, rows, alone = jax.tree.map(
    lambda layout: layout.spec, sharding.like_adapter(state, adapter, mesh)
  )
  a, b = P(None, 'fsdp', None), P(None, None, 'tp')
  assert same == {'layers': {'q_proj': {'a': a, 'b': b}}}
  stacked = {'a': P(None, *a), 'b': P(None, *b)}
  assert rows == {'moments': {'layers': {'q_proj': stacked}}}
  # One array of a factor's shape is no adapter.
  assert count == alone == P()


def test_unknown_leaves_are_refused():
  with pytest.raises(ValueError, match='layers/wq/kernel is not a base'):
    sharding.param_specs({'layers': {'wq': {'kernel': None}}})
  with pytest.raises(ValueError, match='layers/q_proj/c is not a factor'):
    sharding.adapter_specs({'layers': {'q_proj': {'c': None}}})


def test_mesh_has_automatic_axes():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert dict(mesh.shape) == {'clients': 1, 'fsdp': 1, 'tp': 1}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  'sizes, message',
  [
    ((3, 1, 1), 'clients=3, fsdp=1, tp=1: the product, 3, must equal the 1'),
    ((-1, 2, 1), 'the product of the given sizes, 2, must divide the 1'),
    ((-1, -1, 1), 'at most one size may be -1'),
    ((1, 0, 1), 'fsdp=0 must be greater than 0'),
  ],
)
def test_mesh_sizes_must_use_the_devices(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(*sizes, devices=jax.devices()[:1])


@pytest.mark.parametrize(
  'axes, message',
  [
    ((1, 3, 1), 'hidden_size=16 must be a multiple of fsdp=3'),
    ((1, 1, 5), 'vocab_size=48 must be a multiple of tp=5'),
    ((1, 1, 16), 'intermediate_size=24 must be a multiple of tp=16'),
    ((1, 1, 12), r'num_attention_heads \* head_dim=16 must be .* tp=12'),
  ],
)
def test_dimensions_that_do_not_divide_are_named(hf_config, axes, message):
  config = config_lib.from_hf(hf_config(head_dim=4))
  mesh = jax.sharding.AbstractMesh(axes, sharding.AXES)
  with pytest.raises(ValueError, match=message):
    sharding.check_divisible(config, mesh)
  fits = jax.sharding.AbstractMesh((3, 4, 8), sharding.AXES)
  sharding.check_divisible(config, fits)
