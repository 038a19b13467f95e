"""Tests of the instructions that a program can check."""

import json
import logging

import jax
import pytest

from fedjax_safety.data import sources
from fedjax_safety.evaluation import checks, evaluate
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.settings import evaluation as evaluation_settings

# Name to (arguments, answers that follow, answers that do not).
CASES = {
  'keywords:existence': (
    {'keywords': ['tea', 'c++']},
    ['Tea with C++'],
    ['tea', 'c++'],
  ),
  'keywords:frequency': (
    {'keyword': 'tea', 'frequency': 2, 'relation': 'at least'},
    ['tea, Tea'],
    ['tea'],
  ),
  'keywords:forbidden_words': (
    {'forbidden_words': ['tea']},
    ['teacup'],
    ['no Tea!'],
  ),
  'keywords:letter_frequency': (
    {'letter': 'E', 'let_frequency': 2, 'let_relation': 'less than'},
    ['tea'],
    ['tee'],
  ),
  'length_constraints:number_words': (
    {'num_words': 3, 'relation': 'at least'},
    ['one, two three'],
    ['one - two'],
  ),
  'length_constraints:number_paragraphs': (
    {'num_paragraphs': 2},
    ['a\n***\nb', 'a *** b ***'],
    ['a', 'a\n***\n***\nb', 'a *** b *** c'],
  ),
  'length_constraints:nth_paragraph_first_word': (
    {'num_paragraphs': 2, 'nth_paragraph': 2, 'first_word': 'Then'},
    ['a\n\n"then" b'],
    ['then', 'a\n\nb then', 'a\n\nthen\n\nc'],
  ),
  'detectable_content:number_placeholders': (
    {'num_placeholders': 2},
    ['[a] [b]'],
    ['[a]'],
  ),
  'detectable_content:postscript': (
    {'postscript_marker': 'P.P.S'},
    ['a\nP.P.S b', 'P. P. S. b'],
    ['a\nP.S. b', 'a P.P.S b'],
  ),
  'detectable_format:number_bullet_lists': (
    {'num_bullets': 2},
    ['* a\n* b', '- a\n  - b'],
    ['* a', '* a\n* b\n- c', '**a**\n**b**'],
  ),
  'detectable_format:constrained_response': (
    {},
    ['My answer is no.'],
    ['no'],
  ),
  'detectable_format:number_highlighted_sections': (
    {'num_highlights': 2},
    ['*a* and **b**'],
    ['*a*', '* a\n* b'],
  ),
  'detectable_format:multiple_sections': (
    {'section_spliter': 'Part', 'num_sections': 2},
    ['Part 1\na\nPart 2\nb'],
    ['Part 1 a'],
  ),
  'detectable_format:json_format': (
    {},
    ['{"a": 1}', '```json\n[1]\n```'],
    ['a: 1', '{"a": 1', '[' * 100_000],
  ),
  'detectable_format:title': ({}, ['<<a>>\nb'], ['a', '<< >>', '<a>']),
  'combination:two_responses': (
    {},
    ['a******b'],
    ['a', 'a******a', 'a******b******c', 'a************b'],
  ),
  'combination:repeat_prompt': (
    {'prompt_to_repeat': 'Say it.'},
    ['say it. It.'],
    ['It.'],
  ),
  'startend:end_checker': (
    {'end_phrase': 'Good?'},
    ['a good?', '"a Good?" '],
    ['good? a'],
  ),
  'startend:quotation': ({}, ['"a"'], ['"a', '"', 'a']),
  'change_case:capital_word_frequency': (
    {'capital_frequency': 2, 'capital_relation': 'at least'},
    ['GO NOW'],
    ['GO Now'],
  ),
  'change_case:english_capital': ({}, ['A B!'], ['A b', '12']),
  'change_case:english_lowercase': ({}, ['a b!'], ['A b', '12']),
  'punctuation:no_comma': ({}, ['a; b'], ['a, b']),
}


def written(*wanted):
  """Returns checks as an example's metadata hold them."""
  return json.dumps([[name, arguments] for name, arguments in wanted])


