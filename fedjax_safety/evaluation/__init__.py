"""Measures a model: refusal rules, judges, exact match, over-refusal."""
