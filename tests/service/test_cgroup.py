"""Control groups as the kernel shows them, version 1 and 2: the tightest limit on the way up counts."""

from pathlib import Path

import pytest

from service.cgroup import ControlGroup, Memory
from service.config import Settings, cpu_count
from service.independence.certify import candidates

MIB = 2**20
UNLIMITED = 9_223_372_036_854_771_712  # what version 1 writes


def group_of(tmp_path: Path, membership: str, files: dict[str, str]) -> ControlGroup:
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "membership").write_text(membership)
    return ControlGroup(root, tmp_path / "membership")


def version_2(tmp_path: Path, files: dict[str, str], path: str = "/") -> ControlGroup:
    return group_of(tmp_path, f"0::{path}\n", {"cgroup.controllers": "cpu memory", **files})


def version_1(tmp_path: Path, files: dict[str, str], path: str = "/") -> ControlGroup:
    return group_of(tmp_path, f"4:memory:{path}\n1:cpu,cpuacct:{path}\n0::/\n", files)


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000\n", None), ("50000 100000\n", 0.5), ("300000 100000", 3.0), ("", None)]
)
def test_the_quota_of_version_2_is_time_over_period(tmp_path, text, quota):
    assert version_2(tmp_path, {"cpu.max": text}).cpu_quota() == quota


@pytest.mark.parametrize(("time_us", "quota"), [("-1", None), ("150000", 1.5), ("not a number", None)])
def test_the_quota_of_version_1_is_time_over_period(tmp_path, time_us, quota):
    files = {"cpu/cpu.cfs_quota_us": time_us, "cpu/cpu.cfs_period_us": "100000"}

    assert version_1(tmp_path, files).cpu_quota() == quota


def test_the_tightest_group_on_the_way_up_counts(tmp_path):
    files = {"cpu.max": "400000 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}

    assert version_2(tmp_path, files, "/a/b").cpu_quota() == 2.0


@pytest.mark.parametrize("path", ["/docker/not-mounted-here", "/../elsewhere"])
def test_a_container_whose_path_is_the_hosts_reads_the_top_of_what_it_sees(tmp_path, path):
    limit = {"memory/memory.limit_in_bytes": f"{300 * MIB}", "memory/memory.usage_in_bytes": f"{100 * MIB}"}

    assert version_1(tmp_path, limit, path).memory() == Memory(300 * MIB, 100 * MIB)


@pytest.mark.parametrize("name", ["inactive_file", "total_inactive_file"])
def test_file_pages_that_nobody_looks_at_are_not_in_use(tmp_path, name):
    files = {"memory.max": f"{300 * MIB}", "memory.current": f"{100 * MIB}", "memory.stat": f"{name} {60 * MIB}\n"}

    assert version_2(tmp_path, files).memory() == Memory(300 * MIB, 40 * MIB)


def test_the_memory_limit_that_is_nearest_counts(tmp_path):
    files = {
        "memory.max": f"{900 * MIB}",
        "memory.current": f"{800 * MIB}",
        "a/memory.max": f"{500 * MIB}",
        "a/memory.current": f"{10 * MIB}",
    }

    assert version_2(tmp_path, files, "/a").memory() == Memory(900 * MIB, 800 * MIB)


def test_without_a_limit_there_is_none(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    files = {"memory/memory.limit_in_bytes": str(UNLIMITED), "memory/memory.usage_in_bytes": "1"}

    assert version_1(tmp_path / "1", files).memory() is None
    assert version_2(tmp_path / "2", {"memory.max": "max", "memory.current": "1"}).memory() is None


def test_on_a_machine_without_control_groups_there_is_no_limit_and_no_count(tmp_path):
    group = ControlGroup(tmp_path / "none", tmp_path / "none")

    assert (group.cpu_quota(), group.memory(), group.out_of_memory_kills()) == (None, None, None)


def test_kills_for_memory_are_counted_in_both_versions(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"

    assert version_1(tmp_path / "1", {"memory/memory.oom_control": control}).out_of_memory_kills() == 4
    assert version_2(tmp_path / "2", {"memory.events": "low 0\noom 5\noom_kill 3\n"}).out_of_memory_kills() == 3


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000 100000", 1), ("190000 100000", 1), ("200000 100000", 2), ("900000 100000", 8)]
)
def test_threads_are_chosen_by_the_quota_and_never_beyond_the_cores(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))

    assert cpu_count(version_2(tmp_path, {"cpu.max": quota})) == cores


def test_lanes_decoders_and_shapes_follow_the_quota(tmp_path, monkeypatch):
    group = version_2(tmp_path, {"cpu.max": "400000 100000"})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr("service.config.ControlGroup", lambda: group)

    assert Settings().cores_share == 4
    assert Settings(workers=2).cores_share == 2
    assert Settings(workers=8).cores_share == 1
    assert max(shape.threads for shape in candidates(cpu_count(), "cpu", 8)) == 4
