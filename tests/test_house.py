"""The house keeps its shape: floors, rooms for libraries, sizes, reach, and documents that match the tree."""

import ast
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "panda_jax"

# From the ground up. A room may import rooms of lower floors and its own files, never its neighbours.
FLOORS = [
    {"config", "errors", "atomic"},
    {"presets"},
    {"schema"},
    {"settings"},
    {"command_line", "text", "sharding", "weights"},
    {"data"},
    {"model"},
    {"objectives", "generation"},
    {"evaluation"},
    {"training"},
    {"harness"},
    {"train", "prepare", "evaluate", "generate", "lm_eval", "demo"},
]
DOORS = FLOORS[-1]
ROOM_OF_LIBRARY = {
    "grain": "panda_jax.data.loader",
    "orbax": "panda_jax.training.checkpoint",
    "sentencepiece": "panda_jax.text",
    "tensorstore": "panda_jax.training.checkpoint",
    "torch": "no room",
    "transformers": "no room",
}
# Where cutting would hurt: the loop reads top to bottom like a recipe, the pickle machine has a line per opcode.
LONG_FUNCTIONS = {"panda_jax.training.loop.run_to_the_end", "convert.state_pickle._interpret"}

SOURCES = {
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in SOURCES.items()}


CONVERTERS = {
    f"convert.{file.stem}": ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted((REPOSITORY / "convert").glob("*.py")) if file.stem != "__init__"
}  # fmt: skip
CONVERSION_DOORS = ("meta", "hf", "delta")


def imports(module: str) -> Iterator[str]:
    """Yield every module that `module` imports anywhere in its file; for `from a import b` a.b where that is one."""
    yield from imports_of(TREES[module], module)


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner in SOURCES or inner in CONVERTERS
                yield inner if is_module or not node.module.startswith(("panda_jax", "convert")) else node.module


def room(module: str) -> str:
    return module.split(".")[1]


def floor(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room(module) in rooms)


def reach(module: str) -> dict[str, int]:
    """Return every module of the package that importing `module` may load, with its depth."""
    depth, waiting = {module: 0}, deque([module])
    while waiting:
        current = waiting.popleft()
        for inner in imports(current):
            if inner in SOURCES and inner not in depth:
                depth[inner] = depth[current] + 1
                waiting.append(inner)
    return depth


@pytest.mark.parametrize("module", [module for module in SOURCES if module != "panda_jax"])
def test_imports_run_strictly_downward(module: str) -> None:
    for inner in imports(module):
        if inner.startswith("panda_jax.") and room(inner) != room(module):
            assert floor(inner) < floor(module), f"{module} imports {inner}"


def test_every_library_keeps_to_its_room() -> None:
    for module in SOURCES:
        for library in {inner.split(".")[0] for inner in imports(module)} & set(ROOM_OF_LIBRARY):
            assert module.startswith(ROOM_OF_LIBRARY[library]), f"{module} imports {library}"


def test_data_and_text_reach_no_jax() -> None:
    for module in SOURCES:
        if module.startswith(("panda_jax.data", "panda_jax.text")):
            for inner in reach(module):
                found = [name for name in imports(inner) if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax")]
                assert not found, f"{module} reaches {found[0]} through {inner}"


def test_the_train_door_is_within_reach() -> None:
    """What the door loads. A run that names eval.tasks enters the rooms of evaluation and generation, others do not."""
    code = "import sys, panda_jax.train; print(*[name for name in sys.modules if name.startswith('panda_jax.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = [name for name in done.stdout.split() if SOURCES[name].name != "__init__.py"]
    assert len(loaded) <= 30, sorted(loaded)
    assert not [name for name in loaded if room(name) in ("evaluation", "generation")]
    depth = reach("panda_jax.train")
    assert max(depth[name] for name in loaded) <= 7


def test_the_converters_stand_beside_the_package() -> None:
    """Nothing imports them; they need no torch, and only the proof by logits asks others; doors import no doors."""
    for module, tree in CONVERTERS.items():
        found = set(imports_of(tree, module))
        for library in {inner.split(".")[0] for inner in found} & {"torch", "transformers", "safetensors", "grain"}:
            assert module == "convert.transformers_side", f"{module} imports {library}"
        assert not {"orbax", "sentencepiece"} & {inner.split(".")[0] for inner in found}, module
        assert not found & {f"convert.{door}" for door in CONVERSION_DOORS}, f"{module} imports a door"
        floors = {room(inner) for inner in found if inner.startswith("panda_jax.")}
        assert not floors & DOORS, f"{module} imports {floors & DOORS}"
    for module in SOURCES:
        assert not [inner for inner in imports(module) if inner.split(".")[0] == "convert"], module


def test_the_converters_need_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for module in {list(CONVERTERS)!r}: importlib.import_module(module)\n"
        "print(*{'torch', 'transformers', 'safetensors'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr[-2000:]


@pytest.mark.parametrize("module", [*SOURCES, *CONVERTERS])
def test_files_and_functions_are_short(module: str) -> None:
    file = REPOSITORY / f"{module.replace('.', '/')}.py"
    file = file if file.is_file() else file.with_suffix("") / "__init__.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= (150 if room(f"{module}.") in DOORS else 400)
    for name, node in functions(tree, module):
        length = (node.end_lineno or 0) - node.lineno + 1
        assert length <= 60 or name in LONG_FUNCTIONS, f"{name} has {length} lines"


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = (
            f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            else prefix
        )
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from functions(node, name)


def test_the_list_of_long_functions_is_no_longer_than_needed() -> None:
    trees = TREES | CONVERTERS
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for m in trees for name, node in functions(trees[m], m)}
    assert [name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= 60] == []


