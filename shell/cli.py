"""The command `llm-os`: which commands there are, and what becomes of an error.

Exit codes: 0 done; 2 the command line or the request is wrong; 1 anything else; 128 + a signal's number after it
(130 for Ctrl-C). Every error is one line on stderr; LLM_OS_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Literal, NoReturn

from cyclopts import App, CycloptsError, UnknownOptionError, UnusedCliTokensError

import llm_os
from llm_os.shell import extensions, signals, stdio


def _examples(*lines: str) -> str:
    return "\n".join(("Examples:", *(f"  {line}" for line in lines), ""))


app = App(
    name="llm-os",
    help="Run language models on this machine.",
    help_epilogue=_examples(
        'llm-os run smollm2:135m "What is the capital of France?"',
        "git diff | llm-os run smollm2:135m --max-tokens 100",
        "llm-os chat ./model.gguf --temperature 0.2",
    ),
    help_format="plaintext",
    version=llm_os.__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command(  # named by text, so that only the command that runs is imported
    "llm_os.shell.run:run",
    name="run",
    usage="Usage: llm-os run [OPTIONS] MODEL [PROMPT]",
    help="Answer one prompt, on stdout. A model that is not here yet is pulled first.",
    help_epilogue=_examples(
        'llm-os run smollm2:135m "What is the capital of France?" --temperature 0',
        "llm-os run smollm2:135m --system 'Answer in one word.' < question.txt",
        "llm-os run ./model.gguf 'def fibonacci(' --raw --max-tokens 64 --stop $'\\n\\n'",
    ),
)
app.command(
    "llm_os.shell.chat:chat",
    name="chat",
    help="Talk with a model, with history. Ctrl-C stops an answer, Ctrl-D leaves.",
    help_epilogue=_examples("llm-os chat smollm2:135m --temperature 0.2 --system 'You are brief.'"),
)
app.command(
    "llm_os.shell.models:pull",
    name="pull",
    help="Download a model into the store, and print its path.",
    help_epilogue=_examples("llm-os pull smollm2:135m", "llm-os pull hf:Qwen/Qwen3-0.6B"),
)
app.command(
    "llm_os.shell.models:models",
    name="models",
    help="List the models in the store, and the aliases that can be pulled.",
    help_epilogue="",
)
app.command(
    "llm_os.shell.models:rm",
    name="rm",
    usage="Usage: llm-os rm MODEL...",
    help="Remove models from the store. Asks nothing.",
    help_epilogue="",
)
app.command(
    "llm_os.shell.doctor:doctor",
    name="doctor",
    help="Show what was found on this machine, and what is wrong with it.",
    help_epilogue="",
)
app.command(
    "llm_os.shell.bench:bench",
    name="bench",
    help="Measure how fast a model is on this machine.",
    help_epilogue=_examples(
        "llm-os bench smollm2:135m",
        "llm-os bench smollm2:135m --quick --precision exact",
        "llm-os bench ./model.gguf --batch 1,8 --context 4096 --rounds 5 --json",
    ),
)
app.command(
    "llm_os.shell.sim:sim",
    name="sim",
    help="Run the kernel in a simulated world with faults, and check every step.",
    help_epilogue=_examples(
        "llm-os sim --seeds 1..300 --steps 1000 --jobs 2",
        "llm-os sim --seeds 7 --faults crash,lost_sync",
        "llm-os sim --replay regressions/token-7.json",
    ),
)
plugins = App(name="plugins", help="List, enable, disable and begin plugins.", help_epilogue="")
app.command(plugins)
plugins.command(
    "llm_os.shell.plugins:list_plugins",
    name="list",
    help="List the plugins that are installed, and which are enabled.",
    help_epilogue="",
)
plugins.command(
    "llm_os.shell.plugins:info",
    name="info",
    help="Show what a plugin says of itself.",
    help_epilogue="",
)
plugins.command(
    "llm_os.shell.plugins:enable",
    name="enable",
    help="Load a plugin from now on. Asks first.",
    help_epilogue="",
)
plugins.command(
    "llm_os.shell.plugins:disable",
    name="disable",
    help="Load a plugin no more, however broken it is.",
    help_epilogue="",
)
plugins.command(
    "llm_os.shell.plugins:new",
    name="new",
    help="Write a plugin to begin with.",
    help_epilogue=_examples("llm-os plugins new my-plugin --into ~/src"),
)


@app.command(help_epilogue="")
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes llm-os commands and options.

    bash: eval "$(llm-os completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc after compinit;
    fish: llm-os completion fish > ~/.config/fish/completions/llm-os.fish

    Parameters
    ----------
    shell
        The shell that reads the script.
    """
    script = app.generate_completion(shell=shell)
    # where cyclopts has nothing to offer, bash completes file names: MODEL may be one
    print(script.replace("complete -F", "complete -o default -F") if shell == "bash" else script)


def main(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    stdio.prepare()
    with signals.handled():
        try:
            _extend(arguments)
            code = app(list(arguments), exit_on_error=False, print_error=False, help_on_error=False)
            sys.stdout.flush()
            signals.check()
            return int(code or 0)
        except BrokenPipeError:
            stdio.abandon_stdout()
            return 141  # 128 + SIGPIPE, as of a program in C
        except KeyboardInterrupt:
            _interrupted()
        except Exception as error:
            try:
                signals.check()  # an import that is interrupted may fail in its own way
            except KeyboardInterrupt:
                _interrupted()
            if os.environ.get("LLM_OS_DEBUG"):
                raise
            if isinstance(error, OSError):
                stdio.abandon_stdout()  # it may be what failed, and would fail again at the end
            stdio.say(f"llm-os: {_line(error)}")
            return 2 if _is_usage(error) else 1


def _extend(arguments: Sequence[str]) -> None:
    """Add what plugins offer, where it can matter: a command that is not ours, and the list of all commands."""
    if arguments and arguments[0] not in ("--help", "-h") and (arguments[0] in app or arguments[0].startswith("-")):
        return
    known = {name for name in app if not name.startswith("-")}
    found, problems = extensions.commands(known)
    for name, (command, help) in found.items():
        app.command(command, name=name, help=help)
    for problem in problems:
        stdio.say(f"llm-os: {problem}")
    if arguments and arguments[0] not in app and (off := extensions.off(arguments[0])):
        raise llm_os.ConfigError(f"{arguments[0]} comes with a plugin that is off; llm-os plugins enable {off}")


def _interrupted() -> NoReturn:
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    sys.stderr.flush()
    # Not by return: an interpreter in which `eval` was interrupted once kills itself with SIGINT instead of exiting.
    os._exit(signals.INTERRUPTED)


def _is_usage(error: Exception) -> bool:
    if isinstance(error, llm_os.Refused):  # well formed, but not now
        return False
    return isinstance(error, (CycloptsError, llm_os.ConfigError, llm_os.RequestError))


def _line(error: Exception) -> str:
    if isinstance(error, CycloptsError):
        return _usage(error)
    if isinstance(error, llm_os.Error):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}; this is a bug: LLM_OS_DEBUG=1 shows where"


def _usage(error: CycloptsError) -> str:
    help_line = f"See {' '.join(('llm-os', *(error.command_chain or ())))} --help"
    if isinstance(error, UnusedCliTokensError):
        extra = " ".join(error.unused_tokens or ())
        return f"there is no place for {extra!r}; put quotes around a text of several words. {help_line}"
    if isinstance(error, UnknownOptionError) and " " in (error.token.keyword or error.token.value):
        return f'a text that begins with "-" needs -- before it. {help_line}'
    return f"{error} {help_line}"
