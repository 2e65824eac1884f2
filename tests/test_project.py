"""The project as a whole: what is exported, imported, packaged, and written about it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hub
from greenkombu.utils.private_redis import PrivateRedis
from tests.support.patched import ROOT, complaints, run_patched

PACKAGES = ("hub", "greenkombu")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
#: Pages with a program in them; the hub's manual has a test of its own.
PAGES = [
    path
    for path in sorted((ROOT / "docs").glob("*.md"))
    if path.name != "hub.md" and "```python" in path.read_text()
]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: Packages that modules of ours may need and that a test environment need not have.
DRIVERS = {
    "boto3",
    "brotli",
    "django",
    "eventlet",
    "gevent",
    "greenstalk",
    "msgpack",
    "pika",
    "pymongo",
    "redis",
    "requests",
    "rich",
    "sqlalchemy",
    "yaml",
    "zstandard",
}

# Runs in a process of its own, because importing hub._gevent and hub._eventlet imports both.
EXPORTS_PROGRAM = """
import importlib, inspect, json, sys, warnings
warnings.simplefilter("ignore")
drivers, modules = json.loads(sys.argv[1])
problems = []
for name in modules:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in drivers:
            problems.append(f"{name}: {error}")
        continue
    exported = getattr(module, "__all__", None)
    if exported is None:
        if inspect.getmembers(module, lambda item: getattr(item, "__module__", "") == name):
            problems.append(f"{name}: no __all__")
        continue
    if len(set(exported)) != len(exported):
        problems.append(f"{name}: a name is twice in __all__")
    for item in exported:
        try:
            getattr(module, item)
        except Exception as error:
            problems.append(f"{name}.{item}: {type(error).__name__}: {error}")
        else:
            if hasattr(module, "__path__") and item not in dir(module):
                problems.append(f"{name}.{item}: not in dir()")
    for item, value in list(vars(module).items()):
        if (
            not item.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == name
            and item not in exported
        ):
            problems.append(f"{name}.{item}: public and not in __all__")
print(json.dumps(problems))
"""

# -S keeps site's own imports out; the packages are found in the current folder.
LAZINESS_PROGRAM = """
import sys
watched = {"amqp", "asyncio", "eventlet", "gevent", "greenlet", "select", "selectors", "socket",
           "ssl", "subprocess", "threading", "vine"}
