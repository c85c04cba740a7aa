"""Print the requirements of the dependency group "dev", one a line: pip knows groups since 25.1 only."""

from __future__ import annotations

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
print("\n".join(project["dependency-groups"]["dev"]))
