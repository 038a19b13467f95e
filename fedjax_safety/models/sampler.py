"""Text in, text out: prompts through a tokenizer, a model and back.

Prompts are padded to a multiple of a length bucket and batches to a fixed
number of rows, so a run meets few shapes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from fedjax_safety import _validate, distributed, types
from fedjax_safety.models import batcher, decoder, load

_EMPTY_ADAPTER: dict = {}


@functools.partial(jax.jit, static_argnames='model')
def next_token_logits(
  model: decoder.Decoder,
  base_params: types.BaseParams,
  adapter: types.Adapter,
  tokens: jax.Array,
  lengths: jax.Array,
) -> jax.Array:
  """Returns `float32[B, V]`, the logits after each right-padded prompt."""
  variables = {'params': base_params, 'lora': adapter}
  return model.apply(variables, tokens, last_only=lengths - 1)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Text in, text out: a decoder with its tokenizer and prompt template.

  Attributes:
    model: the decoder.
    base_params: its frozen parameters.
    tokenizer: a transformers tokenizer.
    encode_prompts: texts of requests to token ids, template applied.
    max_new_tokens: longest answer, in tokens.
    stop_ids: tokens that end an answer.
    batch_size: prompts that are answered at once; one whose answer ends makes
      room for the next.
    length_bucket: prompts are padded to a multiple of this many tokens.
    progress: whether to show a progress bar.
  """

  model: decoder.Decoder
  base_params: types.BaseParams
  tokenizer: Any
  encode_prompts: Callable[[Sequence[str]], list[list[int]]]
  stop_ids: tuple[int, ...]
  max_new_tokens: int = 64
  batch_size: int = 64
  length_bucket: int = 32
  progress: bool = True

  def single(self) -> 'Sampler':
    """Returns the same sampler for one prompt at a time."""
    return dataclasses.replace(self, batch_size=1, progress=False)

  def _encoded(self, prompts: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of prompts, all of which the model embeds."""
    encoded = self.encode_prompts(prompts)
    for prompt, ids in zip(prompts, encoded, strict=True):
      if not ids:
        raise ValueError(f'a prompt has no tokens: {prompt!r}')
      load.check_ids(np.array(ids), self.model.config)
    return encoded

  def _bar(self, prompts: Sequence[str], label: str) -> tqdm.tqdm:
    """Returns a progress bar over prompts."""
    hidden = not self.progress or None
    return tqdm.tqdm(
      total=len(prompts), desc=label, leave=False, disable=hidden
    )

  def generate(
    self,
    adapter: types.Adapter | None,
    prompts: Sequence[str],
    *,
    key: jax.Array,
    temperature: float = 0.0,
    top_p: float = 1.0,
    label: str = 'generating',
  ) -> list[str]:
    """Returns an answer to every prompt.

    Prompt i draws from `fold_in(key, i)`, whatever it shares a batch with.

    Args:
      adapter: the adapter, or None for the frozen base.
      prompts: requests, without template.
      key: a PRNG key; unused at temperature 0.
      temperature: 0 takes the likeliest token every time.
      top_p: nucleus of the draw, in (0, 1].
      label: words beside the progress bar.

    Raises:
      ValueError: temperature or top_p is out of range, or a prompt is empty.
    """
    _validate.non_negative(temperature=temperature)
    _validate.in_range(1e-6, 1.0, top_p=top_p)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(prompts)))
    requests = [
      batcher.Request(ids, data, self.max_new_tokens, temperature, top_p)
      for ids, data in zip(
        self._encoded(prompts),
        np.asarray(jax.random.key_data(keys)),
        strict=True,
      )
    ]
    answers = [''] * len(prompts)
    with self._bar(prompts, label) as bar:
      for index, ids in batcher.run(
        self.model,
        self.base_params,
        _EMPTY_ADAPTER if adapter is None else adapter,
        requests,
        rows=self.batch_size,
        new_slots=self.max_new_tokens,
        length_bucket=self.length_bucket,
        stop_ids=self.stop_ids,
      ):
        bar.update()
        said = ids[~np.isin(ids, self.stop_ids)]
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        answers[index] = text.strip()
    return answers

  def next_token_logits(
    self,
    adapter: types.Adapter | None,
    prompts: Sequence[str],
    *,
    label: str = 'scoring',
  ) -> np.ndarray:
    """Returns `float32[N, V]`, the logits of each answer's first token."""
    logits = np.zeros((len(prompts), self.model.config.vocab_size), np.float32)
    encoded = self._encoded(prompts)
    order = np.argsort([len(ids) for ids in encoded], kind='stable')
    with self._bar(prompts, label) as bar:
      for start in range(0, len(order), self.batch_size):
        index = order[start : start + self.batch_size]
        tokens, lengths = self._padded([encoded[i] for i in index])
        found = next_token_logits(
          self.model,
          self.base_params,
          _EMPTY_ADAPTER if adapter is None else adapter,
          tokens,
          lengths,
        )
        logits[index] = distributed.fetch(found)[: len(index)]
        bar.update(len(index))
    return logits

  def _padded(
    self, encoded: Sequence[Sequence[int]]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns a batch of prompts and their lengths, in one of few shapes."""
    width = batcher.width_of(max(map(len, encoded)), self.length_bucket)
    tokens = np.zeros((self.batch_size, width), np.int32)
    lengths = np.ones(self.batch_size, np.int32)
    for row, ids in enumerate(encoded):
      tokens[row, : len(ids)] = ids
      lengths[row] = len(ids)
    return tokens, lengths
