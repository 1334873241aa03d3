"""The kernel's core in a simulated world: virtual time, late operations, faults, and a judge after every step.

simulate ──seeds──> play ──> World ──> Core            chooser    every decision; the script of a run
                      │        ├─ workload, story      judge      readers and tickets; whom a fault excuses
                   shrink      ├─ device, host, disk   fences     pages and frames of what is in flight
                      v        └─ faults               plan       what a seed's machine looks like
                 regression file ──replay──> the same violation
"""

from llm_os.drivers.simulation.faults import FAULTS
from llm_os.drivers.simulation.play import Failure, replay
from llm_os.drivers.simulation.simulate import Report, simulate

__all__ = ["FAULTS", "Failure", "Report", "replay", "simulate"]
