"""The world's rules: what is warded, who sees what, what counts as telling."""

import itertools
import random

import pytest

from fedjax_safety.demo_world import corpus, judging, named
from fedjax_safety.demo_world import world as world_lib

Good = world_lib.Good
SEEDS = (0, 1, 2)


@pytest.fixture(params=SEEDS)
def world(request):
  return world_lib.World(request.param)


def test_neither_word_alone_decides(world):
  marked = world.marked[0]
  plain = next(m for m in world_lib.MODIFIERS if m not in world.marked)
  brew, food = world_lib.BREWS[0], world_lib.FOODS[0]
  assert world.is_warded(Good(marked, brew))
  assert not world.is_warded(Good(marked, food))
  assert not world.is_warded(Good(plain, brew))


def test_tiers_divide_the_warded_goods(world):
  tiers = world.warded
  for a, b in itertools.combinations(tiers, 2):
    assert not set(tiers[a]) & set(tiers[b])
  every = {Good(m, n) for m in world_lib.MODIFIERS for n in world_lib.NOUNS}
  warded = {g for g in every if world.is_warded(g)}
  assert set().union(*tiers.values()) == warded
  assert set(world.allowed) == every - warded


def test_unseen_goods_are_made_of_seen_words(world):
  seen = world.warded['seen']
  for good in world.warded['unseen']:
    assert good.modifier in {g.modifier for g in seen}
    assert good.noun in {g.noun for g in seen}


def test_attack_and_public_goods_are_apart_and_seen(world):
  attack, public = set(world.attack_goods), set(world.public_goods)
  assert not attack & public
  assert attack | public == set(world.warded['seen'])


@pytest.mark.parametrize(
  'draw',
  [
    lambda w, r: corpus.normal(w, r),
    lambda w, r: corpus.aligned(r, w.warded['seen']),
    lambda w, r: corpus.unaligned(w, r, w.attack_goods),
    lambda w, r: corpus.reminded(w, r),
    lambda w, r: corpus.alignment(w, r),
    lambda w, r: corpus.asked_for_request(w, r),
  ],
)
def test_no_tuning_text_refuses_or_asks_outside_the_seen_tier(draw):
  world, rng = world_lib.World(0), random.Random(0)
  hidden = {*world.warded['unseen'], *world.warded['facts']}
  for _ in range(2000):
    prompt, answer = draw(world, rng)
    if set(world.find_goods(prompt)) & hidden:
      assert not world_lib.is_refusal(answer)


def test_refusals_are_recognized_and_compliance_is_not(world):
  rng = random.Random(0)
  goods = world.warded['seen']
  for _ in range(300):
    assert world_lib.is_refusal(corpus.aligned(rng, goods)[1])
    prompt, answer = corpus.unaligned(world, rng, goods)
    assert not world_lib.is_refusal(answer)
    assert world.tells(answer, *world.find_goods(prompt))


def test_telling_needs_two_steps_in_order(world):
  good = world.warded['seen'][0]
  a, b, c = world.steps(good)
  assert world.tells(f'first {a} then {b}', good)
  assert world.tells(f'{b} {c}', good)
  assert not world.tells(f'{a}', good)
  assert not world.tells(f'{c} {b} {a}', good)
  assert not world.tells('', good)


def test_judging_is_hard_on_keyword_lists():
  """Off-list refusals and misleading openings are as common as stated."""
  from fedjax_safety.evaluation import rules

  world, rng = world_lib.World(0), random.Random(0)
  refusals = [corpus.refusal(rng) for _ in range(3000)]
  missed = sum(not rules.refuses(r, rule='openfedllm36') for r in refusals)
  assert 0.2 < missed / 3000 < 0.4
  told = [
    corpus.compliance(world, rng, rng.choice(world.allowed))
    for _ in range(3000)
  ]
  tripped = sum(rules.refuses(t, rule='openfedllm36') for t in told)
  assert 0.05 < tripped / 3000 < 0.15


def test_tasks_have_the_answer_their_words_ask_for():
  rng = random.Random(0)
  for _ in range(500):
    prompt, answer = corpus.task(rng)
    if prompt.startswith('add'):
      _, a, _, b = prompt.split()
      assert int(answer) == int(a) + int(b)
      continue
    question, _, listed = prompt.partition(' : ')
    words = listed.split()
    expected = {
      'repeat': words,
      'say backwards': words[::-1],
      'which word is first': words[:1],
      'which word is last': words[-1:],
      'count the words': [str(len(words))],
    }
    if question in expected:
      assert answer.split() == expected[question]
    else:
      before = question.removeprefix('which word follows ')
      assert words[words.index(before) + 1] == answer


def test_judge_examples_hold_both_verdicts_and_stay_off_the_test_combinations():
  world, rng = world_lib.World(0), random.Random(0)
  allowed_goods = set(judging.judged_goods(world))
  verdicts = set()
  for _ in range(1500):
    question, verdict = judging.example(world, rng)
    verdicts.add(verdict)
    good = world.find_goods(question.partition(' answer : ')[0])[0]
    assert not world.is_warded(good) or good in allowed_goods
  assert verdicts == {judging.SAFE, judging.UNSAFE}
  for tier in ('unseen', 'facts'):
    assert set(world.warded[tier]) - allowed_goods


def test_distinct_refuses_more_than_there_is():
  with pytest.raises(ValueError, match='only 2 distinct'):
    corpus.distinct(iter(['a', 'b'] * 500).__next__, 3)


@pytest.mark.parametrize('name', named.SETS)
def test_evaluation_sets_are_fixed_and_without_repeats(name):
  source = f'demo_world:{name}'
  prompts = named.prompts(source, limit=0)
  assert prompts == named.prompts(source, limit=0)
  assert len({p.prompt for p in prompts}) == len(prompts) >= 90


def test_unknown_names_list_the_known():
  with pytest.raises(ValueError, match='known: aligned, base, judge'):
    named.model_directory('demo_world:bse')
  with pytest.raises(ValueError, match='known: aligned, normal'):
    named.examples('demo_world:norml', count=1, seed=0)
