"""Reading models, tokenizers and adapters from Hugging Face directories."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import transformers

from fedjax_safety import _validate
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import (
  leaves,
  peft_layout,
  sharding,
  tensor_files,
  weights,
)
from fedjax_safety.models import quantization as quantization_lib

# Old checkpoints carry these; the decoder computes them from its config.
_IGNORED = ('.rotary_emb.inv_freq',)


def load(
  directory: str | pathlib.Path,
  *,
  dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  quantization: str | None = None,
  progress: bool = True,
) -> tuple[config_lib.DecoderConfig, dict[str, Any]]:
  """Loads a model of a supported family from a Hugging Face directory.

  Every process reads only the slices that its own devices hold. What it holds
  of them in the host's memory on their way to an accelerator is one tensor of
  the files at most, or one small leaf; a CPU's arrays are where it reads to.

  Args:
    directory: holds `config.json` and safetensors weights, in one file or in
      several with an index, in float32, float16 or bfloat16, mixed or not.
    dtype: dtype to hold and compute in; the one in `config.json` by default.
    mesh: from `sharding.make_mesh`; the default device holds all without it.
    quantization: one of `quantization.MODES`, to keep the projections'
      kernels in 8 bits; each is quantized as soon as it is read.
    progress: whether to show a bar where standard error is a terminal.

  Returns:
    The decoder's config and its base parameters.

  Raises:
    ValueError: a file is missing or damaged, a tensor is missing, unexpected
      or of another shape or kind, or the mesh does not divide the model.
  """
  directory = pathlib.Path(directory)
  config = config_lib.read_hf(directory, dtype)
  if quantization is not None:
    _validate.one_of(quantization_lib.MODES, quantization=quantization)
    config = dataclasses.replace(config, quantization=quantization)
  if mesh is not None:
    sharding.check_divisible(config, mesh)
  with tensor_files.open_model(directory) as files:
    table = weights.table(config)
    _check_model(files, table, config, directory)
    params = {}
    # With None, tqdm shows the bar on terminals only.
    hidden = None if progress else True
    with tqdm.tqdm(table, f'Loading {directory.name}', disable=hidden) as bar:
      for weight in bar:
        bar.set_postfix_str('/'.join(weight.path))
        leaf = leaves.load(files, weight, config.dtype, mesh)
        if quantization is not None and weight.path[-1] == 'kernel':
          leaf, scale = leaves.quantized(leaf, quantization, weight.path, mesh)
          weights.put(params, (*weight.path[:-1], 'kernel_scale'), scale)
        weights.put(params, weight.path, leaf)
  return config, params


def _check_model(
  files: tensor_files.TensorFiles,
  table: tuple[weights.Weight, ...],
  config: config_lib.DecoderConfig,
  directory: pathlib.Path,
) -> None:
  """Raises unless the files hold exactly what the config describes."""
  expected = {name: w.file_shape for w in table for name in w.names}
  missing = [name for name in expected if name not in files.names]
  if missing:
    hint = ''
    if missing == ['lm_head.weight']:
      hint = '; if the embedding is the head, set tie_word_embeddings to true'
    raise ValueError(
      f'{missing[0]} is missing from {_where(files, directory)} '
      f'({len(missing)} of {len(expected)} tensors are){hint}'
    )
  extra = sorted(
    name
    for name in files.names - set(expected)
    if not name.endswith(_IGNORED)
    and not (config.tied_head and name == 'lm_head.weight')
  )
  if extra:
    raise ValueError(
      f'{extra[0]} in {files.path(extra[0])} is no part of the model that '
      f'config.json describes ({len(extra)} such tensors)'
    )
  for name, shape in expected.items():
    files.check(name, shape)
  if config.tied_head and 'lm_head.weight' in files.names:
    _check_tied(files, config)


def _where(files: tensor_files.TensorFiles, directory: pathlib.Path) -> str:
  """Names the file or files that a model was read from."""
  if len(files.paths) == 1:
    return str(files.paths[0])
  return f'the {len(files.paths)} files of {directory / tensor_files.INDEX}'


def _check_tied(
  files: tensor_files.TensorFiles, config: config_lib.DecoderConfig
) -> None:
  """Raises unless a stored head equals the embedding it is tied to."""
  head, embed = 'lm_head.weight', 'model.embed_tokens.weight'
  files.check(head, (config.vocab_size, config.width))
  for start in range(0, config.vocab_size, tensor_files.PANEL):
    stop = min(start + tensor_files.PANEL, config.vocab_size)
    rows = (slice(start, stop), slice(None))
    if not np.array_equal(files.read(head, rows), files.read(embed, rows)):
      raise ValueError(
        f'{head} in {files.path(head)} differs from {embed}, to which '
        f'config.json ties it; set tie_word_embeddings to false to use it'
      )


def load_tokenizer(
  directory: str | pathlib.Path,
) -> transformers.PreTrainedTokenizerBase:
  """Loads the tokenizer of a Hugging Face directory; it pads on the right.

  Where the tokenizer has no padding token, it pads with the end-of-sequence
  token, or else the unknown token. Nothing is fetched from a network.

  Raises:
    ValueError: there is no tokenizer, it cannot be read, or it has no token
      that could pad.
  """
  directory = pathlib.Path(directory)
  if not any(
    (directory / name).is_file()
    for name in ('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json')
  ):
    raise ValueError(
      f'{directory} has no tokenizer: no tokenizer.json, tokenizer.model or '
      f'tokenizer_config.json'
    )
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      directory, local_files_only=True
    )
  # The tokenizers library raises bare exceptions on damaged files.
  except Exception as error:
    raise ValueError(
      f'the tokenizer in {directory} cannot be read: {error}'
    ) from error
  if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
  if tokenizer.pad_token is None:
    raise ValueError(
      f'the tokenizer in {directory} has no pad, eos or unk token; set '
      f'pad_token in its tokenizer_config.json'
    )
  tokenizer.padding_side = 'right'
  return tokenizer


def load_stop_ids(
  directory: str | pathlib.Path,
  tokenizer: transformers.PreTrainedTokenizerBase,
) -> tuple[int, ...]:
  """Returns the ids of the tokens that end an answer, sorted.

  They are the tokenizer's end-of-sequence token and whatever
  `generation_config.json` and `config.json` name besides: chat models end
  their turn with a token of its own.

  Raises:
    ValueError: a file cannot be read or names something else than tokens.
  """
  found = {tokenizer.eos_token_id} - {None}
  for name in ('generation_config.json', 'config.json'):
    path = pathlib.Path(directory) / name
    if not path.is_file():
      continue
    try:
      named = json.loads(path.read_text()).get('eos_token_id')
    except (AttributeError, ValueError) as error:
      raise ValueError(f'{path} is no JSON object: {error}') from error
    named = named if isinstance(named, list) else [named]
    for token in named:
      if token is not None and type(token) is not int:
        raise ValueError(f'{path}: eos_token_id={token!r} must be a token id')
      found.add(token)
  return tuple(sorted(found - {None}))


def check_tokenizer(
  tokenizer: transformers.PreTrainedTokenizerBase,
  config: config_lib.DecoderConfig,
) -> None:
  """Raises unless every token of a text has a row in the embedding.

  Special tokens that the tokenizer was given beside its vocabulary may lack
  one: Gemma 3's stands for an image. `check_ids` refuses a text with such.

  Raises:
    ValueError: the tokenizer has an id beyond the embedding.
  """
  roles = {tokenizer.bos_token_id, tokenizer.eos_token_id}
  roles |= {tokenizer.pad_token_id, tokenizer.unk_token_id}
  spared = {
    number
    for number, token in tokenizer.added_tokens_decoder.items()
    if token.special and number not in roles
  }
  vocabulary = tokenizer.get_vocab().items()
  needed = [pair for pair in vocabulary if pair[1] not in spared]
  token, largest = max(needed, key=lambda pair: pair[1])
  if largest >= config.vocab_size:
    raise ValueError(
      f'the tokenizer gives {token!r} the id {largest}, but the model embeds '
      f'vocab_size={config.vocab_size} ids, up to {config.vocab_size - 1}; '
      f'use the tokenizer that belongs to the model'
    )


def check_ids(ids: np.ndarray, config: config_lib.DecoderConfig) -> None:
  """Raises unless every token of tokenized texts has a row in the embedding.

  Args:
    ids: `int[...]`.
    config: the decoder's config.

  Raises:
    ValueError: a token has none.
  """
  largest = int(np.max(ids))
  if largest >= config.vocab_size:
    raise ValueError(
      f'a text has the token {largest}, but the model embeds '
      f'vocab_size={config.vocab_size} ids; remove the special token from '
      f'the text'
    )


def load_adapter(
  directory: str | pathlib.Path, config: config_lib.DecoderConfig
) -> tuple[dict[str, Any], float]:
  """Loads a LoRA adapter in the layout of PEFT.

  Args:
    directory: holds `adapter_config.json` and `adapter_model.safetensors`.
    config: the config of the decoder that it adapts.

  Returns:
    The float32 adapter and the scale of its product.

  Raises:
    ValueError: a file is missing or damaged, the adapter is more than plain
      LoRA on the projections, or its tensors do not fit the decoder.
  """
  directory = pathlib.Path(directory)
  raw = peft_layout.read_config(directory / peft_layout.CONFIG)
  with tensor_files.TensorFiles([directory / peft_layout.WEIGHTS]) as files:
    targets = peft_layout.adapted(files, raw, config)
    blocks = {
      target: {
        factor: jnp.stack(
          [
            jnp.asarray(files.read(name, (slice(None),) * 2).T, jnp.float32)
            for name in names
          ]
        )
        for factor, names in peft_layout.pair_names(target, config).items()
      }
      for target in targets
    }
  return {'layers': blocks}, peft_layout.scale_of(raw)
