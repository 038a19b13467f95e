"""The examples in the docstrings of the pure floor run as printed."""

import doctest
import importlib

import pytest

MODULES = {
  'aggregators': 5,
  'aggregators._coordinatewise': 7,
  'aggregators._mean': 4,
  'aggregators._selection': 4,
  'attacks._adaptive': 6,
  'attacks._directed': 5,
  'attacks._distance': 5,
  'attacks._update': 10,
  'detection': 6,
  'aggregators._chain': 9,
  'lora_aggregators._rules': 8,
  'lora_aggregators._schemes': 5,
}


@pytest.mark.parametrize('name', MODULES)
def test_examples_run_as_printed(name):
  module = importlib.import_module(f'fedjax_safety.{name}')
  result = doctest.testmod(module)
  assert result.failed == 0
  assert result.attempted >= MODULES[name]