def test_every_check_is_proved():
  assert set(CASES) == set(checks.CHECKS)


@pytest.mark.parametrize('name', CASES)
def test_a_check(name):
  arguments, followed, broken = CASES[name]
  wanted = checks.read(written((name, arguments)))
  for response in followed:
    assert checks.follows(response, wanted), response
  # Silence follows no instruction, not even to avoid something.
  for response in [*broken, '', ' \n']:
    assert not checks.follows(response, wanted), response


def test_every_check_must_pass():
  wanted = checks.read(
    written(('punctuation:no_comma', {}), ('change_case:english_lowercase', {}))
  )
  assert checks.follows('a b', wanted)
  assert not checks.follows('a, b', wanted)
  assert not checks.follows('A b', wanted)


@pytest.mark.parametrize(
  ('check', 'words'),
  [
    (('punctuation:no_comma', {'n': 1}), "'n' is no argument of the check pun"),
    (('startend:end_checker', {}), "needs the argument 'end_phrase'"),
    (('startend:end_checker', {'end_phrase': 1}), 'of the wrong type'),
    (
      (
        'length_constraints:number_words',
        {'num_words': 1, 'relation': 'about'},
      ),
      "relation='about' is unknown",
    ),
  ],
)
def test_arguments_that_do_not_fit_are_explained(check, words):
  with pytest.raises(ValueError, match=words):
    checks.read(written(check))


def sets(path):
  chosen = evaluation_settings.EvaluationSetConfig(
    source=f'ifeval:{path}', role='task'
  )
  return evaluation_inputs.evaluation_sets(
    evaluation_settings.EvaluationConfig(sets={'asked': chosen})
  )


ROW = {
  'key': 1,
  'prompt': 'p',
  'instruction_id_list': ['punctuation:no_comma', 'startend:end_checker'],
  'kwargs': [{}, {'end_phrase': 'q', 'relation': None}],
}
FOREIGN = ROW | {
  'instruction_id_list': ['language:response_language'],
  'kwargs': [{'language': 'de'}],
}


def write(path, *rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


class Answers:
  """Gives one answer a prompt."""

  def __init__(self, *answers):
    self.answers = list(answers)

  def generate(self, *args, **kwargs):
    return self.answers


def test_a_file_of_checks_is_a_set_of_tasks(tmp_path, caplog):
  path = write(tmp_path / 'a.jsonl', ROW, FOREIGN, ROW)
  with caplog.at_level(logging.WARNING):
    ready = sets(path)
  assert '1 of 3 prompts' in caplog.text
  records = list(
    evaluate.evaluate(
      Answers('p q', 'p, q'),
      None,
      ready,
      [],
      key=jax.random.key(0),
      temperature=0.7,
    )
  )
  assert [r['verdicts'] for r in records] == [
    {'follows': True},
    {'follows': False},
  ]
  assert json.loads(records[0]['reference'])[1][1] == {'end_phrase': 'q'}


def test_a_file_without_known_checks_is_refused(tmp_path):
  with pytest.raises(ValueError, match='every prompt has a check'):
    sets(write(tmp_path / 'a.jsonl', FOREIGN))


def test_tasks_with_a_reference_still_need_one(tmp_path):
  path = tmp_path / 'a.jsonl'
  write(path, {'prompt': 'p', 'response': 'r'})
  chosen = evaluation_settings.EvaluationSetConfig(
    source=str(path), role='task'
  )
  config = evaluation_settings.EvaluationConfig(sets={'asked': chosen})
  (role, (example,)) = evaluation_inputs.evaluation_sets(config)['asked']
  assert role == 'task' and example == sources.Example('p', 'r', {})
  write(tmp_path / 'b.jsonl', {'prompt': 'p'})
  chosen = evaluation_settings.EvaluationSetConfig(
    source=str(tmp_path / 'b.jsonl'), role='task'
  )
  with pytest.raises(ValueError, match='prompts without a response'):
    evaluation_inputs.evaluation_sets(
      evaluation_settings.EvaluationConfig(sets={'asked': chosen})
    )
