"""Function calling, for hosts: what `docs/plugins/tools.md` shows. The parts are in `plugins/tools/`."""

from __future__ import annotations

from llm_os.plugins.tools import Call as Call
from llm_os.plugins.tools import Ended as Ended
from llm_os.plugins.tools import Permissions as Permissions
from llm_os.plugins.tools import Question as Question
from llm_os.plugins.tools import Result as Result
from llm_os.plugins.tools import Rule as Rule
from llm_os.plugins.tools import Said as Said
from llm_os.plugins.tools import converse as converse
from llm_os.plugins.tools import make_tool as make_tool
from llm_os.plugins.tools import program as program
