"""Templates by strangers end in one line, by a count of steps: no clock is read, here or in the sandbox."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import pytest

from llm_os.drivers.formats.budget import Budget, Spent, breadth
from llm_os.drivers.formats.chat import STEPS, STEPS_PER_UNIT, ChatTemplate
from llm_os.drivers.formats.sandbox import MAX_DEPTH, MAX_RANGE, Sandbox
from llm_os.kernel.errors import FormatError

MESSAGES = [{"role": "user", "content": "Hi"}]
LOOP = "{% for i in range(100000) %}"
END = "{% endfor %}"
GROW = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(100) %}{% set ns.x = "
TREE = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(100) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
TREES = TREE + TREE.replace("ns", "ms")
MACRO = "{% macro m() %}"
TUPLES = TREE.replace("[ns.x, ns.x]", "(ns.x, ns.x)").replace("[1]", "1")

ENDLESS = {
    "nested loops": LOOP + LOOP + END + END,
    "loops that filter": LOOP + "{% for j in range(100000) if false %}" + END + END,
    "a loop that prints": LOOP + LOOP + "text" + END + END,
    "a loop in a set block": "{% set x %}" + LOOP + LOOP + "text" + END + END + "{% endset %}",
    "a loop in a filter block": "{% filter upper %}" + LOOP + LOOP + "a" + END + END + "{% endfilter %}",
    "a loop in a macro": "{% macro m() %}" + LOOP + LOOP + "a" + END + END + "{% endmacro %}{{ m() }}",
    "a loop of lists": LOOP + "{% set a = range(100000)|list %}" + END,
    "a loop of lazy filters": LOOP + "{% set a = range(100000)|map('string')|select|list %}" + END,
    "a loop of slices": "{% set a = range(100000)|list %}" + LOOP + "{% set b = a[1:] %}" + END,
    "a loop of sums": "{% set a = range(100000)|list %}" + LOOP + "{% set b = a + a %}" + END,
    "a loop of comparisons": "{% set a = range(100000)|list %}" + LOOP + "{% set b = a == a[:] %}" + END,
    "a loop of searches": "{% set a = range(100000)|list %}" + LOOP + "{% set b = 'x' in a %}" + END,
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a long string": "{{ 'a' * 10**9 }}",
    "a long list": "{% set a = [1] * 10**9 %}",
    "doubling by ~": GROW + "ns.x ~ ns.x %}" + END,
    "doubling by +": GROW + "ns.x + ns.x %}" + END,
    "growing by the replace filter": GROW + "ns.x|replace('a', ns.x) %}" + END,
    "growing by the replace method": GROW + "ns.x.replace('a', ns.x) %}" + END,
    "growing by the join filter": GROW + "range(1000)|join(ns.x) %}" + END,
    "growing by the join method": GROW + "ns.x.join(range(1000)|map('string')) %}" + END,
    "growing by escapes": GROW + "(ns.x ~ '&')|replace('a', '&')|escape|string|replace('&', '&&&&') %}" + END,
    "growing by a set block": GROW[: -len(" = ")] + " %}{{ ns.x }}{{ ns.x }}{% endset %}" + END,
    "long lists in a loop": LOOP + "{% set a = [" + "1," * 20000 + "] %}" + END,
    "long constants in a loop": "{% macro m() %}"
    + LOOP
    + "{{ '"
    + "a" * 60000
    + "' }}"
    + END
    + "{% endmacro %}{{ m() }}",
    "many arguments": "{% macro m() %}{{ varargs|length }}{% endmacro %}{% set a = range(90000)|list %}"
    + LOOP
    + "{{ m(*a) }}"
    + END,
    "many wide formats": "{{ '%999d' * 100000 % ([1] * 100000)|join }}",
    "a wide indent": "{{ 'a'|indent(10**9, true) }}",
    "a strip of many characters": "{% set a = 'x' * 1000000 %}{{ a.strip(a) }}",
    "a trim of many characters": "{% set a = 'x' * 1000000 %}{{ a|trim(a) }}",
    "a tree that is printed": TREE + "{{ ns.x }}",
    "a tree that is compared": TREES + "{{ ns.x == ms.x }}",
    "a tree that is searched": TREE + "{{ ns.x in [1, ns.x] }}",
    "a tree that is tested": TREE + "{{ [[1], ns.x]|select('in', [[2]])|list }}",
    "a tree in json": TREE + "{{ ns.x|tojson }}",
    "a tree that is joined": TREE + "{{ [ns.x]|join }}",
    "a tree that is formatted": TREE + "{{ '%s' % ns.x }}",
    "a tree that is a key": TUPLES + "{% set d = {ns.x: 1} %}",
    "a tree that is looked up": TUPLES + "{{ {}[ns.x] }}",
    "a tree that is looked up by a method": TUPLES + "{{ {}.get(ns.x) }}",
    "a tree in a dict's pairs": TUPLES + "{{ dict([(ns.x, 1)]) }}",
    "a tree for the name of a filter": TUPLES + "{{ ns.x is filter }}",
    "a tree in lower case": TREE + "{{ ns.x is lower }}",
    "a tree that has changed": TREE
    + TREE.replace("ns", "ms")
    + "{% for t in [ns.x, ms.x] %}{{ loop.changed(t) }}"
    + END,
    "a tree that is concatenated": TREE + "{{ ns.x ~ '' }}",
}


def render(source: str) -> str:
    return ChatTemplate(source, bos="", eos="", file="x.gguf").render(MESSAGES)


def failure_of(source: str) -> str:
    with pytest.raises(FormatError) as failure:
        render(source)
    message = str(failure.value)
    assert message.startswith("x.gguf: chat template")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_work_ends_when_its_steps_are_used_up(name: str) -> None:
    assert "steps" in failure_of(ENDLESS[name])


def test_a_runaway_template_takes_bounded_memory() -> None:
    tracemalloc.start()
    try:
        for name in ("a long string", "a long list", "doubling by ~", "growing by a set block", "a wide indent"):
            failure_of(ENDLESS[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 2**20


def test_the_limit_holds_in_any_thread() -> None:
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(failure_of(ENDLESS["nested loops"])))
    thread.start()
    thread.join()
    assert "steps" in messages[0]


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", str(MAX_RANGE)),
        ("{{ range(10**9)|list }}", str(MAX_RANGE)),
        ("{{ 7 ** (10 ** 7) }}", "bits"),
        ("{{ 2 ** 4000 * 2 ** 4000 }}", "bits"),
        ("{% set ns = namespace(x=3) %}{% for i in range(9999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "bits"),
        ("{{ '%1000000000d' % 1 }}", "999 characters"),
        ("{{ '%*d' % (1000000000, 1) }}", "999 characters"),
        ("{{ '%.1000000000f' % 1 }}", "999 characters"),
        ("{{ '%(a)1000000000d' % {'a': 1} }}", "999 characters"),
        ("{{ '%1000000000d' is even }}", "numbers"),
        ("{{ '%1000000000d' is divisibleby(3) }}", "numbers"),
        ("{{ [1]|map(attribute='0.' * 1000)|list }}", "256 characters"),
        ("{{ [1]|tojson(indent=10**9) }}", "indent"),
        ("{{ strftime_now('%1000000000Y') }}", "strftime_now"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", str(MAX_DEPTH)),
        ("{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}", str(MAX_DEPTH)),
        ("{% block a %}{{ self.a() }}{% endblock %}", str(MAX_DEPTH)),
    ],
)
def test_values_past_a_limit_are_refused_before_they_exist(source: str, limit: str) -> None:
    assert limit in failure_of(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ (1).__class__ }}",
        "{{ messages.__init__ }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ messages|attr('__class__') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ range.__self__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ raise_exception.__func__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ lipsum.__globals__ }}",
        "{% for x in messages %}{{ loop._iterable }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m._func }}",
        "{{ nosuch.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'a'.zfill(10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ 'a'.format_map({}) }}",
        "{% set ns = namespace(__html__=1) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
    ],
)
def test_nothing_outside_can_be_reached(source: str) -> None:
    failure_of(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "-" * 20000 + "1 }}",
        "{{ 1" + "+1" * 20000 + " }}",
        "{{ 1" + "|abs" * 10000 + " }}",
        "{% if a %}" * 3000 + "{% endif %}" * 3000,
        "{% for a in b %}" * 50 + "{% endfor %}" * 50,
        "{{ " + "[" * 3000 + "]" * 3000 + " }}",
        "{{ " + "9" * 10000 + " }}",
        "{{ 'a'" + " ~ 'a'" * 20000 + "",
    ],
    ids=range(9),
)
def test_sources_that_overflow_compilers_are_refused(source: str) -> None:
    failure_of(source)


def test_steps_are_the_same_each_time_and_grow_with_the_messages() -> None:
    def spent(words: int) -> int:
        budget = Budget(STEPS)
        sandbox = Sandbox(budget)
        code = Sandbox(Budget(STEPS)).compile_template("{% for m in ms %}{{ m ~ m|upper }}{% endfor %}")
        template = sandbox.template_class.from_code(sandbox, code, sandbox.globals)
        list(template.root_render_func(template.new_context({"ms": ["word"] * words})))
        return budget.units - budget.left

    assert spent(10) == spent(10)
    assert spent(20) - spent(10) == spent(30) - spent(20) > 0


def test_a_long_conversation_has_steps_enough() -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 < messages|length - 1 and m.role == 'user' %}{{ '<|im_start|>' + "
        "m.role + '\\n' + m.content | trim + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    )
    messages: list[Any] = [{"role": "user", "content": "word " * 200}] * 3500
    assert len(ChatTemplate(source, bos="", eos="", file="x.gguf").render(messages)) > 3_500_000


def test_a_budget_says_what_it_was() -> None:
    budget = Budget(STEPS + STEPS_PER_UNIT * breadth("a" * 640))
    with pytest.raises(Spent, match=str(STEPS + STEPS_PER_UNIT * 11)):
        budget.spend(10**9)
