"""Structured output: answers that match a JSON schema, a regular expression or a Lark grammar.

plugin.py   the hook, and a cache of what was compiled
engine.py   llguidance: vocabularies, languages, matchers, and what its errors mean
trial.py    a process of its own where a grammar is compiled first: hostile ones end that, not the kernel
"""
