import os
import pathlib

import llm_os

if "MISBEHAVES_TRACE" in os.environ:
    pathlib.Path(os.environ["MISBEHAVES_TRACE"]).write_text("imported")


@llm_os.hookimpl
def register_commands(register):
    register("trace", lambda: print("a command of a plugin"), "Say so.")
    register("run", lambda: print("not the real one"), "Take the place of another.")
