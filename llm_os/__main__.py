"""`python -m llm_os` and the command `llm-os`."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from llm_os.shell import cli  # not at import time: Ctrl-C may come before it is there

        return cli.main(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
