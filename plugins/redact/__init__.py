"""Personal data out of prompts, and back into answers: the plugin `redact`.
What it does not find, docs/plugins/redact.md says.

    request ──Redaction.open──> mapping of this request ──> messages with <EMAIL_1> ──> model
    reader  <──Restorer── <──Screen── answer with <EMAIL_1> <───────────────────────────  │
"""

from __future__ import annotations

from llm_os import Config, RegisterCommand, RegisterFilter, hookimpl


@hookimpl
def register_filters(register: RegisterFilter, config: Config) -> None:
    from llm_os.plugins.redact.filter import Redaction
    from llm_os.plugins.redact.options import read

    register("redact", Redaction(read(config.options.get("redact", {}))))


@hookimpl
def register_commands(register: RegisterCommand) -> None:
    from llm_os.plugins.redact.command import redact

    register("redact", redact, "Show a text without the personal data in it.")
