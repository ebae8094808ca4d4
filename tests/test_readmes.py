"""Every README: links lead somewhere, paths exist, tables fit a screen, and the first one stays short."""

import re
import subprocess
from pathlib import Path

import pytest

from spin_jax import config

ROOT = Path(__file__).parents[1]
WIDEST_TABLE = 120  # characters of a table's row
LONGEST_FRONT_DOOR = 175  # lines of README.md

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("configs", "launch", "notebooks", "spin_jax", "tests")
# A file of the project by its name; what a run or a user makes has a placeholder or another ending.
FILE = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|sh|ipynb|md|toml|css|jinja)")
FOLDER = re.compile(r"(?:[\w-]+/)+")


def readmes():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "README.md", "*/README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [ROOT / name for name in sorted(listed.stdout.splitlines())]
    return [path for path in found if path.exists()]


README_NAMES = [str(path.relative_to(ROOT)) for path in readmes()]


def without_code_blocks(text):
    """The text with the lines of ``` blocks emptied, so that line numbers stay."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append("" if inside or fence else line)
        inside ^= fence
    return "\n".join(lines)


def anchors(path):
    """The anchors that GitHub gives to the headings of a Markdown file."""
    found = set()
    for line in without_code_blocks(path.read_text()).splitlines():
        if heading := re.match(r"#+ (.*)", line):
            words = re.sub(r"[^\w\- ]", "", heading[1].strip().lower())
            found.add(words.replace(" ", "-"))
    return found


def places(pattern, text):
    """(line number, match) of a pattern with one group."""
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in pattern.finditer(text)]


def problem_of_link(path, target):
    """What is wrong with a relative link, or None."""
    if re.match(r"[a-z]+:", target):  # https and the like: no test asks the network
        return None
    name, _, anchor = target.partition("#")
    file = (path.parent / name).resolve() if name else path
    if not file.exists():
        return f"there is no {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file)):
        return f"{file.relative_to(ROOT)} has no heading #{anchor}"
    return None


def problem_of_path(path, words):
    """What is wrong with a path in backticks, or None; also for words that are no path of the project.

    A path may begin at the root, at the README's folder or at spin_jax/. A name without a folder may be
    that of any file of the project, but in the README of a package it is a file of that package. `my_….py` is
    the reader's own.
    """
    if FOLDER.fullmatch(words):
        if words.split("/")[0] not in (*FOLDERS, *package_folders()):
            return None
    elif not FILE.fullmatch(words) or words.startswith("my_"):
        return None
    if any((base / words).exists() for base in (ROOT, path.parent, ROOT / "spin_jax")):
        return None
    of_package = path.parent.parent == ROOT / "spin_jax"
    if "/" not in words and not of_package and words in project_file_names():
        return None
    return f"there is no {words} at the root, in {path.parent.relative_to(ROOT)}/ or in spin_jax/"


def package_folders():
    return [path.name for path in (ROOT / "spin_jax").iterdir() if path.is_dir()]


def project_file_names():
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}


def source_file(path, words):
    """The Python file that a README names."""
    bases = (path.parent, ROOT / "spin_jax", ROOT)
    return next((base / words for base in bases if (base / words).is_file()), None)


def named_in_files(text):
    """(line number, file, names) of what a README says to be in a file."""
    name_first = re.compile(r"`(\w+)` in `([\w/]+\.py)`")
    file_first = re.compile(r"`([\w/]+\.py)`(?:\]\([^)]*\))?: `(\w+)`(?: and `(\w+)`)?")
    found = [(match, match[2], [match[1]]) for match in name_first.finditer(text)]
    found += [(m, m[1], [name for name in m.groups()[1:] if name]) for m in file_first.finditer(text)]
    return [(text.count("\n", 0, match.start()) + 1, file, names) for match, file, names in found]


def sections(known):
    return [name for name, value in known.items() if isinstance(value, dict)]


def checked(text, path, pattern, problem_of):
    problems = [(line, target, problem_of(path, target)) for line, target in places(pattern, text)]
    return [f"{path.relative_to(ROOT)}:{line}: {target}: {why}" for line, target, why in problems if why]


@pytest.mark.parametrize("name", README_NAMES)
def test_links_lead_somewhere(name):
    text = without_code_blocks((ROOT / name).read_text())
    broken = checked(text, ROOT / name, LINK, problem_of_link)
    broken += checked(text, ROOT / name, REFERENCE, problem_of_link)
    assert not broken, "\n".join(["broken links:", *broken])


@pytest.mark.parametrize("name", README_NAMES)
def test_paths_exist(name):
    text = without_code_blocks((ROOT / name).read_text())
    absent = checked(text, ROOT / name, CODE, problem_of_path)
    assert not absent, "\n".join(["paths that do not exist:", *absent])


@pytest.mark.parametrize("name", README_NAMES)
def test_names_are_in_the_files_that_they_are_said_to_be_in(name):
    """`NAME` in `FILE.py`, and `FILE.py`: `NAME` and `NAME`."""
    path = ROOT / name
    text = without_code_blocks(path.read_text())
    said = [(line, file, names) for line, file, names in named_in_files(text) if source_file(path, file)]
    absent = [
        f"{name}:{line}: {file} has no {wanted}"
        for line, file, names in said
        for wanted in names
        if not re.search(rf"^(?:def |class )?{wanted}\b", (source_file(path, file) or path).read_text(), re.MULTILINE)
    ]
    assert not absent, "\n".join(["names that a file does not have:", *absent])


@pytest.mark.parametrize("name", README_NAMES)
def test_config_keys_exist(name):
    known = config.default().to_dict()
    keys = re.compile(rf"(?<![\w./=])(?:--config\.)?((?:{'|'.join(sections(known))})\.\w+)(?![\w/])")
    text = (ROOT / name).read_text()
    marked = re.compile(r"(`[^`\n]+`|--config\.\S+)")
    unknown = [
        f"{name}:{line}: {key}"
        for line, words in places(marked, text)
        for key in keys.findall(words)
        if not key.endswith(".py") and key.split(".")[1] not in known[key.split(".")[0]]
    ]
    assert not unknown, "\n".join(["config keys that do not exist:", *unknown])


@pytest.mark.parametrize("name", README_NAMES)
def test_commands_name_files_that_exist(name):
    """configs/, launch/ and tests/ in code blocks, and `python -m spin_jax.…`."""
    text = (ROOT / name).read_text()
    modules = re.compile(r"python -m (spin_jax[.\w]*)")
    files = re.compile(r"(?<![\w/])((?:configs|launch|tests|notebooks)/[\w/-]+\.(?:py|sh))")
    absent = [(line, path) for line, path in places(files, text) if not (ROOT / path).exists()]
    for line, module in places(modules, text):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            absent.append((line, module))
    assert not absent, "\n".join(f"{name}:{line}: there is no {what}" for line, what in absent)


@pytest.mark.parametrize("name", README_NAMES)
def test_tables_fit_a_screen(name):
    lines = without_code_blocks((ROOT / name).read_text()).splitlines()
    wide = [
        f"{name}:{number}: {len(line)} characters: {line[:60]}…"
        for number, line in enumerate(lines, 1)
        if line.startswith("|") and len(line) > WIDEST_TABLE
    ]
    assert not wide, "\n".join([f"table rows wider than {WIDEST_TABLE} characters:", *wide])


def test_the_first_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= LONGEST_FRONT_DOOR, f"README.md has {len(lines)} lines: move some of it to a folder"


def test_every_package_with_a_command_has_a_readme():
    commands = [path.parent for path in (ROOT / "spin_jax").glob("*/__main__.py")]
    absent = [str(folder.relative_to(ROOT)) for folder in commands if not (folder / "README.md").exists()]
    assert not absent, f"no README.md in {', '.join(absent)}"


def test_what_is_found(tmp_path):
    """The checks find what they are for."""
    path = ROOT / "README.md"
    assert problem_of_link(path, "configs/README.md#keys") is None
    assert problem_of_link(path, "https://example.com/absent") is None
    assert problem_of_link(path, "absent.md") == "there is no absent.md"
    assert problem_of_link(path, "configs/README.md#absent") == "configs/README.md has no heading #absent"
    assert problem_of_path(path, "losses.py") is None
    assert problem_of_path(path, "spin_jax/absent.py").startswith("there is no spin_jax/absent.py")
    assert problem_of_path(path, "launch/absent/").startswith("there is no launch/absent/")
    assert problem_of_path(path, "my_losses.py") is None
    assert named_in_files("`a` in `b/c.py`\n[`d.py`](d.py): `e` and `f`") == [
        (1, "b/c.py", ["a"]),
        (2, "d.py", ["e", "f"]),
    ]
    text = "a\n\n```\n[b](c)\n```\n[d](absent.md) `spin_jax/absent.py`"
    kept = without_code_blocks(text)
    (link,) = checked(kept, path, LINK, problem_of_link)
    assert link == "README.md:6: absent.md: there is no absent.md"
    document = tmp_path / "x.md"
    document.write_text("# `a.sh`: B, c\n```\n# no heading\n```\n## D-e (f)")
    assert anchors(document) == {"ash-b-c", "d-e-f"}