assert not watched & set(sys.modules), watched & set(sys.modules)
import %s
print(*sorted(watched & set(sys.modules)))
"""


def module_names() -> list[str]:
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] != "__main__":
                names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def run_python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.green_matrix
def test_the_environment_of_this_run_is_detected() -> None:
    expected = os.environ["GREENKOMBU_TEST_ENVIRONMENT"].partition("-")[0]
    assert hub.get_environment().name == expected


def test_every_module_exports_exactly_its_public_names() -> None:
    argument = json.dumps([sorted(DRIVERS), module_names()])
    assert json.loads(run_python("-c", EXPORTS_PROGRAM, argument)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_that_patching_would_miss(package: str) -> None:
    assert run_python("-S", "-c", LAZINESS_PROGRAM % package).split() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_attribute_of_a_package_is_an_attribute_error(package: str) -> None:
    run_python("-c", f"import {package}; assert not hasattr({package}, 'no_such_name')")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert [str(path) for path in folders if not (path / "__init__.py").exists()] == []
    assert (ROOT / package / "py.typed").read_text() == ""


class TestMetadata:
    @pytest.fixture
    def fields(self) -> metadata.PackageMetadata:
        return metadata.metadata("greenkombu")

    def test_python_versions_agree(self, fields: metadata.PackageMetadata) -> None:
        assert fields["Requires-Python"] == ">=3.10"
        prefix = "Programming Language :: Python :: 3."
        minors = [
            int(line.removeprefix(prefix))
            for line in fields.get_all("Classifier") or []
            if line.startswith(prefix)
        ]
        assert minors == [10, 11, 12, 13, 14]

    def test_core_depends_on_amqp_alone(self) -> None:
        core = [line for line in metadata.requires("greenkombu") or [] if "extra ==" not in line]
        assert [re.split(r"[<>=,]", line)[0] for line in core] == ["amqp"]

    def test_all_holds_every_extra(self, fields: metadata.PackageMetadata) -> None:
        extras = set(fields.get_all("Provides-Extra") or ())
        listed = set()
        for line in metadata.requires("greenkombu") or []:
            match = re.match(r"""greenkombu\[(.+?)\]; extra == ['"]all['"]""", line)
            if match:
                listed |= set(match[1].split(","))
        assert listed == extras - {"all"}

    def test_version_is_the_package_s(self) -> None:
        import greenkombu

        assert metadata.version("greenkombu") == greenkombu.__version__
        assert ".".join(map(str, greenkombu.VERSION[:3])) == greenkombu.__version__

    def test_the_command_can_be_run(self) -> None:
        assert "demo" in run_python("-m", "greenkombu", "--help")

    def test_licence_file_is_packaged(self, fields: metadata.PackageMetadata) -> None:
        assert fields["License-Expression"] == "BSD-3-Clause"
        assert "greenkombu contributors" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    done = run_patched([str(path)], timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_in_documents_exist(path: Path) -> None:
    made = set(re.findall(r"^([a-z][\w-]*)(?: [\w -]*)?:", (ROOT / "Makefile").read_text(), re.M))
    made |= {f"test-{name}" for name in ("default", "gevent", "eventlet")}
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)`", path.read_text()))
    assert named <= made


@pytest.mark.parametrize("number", range(len(README_BLOCKS)))
def test_python_in_the_readme_runs(number: int) -> None:
    done = run_patched(["-c", README_BLOCKS[number]])
    assert done.returncode == 0, f"{README_BLOCKS[number]}\n{done.stdout}{done.stderr}"


def program_of(page: Path) -> str:
    """Return the blocks of a page as one program, from top to bottom."""
    # Lines keep their numbers, so that a traceback leads to the page.
    program, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        program.append(line if inside and not fence else "")
        inside = line == "```python" or (inside and not fence)
    if os.environ["GREENKOMBU_TEST_ENVIRONMENT"] == "gevent":
        # See docs/green-threads.md: else its child may end unheard.
        program[0] = "import gevent; gevent.get_hub().loop.install_sigchld()"
    return "\n".join(program)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_on_a_page_runs(path: Path) -> None:
    done = run_patched(["-c", program_of(path)])
    assert done.returncode == 0, f"{path.name}:\n{done.stdout}{done.stderr}"
    assert complaints(done.stderr) == ""


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_on_a_page_runs_on_rabbitmq(path: Path, rabbitmq_vhost: str) -> None:
    if path.stem == "transports":
        pytest.skip("the page shows what only the memory transport says of itself")
    done = run_patched(["-c", program_of(path).replace("memory://", rabbitmq_vhost)])
    assert done.returncode == 0, f"{path.name}:\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_python_on_a_page_runs_on_redis(path: Path, redis: PrivateRedis) -> None:
    if path.stem == "transports":
        pytest.skip("the page shows what only the memory transport says of itself")
    url = redis.database_url(6)
    done = run_patched(["-c", program_of(path).replace("memory://", url)])
    assert done.returncode == 0, f"{path.name}:\n{done.stdout}{done.stderr}"
    redis.command("FLUSHDB", database=6)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_on_rabbitmq(path: Path, rabbitmq_vhost: str) -> None:
    if "[URL]" not in path.read_text():
        pytest.skip("it takes no URL")
    done = run_patched([str(path), rabbitmq_vhost], timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


ON_REDIS = [
    pytest.param(path, marks=() if path.stem == "redis_worker" else pytest.mark.slow, id=path.stem)
    for path in EXAMPLES
]


@pytest.mark.parametrize("path", ON_REDIS)
def test_example_runs_on_redis(path: Path, redis: PrivateRedis) -> None:
    if "[URL]" not in path.read_text():
        pytest.skip("it takes no URL")
    done = run_patched([str(path), redis.database_url(6)], timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    redis.command("FLUSHDB", database=6)


def test_one_drain_loop_serves_rabbitmq_redis_and_memory(
    rabbitmq_vhost: str, redis: PrivateRedis
) -> None:
    urls = [rabbitmq_vhost, redis.database_url(6), "memory://"]
    done = run_patched([str(ROOT / "examples" / "mixed_brokers.py"), *urls], timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split("\n")[:3] == [
        "0: amqp: 20 messages",
        "1: redis: 20 messages",
        "2: memory: 20 messages",
    ]


def test_the_feature_tables_are_those_of_the_code() -> None:
    run_python("scripts/feature_table.py", "--check")


def test_the_index_of_the_documentation_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    listed = [
        line
        for block in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    assert sorted(listed) == sorted(pages)
