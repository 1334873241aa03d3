"""The scheduling policies that come with llm-os: `fair` and `fifo`."""

from __future__ import annotations

from llm_os import Candidate, Config, Fair, Policy, RegisterPolicy, Share, hookimpl


class Fifo:
    """First come, first served, whoever the tenant is."""

    def share(self, share: Share) -> float:
        return 0.0

    def rank(self, candidate: Candidate) -> float:
        return 0.0


@hookimpl
def register_policies(register: RegisterPolicy) -> None:
    register("fair", _fair)
    register("fifo", _fifo)


def _fair(config: Config) -> Policy:
    return Fair()


def _fifo(config: Config) -> Policy:
    return Fifo()
