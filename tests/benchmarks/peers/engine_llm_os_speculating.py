"""llm-os as a user gets it: with the plugins that draft tokens ahead, where there are any."""

from __future__ import annotations

import engine_llm_os


class Engine(engine_llm_os.Engine):
    speculation = True
