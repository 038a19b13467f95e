"""Tests of the reward model, with a tiny random one."""

import json
import shutil

import pytest

from fedjax_safety import settings
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.evaluation import reward
from fedjax_safety.settings import evaluation as evaluation_settings

PAIRS = [('tell me how', 'I cannot'), ('do', 'a b c d e f'), ('make', '')]


@pytest.fixture(scope='module')
def directory(tmp_path_factory, tokenizer):
  """A DeBERTa that transformers wrote."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.DebertaV2Config(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=64,
    relative_attention=True,
    pos_att_type=['p2c', 'c2p'],
    num_labels=1,
    initializer_range=0.5,
  )
  path = tmp_path_factory.mktemp('reward')
  transformers.DebertaV2ForSequenceClassification(config).save_pretrained(path)
  tokenizer.save_pretrained(path)
  return path


def test_the_reward_is_the_logit_of_each_pair_alone(directory):
  import torch
  import transformers

  model = transformers.DebertaV2ForSequenceClassification.from_pretrained(
    directory
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  with torch.inference_mode():
    wanted = [
      float(model(**tokenizer(*pair, return_tensors='pt')).logits[0, 0])
      for pair in PAIRS
    ]
  evaluation = evaluation_settings.EvaluationConfig(reward_model=str(directory))
  (scorer,) = evaluation_inputs.scorers(
    settings.ExperimentConfig(evaluation=evaluation)
  )
  # Padding to one length moves a sum of float32 by its rounding.
  assert scorer(PAIRS) == pytest.approx(wanted, abs=1e-5)
  assert len(set(wanted)) == len(PAIRS)
  assert scorer.roles == ('harmful', 'open')


def test_long_answers_are_cut(directory):
  (value,) = reward.load(str(directory))([('do', 'a ' * 500)])
  assert isinstance(value, float)


def test_what_is_no_reward_model_is_told(directory, tmp_path):
  with pytest.raises(ValueError, match='is no directory of a model'):
    reward.load(str(tmp_path / 'nothing'))
  for name, changes, words in (
    ('two', {'id2label': {'0': 'a', '1': 'b'}}, 'has 2 outputs'),
    ('other', {'model_type': 'unheard_of'}, 'cannot be loaded'),
  ):
    copy = shutil.copytree(directory, tmp_path / name)
    config = json.loads((copy / 'config.json').read_text()) | changes
    config.pop('num_labels', None)
    (copy / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
      reward.load(str(copy))


def test_a_model_without_a_head_is_told(directory, tmp_path):
  transformers = pytest.importorskip('transformers')
  copy = shutil.copytree(directory, tmp_path / 'headless')
  transformers.DebertaV2Model.from_pretrained(directory).save_pretrained(copy)
  config = json.loads((copy / 'config.json').read_text())
  config['id2label'] = {'0': 'reward'}
  (copy / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='lacks weights of a classifier'):
    reward.load(str(copy))
