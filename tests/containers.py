"""A container engine for tests: the one that is there, or the one that FOLDSERVE_ENGINE_SETUP names a script for.

The script's words: `base IMAGE…` starts an engine and provides those images, `env` prints the exports that reach it,
`stop` ends it.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
BASES = ("python:3.11-slim-bookworm", "haproxy:2.8-bookworm", "prom/prometheus:v2.53.5")
EXPORT = re.compile(r"(\w+)=(\S+)")


class Docker:
    """`docker` as a command, on the engine that `environment` reaches."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)

    def tried(self, *words: str, **variables: str) -> "Said":
        """Run it, and return what it said on both streams, in the order in which it was said."""
        done = subprocess.run(
            ["docker", *words],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=500,
        )
        return Said(done.returncode, done.stdout)

    def run(self, *words: str) -> str:
        said = self.tried(*words)
        assert said.status == 0, f"docker {' '.join(words)}: {said.text}"
        return said.text.strip()

    def build(self, target: str, *flags: str, context: Path = ROOT) -> str:
        """Build an image under its usual tag, and return what was said of each step."""
        return self.run(
            "build", "--progress", "plain", "--target", target, "--tag", f"foldserve:{target}", *flags, str(context)
        )

    def has(self, image: str) -> bool:
        return self.tried("image", "inspect", image).status == 0


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    status: int
    text: str


class Compose:
    """One project of `docker compose`, with the files and variables given."""

    def __init__(self, project: str, files: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._words = ["docker", "compose", "--project-name", project, *(f"--file={ROOT / file}" for file in files)]
        self._environment = dict(environment)

    def tried(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self._environment, **variables}
        return subprocess.run(
            [*self._words, *words], env=environment, capture_output=True, text=True, check=False, timeout=400
        )

    def run(self, *words: str) -> str:
        done = self.tried(*words)
        assert done.returncode == 0, f"docker compose {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def python(self, replica: int, code: str) -> dict[str, object]:
        """Run code inside a replica, and read the JSON that it prints."""
        return json.loads(self.run("exec", "-T", "--index", str(replica), "foldserve", "python", "-c", code))

    def docker(self, *words: str) -> str:
        done = subprocess.run(
            ["docker", *words], env=self._environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def containers(self, service: str) -> list[str]:
        return self.run("ps", "--all", "--quiet", service).split()

    def url(self, service: str = "foldserve", port: int = 8000) -> str:
        return "http://" + self.run("port", service, str(port)).strip()

    def send(self, image: bytes, **headers: str) -> httpx.Response:
        """Ask the service that is published for the labels of an image."""
        return httpx.post(f"{self.url()}/predict", content=image, headers=headers, timeout=60)


def open_to_all(folder: Path, but: Path | None = None) -> None:
    """Let the user of a container read what pytest made for its own user alone, all `but` one."""
    for one in (folder, *folder.rglob("*"), *folder.parents[:3]):
        if one.stat().st_uid == os.getuid() and one not in {Path("/"), but}:
            one.chmod(one.stat().st_mode | (0o055 if one.is_dir() else 0o044))


@contextmanager
def engine() -> Iterator[dict[str, str]]:
    """Give the environment in which `docker` reaches an engine. Skips, and says why, where none can be had."""
    setup = os.environ.get("FOLDSERVE_ENGINE_SETUP")
    plain = {
        name: value for name, value in os.environ.items() if name != "TMPDIR" and not name.startswith("FOLDSERVE_")
    }
    if setup is None:
        _need_an_engine(plain)
        yield plain
        return
    try:
        made = subprocess.run(
            ["bash", setup, "base", *BASES], env=plain, capture_output=True, text=True, check=False, timeout=500
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"NOT TESTED: the containers, for {setup} had set up no engine after 500 s")
    if made.returncode != 0:
        pytest.skip(f"NOT TESTED: the containers, for {setup} could set up no engine: {made.stderr[-500:]}")
    try:
        told = subprocess.run(["bash", setup, "env"], env=plain, capture_output=True, text=True, check=True).stdout
        yield plain | dict(EXPORT.findall(told))
    finally:
        subprocess.run(["bash", setup, "stop"], env=plain, capture_output=True, check=False, timeout=120)


def _need_an_engine(environment: Mapping[str, str]) -> None:
    words = ["docker", "compose", "version"]
    for command in (words, ["docker", "info"]):
        if (
            shutil.which("docker") is None
            or subprocess.run(command, env=environment, capture_output=True, check=False).returncode
        ):
            pytest.skip("NOT TESTED: the containers, for there is no container engine with `docker compose` here")
