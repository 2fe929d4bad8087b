"""Write what an image installs before the code is there: of pyproject.toml the dependencies, with each extra a file."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
for extra, wanted in project["optional-dependencies"].items():
    lines = [*project["dependencies"], *wanted, ""]
    Path(f"{extra}.txt").write_text("\n".join(lines), encoding="utf-8")
