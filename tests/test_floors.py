"""The package is a house of rooms on floors: imports go down, never up, and rooms are small.

A room is a package of spin_jax, or a file beside the packages. This file reads imports; it runs none of them.
"""

import ast
import dataclasses
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the lowest to the highest. A room imports only from lower floors and from itself.
FLOORS = (
    ("errors", "losses"),
    ("runtime", "kernels", "config", "config_values"),
    ("data", "storage", "cli"),
    ("models", "report", "tiny"),
    ("sampling", "training"),
    ("evaluate", "forecast"),
    ("selfplay",),
    ("plan", "main", "benchmark", "pairs", "sweep"),
    ("spin_jax",),  # __init__.py, where users find the public functions
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ONE_ROOM = {"config_values": "config"}  # two files that are one room

# Who may name ml_collections' ConfigDict. All others see a frozen spin_jax.config.Config.
CONFIG_DICT = ("config.py", "config_values.py", "cli.py", "benchmark.py")

MOST_LINES_OF_A_FILE = 450
MOST_LINES = 20_550  # of all files without kernels
MOST_FILES = 15


@dataclasses.dataclass(frozen=True)
class Use:
    """One line of a file that imports another file of the package, or a name from it."""

    file: str  # relative to the package: models/lora.py
    line: int
    target: str  # the imported file, relative to the package
    name: str | None = None  # the name that is taken from it; None for the file as a whole
    for_types: bool = False  # under `if TYPE_CHECKING:`

    def __str__(self) -> str:
        name = f", the name {self.name}" if self.name else ""
        return f"spin_jax/{self.file}:{self.line} imports spin_jax/{self.target}{name}"


def room(file: str) -> str:
    """models/lora.py → models, cli.py → cli, __init__.py → spin_jax."""
    first = file.partition("/")[0].removesuffix(".py")
    return ONE_ROOM.get(first, "spin_jax" if first == "__init__" else first)


def sources(package: Path) -> dict[str, str]:
    """{models/lora.py: its text} of all files."""
    paths = sorted(package.rglob("*.py"))
    return {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in paths}


def _file_of(module: str, files: dict[str, str]) -> str | None:
    """spin_jax.models.lora → models/lora.py; None for what is no file of the package."""
    if module.partition(".")[0] != "spin_jax":
        return None
    path = "/".join(module.split(".")[1:])
    found = [name for name in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if name in files]
    return found[0] if found else None


def _imports(file: str, tree: ast.AST) -> list[tuple[ast.Import | ast.ImportFrom, str, bool]]:
    """(the import, the module that `from` names, whether it is there for types alone) of a whole file."""
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.append((node, "", id(node) in only_types))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # a relative import: one dot is the file's own package
                folders = ["spin_jax", *file.split("/")[:-1]]
                base = folders[: len(folders) - node.level + 1]
                module = ".".join([*base, *filter(None, [node.module])])
            found.append((node, module, id(node) in only_types))
    return found


def uses(files: dict[str, str]) -> list[Use]:
    """Every use of one file of the package by another, also within functions."""
    found: list[Use] = []
    for file, text in files.items():
        tree = ast.parse(text, file)
        local: dict[str, str] = {}  # names that stand for a file of the package
        for node, module, types in _imports(file, tree):
            for alias in node.names:
                full = f"{module}.{alias.name}" if module else alias.name
                if target := _file_of(full, files):
                    found.append(Use(file, node.lineno, target, for_types=types))
                    local[alias.asname or (alias.name if module else full)] = target
                elif module and (target := _file_of(module, files)):
                    found.append(Use(file, node.lineno, target, alias.name, types))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (target := local.get(ast.unparse(node.value))):
                found.append(Use(file, node.lineno, target, node.attr))
    return [use for use in found if use.target != use.file]


def _is_dunder(name: str | None) -> bool:
    return bool(name) and name.startswith("__") and name.endswith("__")


def wrong_directions(files: dict[str, str]) -> list[str]:
    """A line for every import of a room that does not stand on a lower floor."""
    wrong: dict[object, str] = {}
    for use in uses(files):
        above, below = room(use.file), room(use.target)
        if above == below or (below == "spin_jax" and (use.name is None or _is_dunder(use.name))):
            continue  # `import spin_jax` itself, for its version or its folder, takes nothing from any room
        unknown = [name for name in (above, below) if name not in FLOOR_OF]
        for name in unknown:
            wrong[name] = f"spin_jax/{name} has no floor: give it one in {Path(__file__).name}"
        if not unknown and FLOOR_OF[above] <= FLOOR_OF[below]:
            way = "sideways" if FLOOR_OF[above] == FLOOR_OF[below] else "up"
            wrong.setdefault((use.file, use.target), f"{use}: {above} → {below} goes {way}")
    return list(wrong.values())


def circle(files: dict[str, str]) -> list[str]:
    """The imports of a circle of files, in order; nothing where there is none."""
    arrows: dict[str, dict[str, Use]] = {}
    for use in uses(files):
        if use.file == "__init__.py" and use.for_types:
            continue  # the public names, which are imported when first used
        if use.target == "__init__.py" and (use.name is None or _is_dunder(use.name)):
            continue
        arrows.setdefault(use.file, {}).setdefault(use.target, use)
    done: set[str] = set()

    def search(file: str, path: list[str]) -> list[str]:
        if file in path:
            members = [*path[path.index(file) :], file]
            return [str(arrows[a][b]) for a, b in itertools.pairwise(members)]
        if file not in done:
            for target in arrows.get(file, {}):
                if found := search(target, [*path, file]):
                    return found
            done.add(file)
        return []

    return next(filter(None, (search(file, []) for file in files)), [])


def private_names(files: dict[str, str]) -> list[str]:
    """A line for every private name that is taken from another room."""
    return [
        f"{use}: it is private to {room(use.target)}, and {room(use.file)} is another room"
        for use in uses(files)
        if room(use.file) != room(use.target) and use.name and use.name.startswith("_") and not _is_dunder(use.name)
    ]


def too_large(files: dict[str, str]) -> list[str]:
    """A line for every file with too many lines, and for every folder with too many files.

    Kernels are written for the hardware, and are not in the sum.
    """
    lines = {file: len(text.splitlines()) for file, text in files.items()}
    whole = sum(count for file, count in lines.items() if room(file) != "kernels")
    folders = Counter(file.rpartition("/")[0] for file in files)
    wrong = [
        f"spin_jax/{file} has {count} lines, and {MOST_LINES_OF_A_FILE} are the most"
        for file, count in lines.items()
        if count > MOST_LINES_OF_A_FILE
    ]
    wrong += [
        f"spin_jax/{folder} has {count} files, and {MOST_FILES} are the most"
        for folder, count in folders.items()
        if count > MOST_FILES
    ]
    if whole > MOST_LINES:
        wrong.append(f"spin_jax has {whole} lines, and {MOST_LINES} are the most")
    return wrong


def config_dicts(files: dict[str, str]) -> list[str]:
    """A line for every other file that names ConfigDict."""
    wrong = []
    for file, text in files.items():
        for node in ast.walk(ast.parse(text, file)):
            names = [getattr(node, "id", ""), getattr(node, "attr", "")]
            names += [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            if "ConfigDict" in names and file not in CONFIG_DICT:
                wrong.append(f"spin_jax/{file}:{node.lineno} names ConfigDict: take config.Config")
    return wrong


RULES = (wrong_directions, circle, private_names, too_large, config_dicts)


def test_the_core_is_read_in_one_sitting():
    """The files that spin_jax/README.md lists as the core have fewer than 2,000 lines together."""
    text = (ROOT / "spin_jax" / "README.md").read_text()
    core = re.findall(r"\]\(([\w/]+\.py)\)", text.partition("## The core in one sitting")[2].partition("\n\n")[2])
    core = core[: core.index("selfplay/opponent.py") + 1]
    assert core[0] == "losses.py"
    assert len(core) >= 8
    lines = {file: len((ROOT / "spin_jax" / file).read_text().splitlines()) for file in core}
    assert sum(lines.values()) < 2000, lines


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    wrong = rule(sources(ROOT / "spin_jax"))
    assert not wrong, "\n" + "\n".join(wrong)


# --- the rules themselves ------------------------------------------------------------------------

HOUSE = {
    "__init__.py": "",
    "errors.py": "",
    "data/__init__.py": "",
    "data/pairs.py": "from spin_jax import errors",
    "models/__init__.py": "",
    "models/lora.py": "from spin_jax.data import pairs\nimport spin_jax\nspin_jax.__version__",
    "models/cost.py": "from spin_jax.models.lora import _count",
}


@pytest.mark.parametrize(
    ("rule", "file", "text", "message"),
    [
        (
            wrong_directions,
            "data/pairs.py",
            "def load():\n    from spin_jax.models.lora import add",
            "spin_jax/data/pairs.py:2 imports spin_jax/models/lora.py, the name add: data → models goes up",
        ),
        (
            wrong_directions,
            "losses.py",
            "import spin_jax.errors",
            "spin_jax/losses.py:1 imports spin_jax/errors.py: losses → errors goes sideways",
        ),
        (wrong_directions, "attic.py", "from . import errors", "spin_jax/attic has no floor"),
        (wrong_directions, "data/pairs.py", "from spin_jax import load", "data → spin_jax goes up"),
        (wrong_directions, "data/pairs.py", "import spin_jax as s\ns.load()", "data → spin_jax goes up"),
        (
            circle,
            "models/lora.py",
            "def late():\n    from .cost import x",
            "spin_jax/models/lora.py:2 imports spin_jax/models/cost.py, the name x",
        ),
        (
            circle,
            "models/lora.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from spin_jax.models import cost",
            "spin_jax/models/lora.py:3 imports spin_jax/models/cost.py",
        ),
        (
            private_names,
            "models/lora.py",
            "from spin_jax.data.pairs import _x",
            "lora.py:1 imports spin_jax/data/pairs.py, the name _x: it is private to data",
        ),
        (private_names, "models/lora.py", "from spin_jax.data import pairs as p\np._y()", "lora.py:2"),
        (private_names, "models/lora.py", "import spin_jax.data.pairs\nspin_jax.data.pairs._y()", ":2"),
        (too_large, "models/lora.py", "\n" * 451, "spin_jax/models/lora.py has 451 lines"),
        (config_dicts, "models/lora.py", "def f(c: ml.ConfigDict): ...", "spin_jax/models/lora.py:1"),
        (config_dicts, "models/lora.py", "from ml_collections import ConfigDict", "models/lora.py:1"),
    ],
)
def test_a_rule_says_where_and_which_way(rule, file, text, message):
    assert rule(HOUSE) == []
    assert any(message in line for line in rule({**HOUSE, file: text}))


def test_folders_and_the_whole_have_a_limit():
    many = {f"models/part_{number}.py": "x = 1\n" * 400 for number in range(55)}
    assert too_large(many) == [
        "spin_jax/models has 55 files, and 15 are the most",
        "spin_jax has 22000 lines, and 20550 are the most",
    ]
