"""What the cpu and cuda drivers say of the machine they find."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_os.drivers import cpu, cuda
from llm_os.kernel.config import Config
from llm_os.kernel.errors import DriverError


def test_the_probe_names_the_processor_its_memory_and_torchs_build():
    info = cpu.probe_cpu()
    assert info.unavailable is None
    assert info.driver == "cpu"
    assert info.device.endswith("threads")
    assert 0 < info.free_bytes <= info.total_bytes
    assert "build" in info.details["torch"]


def files(monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> None:
    monkeypatch.setattr(cpu, "_lines", lambda path: texts.get(path, "").splitlines())


MEMINFO = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 600 kB\n"


def test_memory_is_the_systems_where_there_is_no_group(monkeypatch: pytest.MonkeyPatch):
    files(monkeypatch, {"/proc/meminfo": MEMINFO})
    info = cpu.probe_cpu()
    assert (info.total_bytes, info.free_bytes) == (1000 * 1024, 600 * 1024)


@pytest.mark.parametrize(
    "texts",
    [
        {
            "/proc/self/cgroup": "0::/job/step\n",
            "/sys/fs/cgroup/job/memory.max": "500000\n",
            "/sys/fs/cgroup/job/memory.current": "200000\n",
            "/sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 50000\n",
            "/sys/fs/cgroup/job/step/memory.max": "max\n",
        },
        {
            "/proc/self/cgroup": "5:cpu:/\n4:memory:/job\n",
            "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "500000\n",
            "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "200000\n",
            "/sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 50000\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    ],
    ids=["v2", "v1"],
)
def test_a_control_groups_limit_is_the_memory_there_is(monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]):
    files(monkeypatch, {"/proc/meminfo": MEMINFO} | texts)
    info = cpu.probe_cpu()
    assert (info.total_bytes, info.free_bytes) == (500000, 350000)


def test_a_system_without_proc_is_still_described(monkeypatch: pytest.MonkeyPatch):
    files(monkeypatch, {})
    info = cpu.probe_cpu()
    assert info.unavailable is None
    assert info.features == ()
    assert info.total_bytes > 0


def test_the_features_are_those_that_the_processor_has(monkeypatch: pytest.MonkeyPatch):
    files(monkeypatch, {"/proc/cpuinfo": "model name\t: Some CPU @ 3GHz\nflags\t\t: fpu avx2 avx512_vnni\n"})
    info = cpu.probe_cpu(threads=3)
    assert info.device == "Some CPU @ 3GHz, 3 threads"
    assert info.features == ("avx2", "avx512_vnni")


def test_a_machine_without_a_gpu_says_why():
    info = cuda.probe_cuda()
    if info.unavailable is None:
        pytest.skip("this machine has a GPU")
    assert info.total_bytes == 0
    with pytest.raises(DriverError, match=r"the cuda driver cannot be used: .*; use the cpu driver"):
        cuda.open_cuda(Config())


def test_a_broken_gpu_installation_is_a_reason_and_not_an_exception(monkeypatch: pytest.MonkeyPatch):
    import pynvml

    def fail() -> None:
        raise RuntimeError("driver and library\nversions differ")

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert cuda.probe_cuda().unavailable == "RuntimeError: driver and library versions differ"


def test_probing_does_not_need_a_readable_file(tmp_path: Path):
    assert cpu._lines(str(tmp_path / "absent")) == []
