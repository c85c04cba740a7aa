"""Generate skeyd/v1 and skeyd/standard.binpb from the .proto files, or check that they are what would be generated.

tests/test_generated.py does the cheaper half of the check where those tools can't be had.

Run by `make proto` and `make proto-check` with the Python of an environment that has grpcio-tools 1.62.3 and
mypy-protobuf 3.6.0: what that version generates runs from protobuf 4.21.12 to the newest, and it can't share an
environment with protobuf 5 or later.
"""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STANDARD = "standard.binpb"
SOURCES = "made_from.sha256"


def sources() -> str:
    """List what the generated files are made from, with checksums: what can be checked without the tools."""
    files = sorted(path for folder in ("proto", "third_party") for path in (ROOT / folder).rglob("*.proto"))
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(ROOT)}\n" for path in files)


def generate(out: Path) -> None:
    """Generate all into `out`/skeyd, as it is in the checkout."""
    (out / "skeyd").mkdir(parents=True, exist_ok=True)
    proto = ROOT / "proto"
    files = sorted(str(path.relative_to(proto)) for path in proto.rglob("*.proto"))
    run = [sys.executable, "-m", "grpc_tools.protoc"]
    languages = ["--python_out", "--grpc_python_out", "--mypy_out", "--mypy_grpc_out"]
    subprocess.run([*run, f"-I{proto}", *(f"{name}={out}" for name in languages), *files], check=True)
    third = ROOT / "third_party" / "proto"
    files = sorted(str(path.relative_to(third)) for path in third.rglob("*.proto"))
    standard = out / "skeyd" / STANDARD
    subprocess.run([*run, f"-I{third}", "--include_imports", f"--descriptor_set_out={standard}", *files], check=True)
    (out / "skeyd" / "v1" / SOURCES).write_text(sources())
    package = out / "skeyd" / "v1" / "__init__.py"
    package.write_text('"""Generated from proto/skeyd/v1 by `make proto`; never edited."""\n')


def main() -> int:
    """Generate into the checkout, or with --check into a temporary folder and compare."""
    v1, standard = ROOT / "skeyd" / "v1", ROOT / "skeyd" / STANDARD
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        generate(out)
        made = out / "skeyd" / "v1"
        if sys.argv[1:] == ["--check"]:
            names = sorted({path.name for path in (*made.iterdir(), *v1.iterdir()) if path.is_file()})
            _, differ, missing = filecmp.cmpfiles(made, v1, names, shallow=False)
            stale = differ + missing
            if not filecmp.cmp(out / "skeyd" / STANDARD, standard, shallow=False):
                stale.append(STANDARD)
            if stale:
                print(f"stale, run `make proto`: {', '.join(sorted(stale))}", file=sys.stderr)
                return 1
            return 0
        shutil.rmtree(v1, ignore_errors=True)
        shutil.copytree(made, v1)
        shutil.copyfile(out / "skeyd" / STANDARD, standard)
    return 0


if __name__ == "__main__":
    sys.exit(main())
