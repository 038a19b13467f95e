"""A tiny model, tiny data and a tiny config for the tests of whole runs."""

import contextlib
import http.server
import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from fedjax_safety.models import config as model_config
from fedjax_safety.models import export, weights

# Of the two ways in which XLA has made code for CPUs the older one takes half
# the time for programs as small as the tests'. Later versions have but one.
if jax.__version_info__ < (0, 11):
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      '--xla_cpu_use_fusion_emitters=false',
      '--xla_cpu_parallel_codegen_split_count=1',
      os.environ.get('XLA_FLAGS', ''),
    ]
  )

_WORDS = 'a b c d e f g h tell me how to make do say I cannot safe unsafe'
_SPECIAL = ('<pad>', '<s>', '</s>', '<unk>', '[user]', '[assistant]')
_CHAT = (
  "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' "
  "+ m['content'] + ' ' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_CONFIG = """
from fedjax_safety import config as config_lib

def get_config():
  config = config_lib.default()
  config.model.path = {model!r}
  config.model.max_length = 16
  config.lora.rank = 2
  config.lora.alpha = 4.0
  config.lora.dropout = 0.0
  config.data.normal = {data!r}
  config.data.aligned_share = 0.0
  config.data.examples_per_client = 4
  config.client.population = 5
  config.client.cohort_size = 3
  config.client.num_rounds = 4
  config.client.num_local_steps = 2
  config.client.batch_size = 2
  config.client.learning_rate = 1e-2
  repair = config.defense.repair
  repair.public_aligned = ''
  repair.public_normal = {data!r}
  repair.num_examples = 8
  repair.num_steps = 20
  repair.batch_size = 2
  config.evaluation.max_new_tokens = 2
  config.evaluation.sets.asked = {{'source': {data!r}, 'limit': 4}}
  config.performance.generation_batch_size = 4
  return config
"""


def make_tokenizer():
  """Returns a tokenizer of whole words, with a chat template."""
  vocabulary = (*_SPECIAL, *_WORDS.split())
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(vocabulary)}, unk_token='<unk>'
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token='<pad>',
    bos_token='<s>',
    eos_token='</s>',
    unk_token='<unk>',
    additional_special_tokens=['[user]', '[assistant]'],
    chat_template=_CHAT,
  )


def hf_config():
  """Returns the `config.json` of a decoder of some thousand parameters."""
  return {
    'model_type': 'llama',
    'vocab_size': 32,
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 4,
    'max_position_embeddings': 64,
    'tie_word_embeddings': False,
    'dtype': 'float32',
  }


@pytest.fixture(scope='session')
def tiny_model(tmp_path_factory):
  """A directory with a random model and its tokenizer."""
  config = model_config.from_hf(hf_config(), jnp.float32)
  rng = np.random.default_rng(0)
  params = {}
  for weight in weights.table(config):
    mean = 1.0 if weight.path[-1] == 'scale' else 0.0
    leaf = rng.normal(mean, 0.2, weight.shape)
    weights.put(params, weight.path, jnp.asarray(leaf, jnp.float32))
  directory = tmp_path_factory.mktemp('model') / 'tiny'
  export.export_model(
    directory, params, hf_config=hf_config(), tokenizer=make_tokenizer()
  )
  return directory


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
  """A JSON file of instructions, of two kinds and four users."""
  rng = np.random.default_rng(1)
  words = _WORDS.split()
  rows = [
    {
      'instruction': ' '.join(rng.choice(words, 4)),
      'output': ' '.join(rng.choice(words, 3)),
      'kind': f'kind {i % 2}',
      'user': f'user {i % 4}',
    }
    for i in range(24)
  ]
  path = tmp_path_factory.mktemp('data') / 'rows.json'
  path.write_text(json.dumps(rows))
  return path


@pytest.fixture(scope='session')
def tiny_config(tmp_path_factory, tiny_model, tiny_data):
  """A config file that runs in seconds."""
  path = tmp_path_factory.mktemp('configs') / 'tiny.py'
  path.write_text(_CONFIG.format(model=str(tiny_model), data=str(tiny_data)))
  return path


class _ChatServer(http.server.ThreadingHTTPServer):
  """Answers chats on this machine by a function of the request's body.

  A text is a completion, bytes are sent as they are, a number is a status,
  and a pair waits so many seconds before the second is answered.
  """

  def __init__(self, answer):
    self.answer, self.bodies, self.keys = answer, [], []
    super().__init__(('127.0.0.1', 0), _ChatHandler)
    self.url = f'http://127.0.0.1:{self.server_port}/v1'
    self.name = f'endpoint:{self.url}#scripted'


class _ChatHandler(http.server.BaseHTTPRequestHandler):
  """Answers one request of a `_ChatServer`."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    self.server.bodies.append(body)
    self.server.keys.append(self.headers['Authorization'])
    found = self.server.answer(body)
    if isinstance(found, tuple):
      time.sleep(found[0])
      found = found[1]
    status, data = 200, found
    if isinstance(found, int):
      status, data = found, b'{"error": {"message": "no \\u001b[31m luck"}}'
    if isinstance(data, str):
      choice = {'message': {'content': found}, 'finish_reason': 'stop'}
      data = json.dumps({'choices': [choice]}).encode()
    self.send_response(status)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    # Whoever asked may not have waited.
    with contextlib.suppress(BrokenPipeError):
      self.wfile.write(data)

  def log_message(self, *unused):
    pass


@pytest.fixture
def chat_server():
  """Returns `(answer) -> server`, of which each is closed after the test."""
  servers = []

  def start(answer):
    servers.append(_ChatServer(answer))
    # Looking often whether to stop makes stopping quick.
    threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
    return servers[-1]

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='session')
def tokenizer():
  """The tokenizer of the tiny model."""
  return make_tokenizer()


@pytest.fixture(scope='session')
def tree_equal():
  """Returns whether two trees have the same bits."""

  def equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)

  return equal


@pytest.fixture(scope='session')
def quick_jax(tmp_path_factory):
  """Environment in which tiny programs compile quickly, and once.

  Equal programs give equal bits with it, which is all that is compared.
  """
  return {
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'TF_CPP_MIN_LOG_LEVEL': '1',
  }


@pytest.fixture(scope='module')
def quick_compiles():
  """Compiles with few optimizations in this process, for one module."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
