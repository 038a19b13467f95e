"""A reward model: one number for a request and an answer, by transformers.

The paper's is OpenAssistant/reward-model-deberta-v3-large-v2, whose logit it
averages. It needs PyTorch, which nothing else in a run does.
"""

import functools
import importlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import tqdm

_SETTING = 'evaluation.reward_model'
_BATCH_SIZE = 16
# Tokens of a request and an answer, where the model does not say.
_MAX_LENGTH = 512


@functools.lru_cache(maxsize=1)
def load(path: str) -> 'RewardModel':
  """Loads the sequence classifier in a directory, once a process.

  Raises:
    ValueError: it is not there, is no model with one output, or PyTorch is
      missing.
  """
  return RewardModel(path)


def _part(kind: str, path: str, **options: Any) -> Any:
  """Loads one part of a model by a class of transformers.

  Raises:
    ValueError: it cannot be loaded.
  """
  # Imported here because only this needs the classes for PyTorch.
  chosen = getattr(importlib.import_module('transformers'), kind)
  try:
    return chosen.from_pretrained(path, local_files_only=True, **options)
  except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
    raise ValueError(
      f'{_SETTING}={path!r} cannot be loaded by transformers: {error}'
    ) from error


class RewardModel:
  """Scores answers; see `load`."""

  name, label = 'reward', 'reward'
  roles = ('harmful', 'open')

  def __init__(self, path: str):
    if not (pathlib.Path(path) / 'config.json').is_file():
      raise ValueError(
        f'{_SETTING}={path!r} is no directory of a model; fetch '
        f'OpenAssistant/reward-model-deberta-v3-large-v2 (license: MIT) with '
        f'`hf download` and name its directory'
      )
    try:
      self._torch = importlib.import_module('torch')
    except ModuleNotFoundError:
      raise ValueError(
        f"{_SETTING} needs PyTorch; pip install 'fedjax_safety[reward]'"
      ) from None
    config = _part('AutoConfig', path)
    if config.num_labels != 1:
      raise ValueError(
        f'{_SETTING}={path!r} has {config.num_labels} outputs; a reward model '
        f'has one'
      )
    self._tokenizer = _part('AutoTokenizer', path)
    model, info = _part(
      'AutoModelForSequenceClassification', path, output_loading_info=True
    )
    if info['missing_keys']:
      raise ValueError(
        f'{_SETTING}={path!r} lacks weights of a classifier, such as '
        f'{min(info["missing_keys"])}; is it a reward model?'
      )
    self._device = 'cuda' if self._torch.cuda.is_available() else 'cpu'
    self._model = model.to(self._device).eval()
    self._max_length = getattr(config, 'max_position_embeddings', _MAX_LENGTH)

  def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """Returns the reward of each answer; None where it is not finite."""
    rewards: list[float] = []
    starts = range(0, len(pairs), _BATCH_SIZE)
    for start in tqdm.tqdm(starts, 'reward', leave=False, disable=None):
      prompts, responses = zip(*pairs[start : start + _BATCH_SIZE], strict=True)
      inputs = self._tokenizer(
        list(prompts),
        list(responses),
        padding=True,
        truncation=True,
        max_length=self._max_length,
        return_tensors='pt',
      ).to(self._device)
      with self._torch.inference_mode():
        rewards += self._model(**inputs).logits[:, 0].float().tolist()
    return [reward if math.isfinite(reward) else None for reward in rewards]
