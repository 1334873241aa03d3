"""llama.cpp as it is on processors without AMX, on one that has it."""

from __future__ import annotations

import engine_llama_cpp


class Engine(engine_llama_cpp.Engine):
    amx = False
