"""Does the check of the pinned versions tell each kind of fault? On a package index of a few empty packages."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[1] / ".ci/resolve.py"


def add_wheel(folder: Path, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> None:
    """An empty package whose metadata are all that a resolver reads."""
    info = f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def check(tmp_path):
    """Runs the check on a project whose `fast` extra needs `kernels`, which wants `frames` below 2."""
    index = tmp_path / "index"
    index.mkdir()
    for version in ("1.0", "2.0"):
        add_wheel(index, "frames", version)
    add_wheel(index, "kernels", "1.0", "frames<2")
    add_wheel(index, "compiled", "1.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    offline = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(index)}

    def run(
        *pins: str, extra: str = "kernels", environment: dict[str, str] = offline
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "constraints.txt").write_text("# pins\n" + "\n".join(pins) + "\n")
        (tmp_path / "pyproject.toml").write_text(
            '[project]\nname = "toy"\nversion = "1"\nrequires-python = ">=3.11,<3.13"\ndependencies = ["frames"]\n'
            f'[project.optional-dependencies]\nfast = ["{extra}"]\n'
        )
        variables = (
            {k: v for k, v in os.environ.items() if not k.startswith("UV_")} | environment | {"UV_NO_CACHE": "1"}
        )
        command = [sys.executable, str(CHECK), str(tmp_path)]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    return run


def test_versions_that_fit_pass_with_a_table_of_every_python_and_extra(check):
    done = check("frames==1.0", "kernels==1.0")
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head == ["Python", "(none)", "fast"]
    assert [(row[0], row[1], row[4]) for row in rows] == [("3.11", "1", "2"), ("3.12", "1", "2")]


def test_a_pin_that_contradicts_an_extra_is_named_once(check):
    done = check("frames==2.0", "kernels==1.0")
    assert done.returncode == 1 and done.stdout.count("FAILS") == 2
    assert done.stderr.count("extra fast") == 1 and "frames" in done.stderr and "kernels" in done.stderr


def test_a_package_without_a_wheel_for_one_python_fails_for_that_one_alone(check):
    done = check("frames==1.0", "compiled==1.0", extra="compiled")
    assert done.returncode == 1 and done.stdout.count("FAILS") == 1
    assert "Python 3.12, extra fast" in done.stderr and "compiled" in done.stderr


def test_pins_that_nothing_needs_and_packages_without_pin_are_named(check):
    done = check("frames==1.0", "Left_over==3.1")
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "constraints.txt pins left-over, which no extra needs",
        "kernels comes without a pin",
    ]


@pytest.mark.parametrize(
    "environment",
    [{"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}, {"UV_OFFLINE": "1"}],
)
def test_an_index_that_cannot_be_reached_is_said_to_be_so(check, environment):
    done = check("frames==1.0", "kernels==1.0", environment=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("The package index cannot be reached: nothing was checked.")
