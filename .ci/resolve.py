"""Do the pinned versions install together? `make resolve`: each extra, for each Python that pyproject.toml admits.

Reads the package index's metadata alone, by uv's resolver, and installs nothing. A version counts only if it has a
wheel for that Python on Linux. Exits 1 with the reason where pins have no solution, where constraints.txt pins what no
extra needs, or where an extra brings something without a pin; exits 2 where no index can be reached.
"""

import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import uv
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

# What uv says when the index does not answer, as opposed to answering that something does not exist.
UNREACHABLE = ("error sending request", "Failed to fetch", "dns error", "network was disabled")


class Case(NamedTuple):
    """One environment that a user may ask for."""

    python: str
    extra: str  # "" for the bare project


class Resolved(NamedTuple):
    """What the resolver made of a case: names of the packages, or why there is no solution."""

    case: Case
    packages: frozenset[str]
    error: str
    seconds: float


def cases(project: dict) -> list[Case]:
    """Every extra under every Python 3 that the project admits."""
    admitted = SpecifierSet(project["requires-python"])
    pythons = [f"3.{minor}" for minor in range(8, 30) if admitted.contains(f"3.{minor}")]
    return [Case(python, extra) for python in pythons for extra in ("", *project.get("optional-dependencies", {}))]


def resolve(root: Path, program: str, case: Case) -> Resolved:
    """Asks uv, whose path is `program`, for the packages of one case under the constraints."""
    started = time.monotonic()
    # This interpreter runs the resolver; without it uv would first look for one of the version asked for.
    command = [program, "pip", "compile", "--quiet", "pyproject.toml", "-c", "constraints.txt"]
    command += ["--python", sys.executable, "--python-version", case.python, "--python-platform", "linux"]
    # The system's certificates, as pip and git use them: a proxy that inspects traffic has its own.
    command += [
        "--system-certs",
        "--no-build",
        "--no-header",
        "--no-annotate",
        *(["--extra", case.extra] if case.extra else []),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    lines = [line.split("#")[0].strip() for line in done.stdout.splitlines()]
    names = frozenset(canonicalize_name(Requirement(line).name) for line in lines if line)
    return Resolved(case, names, done.stderr.strip() if done.returncode else "", time.monotonic() - started)


def differences(pinned: set[str], needed: set[str]) -> list[str]:
    """Pins that nothing needs, and packages that come without one."""
    dead = [f"constraints.txt pins {name}, which no extra needs: delete the line" for name in sorted(pinned - needed)]
    return dead + [f"{name} comes without a pin: add it to constraints.txt" for name in sorted(needed - pinned)]


def table(results: list[Resolved]) -> str:
    """A row for each Python, a column for each extra: number of packages and seconds."""
    extras = list(dict.fromkeys(result.case.extra for result in results))
    rows = [f"{'Python':8}" + "".join(f"{extra or '(none)':>14}" for extra in extras)]
    for python in dict.fromkeys(result.case.python for result in results):
        row = [result for result in results if result.case.python == python]
        cells = ["FAILS" if r.error else f"{len(r.packages)} ({r.seconds:.0f} s)" for r in row]
        rows.append(f"{python:8}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(rows)


def main(root: Path) -> int:
    """Resolves all cases of the project in `root`, prints the table and what is wrong."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    with ThreadPoolExecutor(4) as pool:  # each mostly waits for the index
        results = list(pool.map(partial(resolve, root, uv.find_uv_bin()), cases(project)))
    errors = {result.error: result.case for result in reversed(results) if result.error}
    for error in errors:
        if any(sign in error for sign in UNREACHABLE):
            print("The package index cannot be reached: nothing was checked.", error, sep="\n", file=sys.stderr)
            return 2
    print(table(results))
    reasons = [f"Python {case.python}, extra {case.extra or '(none)'}: {error}" for error, case in errors.items()]
    if not errors:
        pinned = {canonicalize_name(Requirement(line).name) for line in pins}
        reasons = differences(pinned, set().union(*(result.packages for result in results)))
    for reason in reasons:
        print(reason, file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
