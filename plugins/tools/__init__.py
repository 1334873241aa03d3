"""Function calling: tools for models, with the permission of people.

    schema.py        Python functions become tools            validate.py     do arguments fit?
    parsers.py       finds calls in what a model said         permissions.py  who may do what
    turns.py         a conversation in a model's own words    calls.py        runs calls, within limits
    runner.py        the loop: `converse`                     commands.py     programs as tools
    examples.py      a calculator and a clock, which the plugin offers

Nothing here can be reached by a model but through `calls.py`. See docs/plugins/tools.md.
"""

from __future__ import annotations

from llm_os import RegisterTool, hookimpl
from llm_os.plugins.tools.calls import Result
from llm_os.plugins.tools.commands import program
from llm_os.plugins.tools.parsers import Call
from llm_os.plugins.tools.permissions import Permissions, Question, Rule
from llm_os.plugins.tools.runner import Ended, Said, converse
from llm_os.plugins.tools.schema import make_tool

__all__ = ["Call", "Ended", "Permissions", "Question", "Result", "Rule", "Said", "converse", "make_tool", "program"]


@hookimpl
def register_tools(register: RegisterTool) -> None:
    from llm_os.plugins.tools.examples import CALCULATOR, CLOCK

    register(CALCULATOR)
    register(CLOCK)
