"""Pinned versions: checking tools are exact, and every requirement in pyproject.toml has a pin within its bounds."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TESTED = ("fast", "gs", "hf", "notebooks", "openvino", "s3", "ship", "soap", "tune")


def name_of(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            found.setdefault(name_of(Requirement(line)), []).append(Requirement(line))
    return found


def test_tools_are_pinned_exactly_and_equally():
    tools = [Requirement(each) for each in EXTRAS["test"] if not each.startswith("funmatch[")]
    assert {tool.name for tool in tools} == {
        "pytest", "pytest-xdist", "hypothesis", "ruff", "pyrefly", "jupytext", "nbclient",
        "torchmetrics", "netcal", "scikit-learn", "moto", "flask", "flask-cors",
    }  # fmt: skip
    for tool in tools:
        assert re.fullmatch(r"==[\d.]+", str(tool.specifier)), tool
        assert [str(pin.specifier) for pin in pins()[tool.name]] == [str(tool.specifier)]


def test_every_requirement_has_a_pin_within_its_bounds():
    requirements = [*PROJECT["dependencies"], *(each for extra in TESTED for each in EXTRAS[extra])]
    for each in map(Requirement, requirements):
        for pin in pins()[name_of(each)]:
            (version,) = pin.specifier
            assert each.specifier.contains(version.version), f"{pin} is not {each}"


def test_pins_are_versions_without_urls():
    for alternatives in pins().values():
        for pin in alternatives:
            assert pin.url is None
            assert [each.operator for each in pin.specifier] == ["=="]
            assert str(pin.marker or "").count("extra") == 0


def test_exactly_one_pin_applies_on_each_platform():
    for alternatives in pins().values():
        for python in ("3.11", "3.12", "3.13"):
            for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")):
                environment = {
                    "sys_platform": system, "platform_machine": machine, "python_full_version": f"{python}.0",
                    "python_version": python, "implementation_name": "cpython",
                }  # fmt: skip
                matching = [pin for pin in alternatives if pin.marker is None or pin.marker.evaluate(environment)]
                assert len(matching) <= 1, matching
                assert matching or all("sys_platform" in str(pin.marker) for pin in alternatives), alternatives


@pytest.fixture(name="install")
def install_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_floors_are_the_lower_bounds(install):
    floors = dict(install.floors(ROOT / "pyproject.toml"))
    assert set(PROJECT["dependencies"]) <= {f"{name}>={version}" for name, version in floors.items()}
    assert not set(floors) & {"pytest", "ruff", "pyrefly"}


def test_output_of_pip_is_logged_and_shown_only_on_failure(install, tmp_path, monkeypatch, capsys):
    log = "WARNING: Location is ignored\nCollecting torch\n  Downloading torch-2.14.whl (900.5 MB)\nERROR: no room\n"
    fake = tmp_path / "fake"
    fake.write_text(f"#!{sys.executable}\nprint({log!r}, end='')\nraise SystemExit(3)\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["install.py", "--extras", "test"])
    with pytest.raises(SystemExit) as end:
        install.main()
    assert end.value.code == 3
    output = capsys.readouterr().out
    assert "ERROR: no room" in output
    assert "WARNING" not in output
    assert "GB" in output.splitlines()[0]
    # uv could not be had either, so pip was asked for it, and then for the rest.
    assert (tmp_path / "install.log").read_text() == f"{log}{install.FAILED}\n{log}"


def test_pip_installs_where_uv_fails(install, tmp_path, monkeypatch):
    fake = tmp_path / "fake"
    fake.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:])\nraise SystemExit('--python' in sys.argv)\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["install.py"])
    with pytest.raises(SystemExit) as end:
        install.main()
    assert end.value.code == 0
    lines = (tmp_path / "install.log").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("-m")] == ["pip", "uv", "pip", "pip"]
    assert lines[2] == install.FAILED
    assert lines[-1].endswith(f"{ROOT} --constraint {ROOT / 'constraints.txt'}")


def test_progress_counts_downloads(install):
    progress = install.Progress()
    progress.see("  Downloading torch-2.14-cp311.whl (900.5 MB)")
    progress.see("  Using cached tiny_thing-1.0-py3-none-any.whl (63 kB)")
    assert progress.total == pytest.approx(900.563)
    assert progress.now == "tiny_thing"
    progress.see("Installing collected packages: a, b")
    assert progress.now == "unpacking"
    for line in ("Downloading torch (100MiB)", "Downloading numpy (10MiB)", " Downloaded numpy"):
        progress.see(line)
    assert progress.total == pytest.approx(900.563 + 10 * 1.049)
    assert progress.now == "torch (105 MB)"
