"""This kernel as an MCP server, `list_models` and `generate`, over stdio or HTTP on loopback. Knows no transport.

HTTP has no keys: whoever can reach the port can use the models, so it listens on loopback only; the library refuses
requests whose Host or Origin is another, which a web page in a browser would send.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

import llm_os
from llm_os import Kernel, Request, Sampling

DEADLINE_S = 600.0


def build(kernel: Kernel) -> Any:
    """The server, an `mcp.server.mcpserver.MCPServer`, around a kernel that somebody else closes."""
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    server = MCPServer("llm-os", version=llm_os.__version__, instructions="Local language models.")

    @server.tool()
    def list_models() -> list[dict[str, Any]]:
        """List the language models on this machine: those in the store, and whether they are in memory now."""
        loaded = {model.name: model.where for model in kernel.models()}
        stored = {model.name: model.bytes for model in llm_os.Store().list()}
        return [
            {"name": name, "bytes": stored.get(name), "where": loaded.get(name, "on disk")}
            for name in sorted({*loaded, *stored})
        ]

    @server.tool()
    async def generate(
        model: Annotated[str, Field(description="a name that list_models gives")],
        prompt: Annotated[str, Field(description="what to ask", max_length=1_000_000)],
        system: Annotated[str | None, Field(description="instructions for the model")] = None,
        max_tokens: Annotated[int, Field(ge=1, le=32768)] = 512,
        temperature: Annotated[float | None, Field(ge=0, le=2)] = None,
        seed: Annotated[int | None, Field(ge=0)] = None,
    ) -> str:
        """Ask a local language model; returns its answer."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        try:
            request = Request(
                model=model,
                messages=messages,
                sampling=Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed),
                tenant="mcp",
                deadline_s=DEADLINE_S,
            )
            return (await kernel.generate(request)).text
        except llm_os.Error as error:
            raise ToolError(str(error)) from error

    return server