def test_no_room_for_odds_and_ends() -> None:
    words = {"util", "utils", "common", "helper", "helpers", "misc"}
    assert [module for module in SOURCES if words & set(re.split(r"[._]", module))] == []
    assert [
        module for module, tree in TREES.items() if module.count(".") == 1 and room(module) not in set().union(*FLOORS)
    ] == []


def test_every_module_says_what_it_is_for_and_os_path_stays_out() -> None:
    for module, tree in (TREES | CONVERTERS).items():
        assert ast.get_docstring(tree) or not tree.body, f"{module} has no docstring"
        used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "path" and named(n.value, "os")]
        assert not used, f"{module}: os.path in line {used[0].lineno}; use pathlib"


def named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def test_every_module_imports_and_the_train_door_needs_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        "import panda_jax.train\n"
        "print(*{'torch', 'transformers', 'tensorflow'} & set(sys.modules))\n"
        f"for module in {list(SOURCES)!r}: importlib.import_module(module)\n"
        "print('all')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\nall\n"), done.stderr[-2000:]


def listed_files() -> list[str]:
    """Return the repository's files: those in git and those that could be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return sorted(name for name in set(done.stdout.splitlines()) if (REPOSITORY / name).is_file())


def mapped_paths() -> set[str]:
    """Return the paths of README's map: two spaces of indent a level, a slash at the end of a folder."""
    block = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("<!-- map -->")[1].split("```")[1]
    folders: list[str] = []
    found: set[str] = set()
    for line in block.splitlines()[1:]:
        name, _, purpose = line.strip().partition(" ")
        level = (len(line) - len(line.lstrip())) // 2
        assert purpose.strip(), f"README's map says nothing about {name}"
        folders[level:] = [name]
        found.add("".join(folders))
    return found


def test_the_map_in_the_readme_equals_the_tree() -> None:
    files = [name for name in listed_files() if not Path(name).name.startswith(("__init__", "."))]
    mapped = mapped_paths()
    tree = {name if name.startswith("panda_jax/") or "/" not in name else name.split("/")[0] + "/" for name in files}
    tree |= {f"{Path(name).parent}/" for name in files if name.startswith("panda_jax/")}
    tree |= {f"{Path(name).parent}/" for name in files if name.startswith("configs/")}
    tree |= {".ci/"} if (REPOSITORY / ".ci").is_dir() else set()
    assert mapped == {path for path in tree if not path.startswith(".ci/") or path == ".ci/"}


def blocks(text: str) -> list[str]:
    """Return the fenced blocks of a document, what stands after a # in a line left out: comments are translated."""
    found = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s*#.*", "", block) for block in found if not block.startswith("```text")]


def test_both_readmes_have_the_same_shape() -> None:
    english, chinese = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    levels = [
        re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M), re.M)
        for text in (english, chinese)
    ]
    assert levels[0] == levels[1] and len(levels[0]) >= 6
    assert blocks(english) == blocks(chinese) and len(blocks(english)) >= 4
    paths = [
        re.findall(r"^\s*(\S+)", text.split("<!-- map -->")[1].split("```")[1], re.M)[1:] for text in (english, chinese)
    ]
    assert paths[0] == paths[1]


def test_every_command_of_the_readme_exists() -> None:
    for name in ("README.md", "README_zh.md", "CHANGELOG.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        commands = set(re.findall(r"python -m panda_jax\.(\w+)", text))
        assert commands <= {door for door in DOORS if (PACKAGE / f"{door}.py").is_file()}, name
        assert set(re.findall(r"python -m convert\.(\w+)", text)) <= set(CONVERSION_DOORS), name


def test_there_are_runs_to_launch_and_their_headers_say_what_for() -> None:
    files = sorted((REPOSITORY / "configs").rglob("*.yaml"))
    assert len(files) >= 11
    for file in files:
        header = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))
        assert header, f"{file} has no header"
        for word in ("Purpose", "Source", "Hardware", "Expected"):
            assert re.search(rf"^# {word}.*: ", header[0], re.MULTILINE), f"{file}: its header lacks `{word}:`"


def test_no_file_names_a_machine_of_ours() -> None:
    places = re.compile("/" + "work/|/" + "root/|/" + "tmp/w|/home/" + r"\w")
    for name in listed_files():
        if (
            Path(name).suffix in (".py", ".md", ".yaml", ".toml", ".txt", "")
            and (REPOSITORY / name).stat().st_size < 2**20
        ):
            found = places.search((REPOSITORY / name).read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found and found[0]}"
