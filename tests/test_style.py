"""The promises of the design, kept by a machine. Run: python -m pytest tests/test_style.py"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
MODELS = sorted(p for p in (ROOT / "models").rglob("*.py") if p.name != "__init__.py")
README, RESULTS = ((ROOT / file).read_text() for file in ("README.md", "tests/RESULTS.md"))
PACKAGES = {"torch", "numpy", "PIL", "tqdm", "safetensors", "requests"}
SYSTEMS = {"vosr", "s3diff", "gramsr", "tiny"}
TOP_LEVEL = {"README.md", "LICENSE", "LOG.md", "requirements.txt", "pyproject.toml", "sample.py", "degrade.py", "training.py", "train_vosr.py",
             "train_s3diff.py", "train_gramsr.py", "models", "assets", "tests"}


def name(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Full names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SCRIPTS + MODELS, ids=name)
def test_file(path):
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 120
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert all(node.end_lineno - node.lineno < 60 for node in functions), "a function of more than 60 lines"
    assert ast.get_docstring(ast.parse(text)), "opens with no docstring"
    assert ".cuda(" not in text, "device is the caller's choice"
    roots = {module.split(".")[0] for module in imports(path)}
    own = {p.stem for p in SCRIPTS} | {"models"}
    assert roots <= PACKAGES | own | set(sys.stdlib_module_names), "imports beyond the six packages"


def test_imports_point_one_way():
    for path in MODELS:
        if path.stem not in SYSTEMS:
            assert not imports(path) & {f"models.{system}" for system in SYSTEMS}, f"{name(path)} imports a system"
        assert not imports(path) & {p.stem for p in SCRIPTS}, f"{name(path)} imports a script"


def test_nothing_else_at_the_top():
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    ignored = set((ROOT / ".gitignore").read_text().replace("/", "").split())
    assert visible - ignored <= TOP_LEVEL


FLAGS_OF_TRAINING = ROOT / "models/support/launch.py"


@pytest.mark.parametrize("path", [*(p for p in SCRIPTS if ".add_argument(" in p.read_text()), FLAGS_OF_TRAINING], ids=name)
def test_every_flag_is_read(path):
    text = path.read_text()
    flags = [m.replace("-", "_") for m in re.findall(r'add_argument\("(?:--)?([\w-]+)"', text)]
    assert flags and len(flags) <= 30
    # those that all trainings have by every script that takes them, or by what scripts share; it also lays them over the fields of a stage
    shared = "".join((ROOT / file).read_text() for file in ("training.py", *(f"models/support/{name}.py" for name in ("launch", "saving", "photos"))))
    takers = [s.read_text() + shared for s in SCRIPTS if "training.add_arguments(" in s.read_text()]
    readers = takers if path == FLAGS_OF_TRAINING else [text + shared if "training.add_arguments(" in text else text]
    if path.name == "sample.py":
        readers = [text + (ROOT / "models/support/results.py").read_text()]
    for flag in flags:
        # by its name, or in a tuple of names that are read together; a field of a stage is overridden
        read = re.compile(rf'\b(args|recipe|stage)\.{flag}\b|"{flag}"')
        assert readers and all(read.search(text) for text in readers), f"--{flag} is read by nothing"


def test_equations_are_where_readme_says():
    """Each row names a tag and file:function; the tag stands in that function, and no tag of the code is missing from the table."""
    rows = re.findall(r"^\|[^|]*\| `# (Eq\. [^`]+)` \| `([\w/.]+):(\w+)` \|", README, re.M)
    assert rows
    for tag, file, function in rows:
        text = (ROOT / file).read_text()
        bodies = ["\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]) for node in ast.walk(ast.parse(text))
                  if isinstance(node, ast.FunctionDef) and node.name == function]
        assert any(f"# {tag}" in body for body in bodies), f"{tag} is not in {file}:{function}"
    tags = {tag for path in SCRIPTS + MODELS for tag in re.findall(r"# (Eq\. .+?)$", path.read_text(), re.M)}
    assert tags == {tag for tag, _, _ in rows}


def test_every_deviation_is_listed():
    """RESULTS.md counts the `# official:` comments of each file."""
    counts = {name(p): p.read_text().count("# official:") for p in SCRIPTS + MODELS}
    said = {file: int(n) for file, n in re.findall(r"`([\w/.]+)` \((\d+)\)", RESULTS)}
    assert {file: n for file, n in counts.items() if n} == said


def test_files_named_in_readme_exist():
    named = re.findall(r"`((?:models|tests|assets)/[\w/.]+\.\w+)", README + RESULTS)
    for file in {*named, *re.findall(r"\]\((assets/[^)]+)\)", README)}:
        assert (ROOT / file).exists(), file


def test_ci_runs_the_command_of_readme():
    command = re.search(r"^ *(pip install .*pytest)$", README, re.M)[1]
    assert command in (ROOT / ".ci" / "run").read_text()
