"""The rules of docs/architecture.md, read off the source with `ast`: who may import whom, sizes, what library code never does.

Each test lists every place that breaks its rule, as file:line.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("library", "networks", "tools")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

OPTION_MODULES = re.compile(r"library\.(options|option_\w+|config_file|cli|errors)")
"""Read at `--help`, which has to answer at once."""
SLOW_IMPORTS = {
    "torch",
    "numpy",
    "cv2",
    "PIL",
    "accelerate",
    "diffusers",
    "transformers",
    "safetensors",
    "omegaconf",
    "matplotlib",
}

NETWORKS_MAY_USE = {
    "library.errors",
    "library.rng",
    "library.optimizers",
    "library.frozen_products",  # a frozen layer's product, however its weight is kept: imports torch alone
    "library.key_layout",
    "library.flux_names",
    "library.lumina_names",
    "library.sd3_names",
    "library.unet_names",
    "library.strategy_base",
}
"""What an adapter needs to know of the trainer. An adapter that wants more would work with one family or one loop only."""


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def label(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def imports(self, *, lazy: bool) -> set[str]:
        """Full names imported at module level, with `lazy` inside functions too; `if TYPE_CHECKING:` does not count."""
        found: set[str] = set()
        for node in reached(self.tree, lazy=lazy):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{self.label}:{node.lineno} imports relatively"
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
                found.add(node.module)
        return found

    def local_imports(self, *, lazy: bool) -> set[str]:
        return self.imports(lazy=lazy) & set(modules())


def reached(node: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    """Nodes that run on import; with `lazy`, or later. Type-checking blocks run never."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from reached(other, lazy=lazy)
            continue
        if not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from reached(child, lazy=lazy)


@cache
def modules() -> dict[str, Module]:
    """Every module of the product by its full name: the packages and the top-level scripts."""
    found = {}
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    return found


def of(*packages: str) -> list[Module]:
    return [module for name, module in modules().items() if name.partition(".")[0] in packages]


def scripts() -> list[Module]:
    return [module for name, module in modules().items() if "." not in name and name not in PACKAGES]


def families() -> list[str]:
    found = [name.removeprefix("library.").removesuffix("_train_utils") for name in modules() if name.endswith("_train_utils")]
    assert found, "no library/<m>_train_utils.py at all"
    return found


def belongs_to(name: str, family: str) -> bool:
    """The files a family is made of: its models, utilities, saving, strategy and LoRA table."""
    return re.fullmatch(rf"library\.({family}_\w+|strategy_{family})|networks\.\w+_{family}", name) is not None


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name that is called."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def misuses(found: list[Module], broken: Callable[[ast.Call, str], bool]) -> list[str]:
    return [f"{m.label}:{call.lineno} {name}" for m in found for call, name in calls(m) if broken(call, name)]


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


# --- who imports whom


def level(name: str) -> int:
    """script 4 → <m>_train_utils 3 → train_util 2 → bases 1."""
    if not name.startswith(("library", "networks")):
        return 4
    if name.endswith("_train_utils"):
        return 3
    return 2 if name == "library.train_util" else 1


def test_imports_go_one_way_from_script_to_family_to_loop_to_bases() -> None:
    wrong = [
        f"{module.label} imports {target}"
        for module in of("library", "networks")
        for target in sorted(module.local_imports(lazy=True))
        if level(target) > level(module.name) or (level(target) == level(module.name) == 3 and target != module.name)
    ]
    assert wrong == []


def test_only_a_family_knows_its_own_files() -> None:
    wrong = [
        f"{module.label} imports {target}, which belongs to {family}"
        for family in families()
        for module in of("library", "networks")
        for target in sorted(module.local_imports(lazy=True))
        if belongs_to(target, family) and not belongs_to(module.name, family)
    ]
    assert wrong == []


def test_networks_know_only_the_bases_of_the_library() -> None:
    wrong = [
        f"{module.label} imports {target}"
        for module in of("networks")
        for target in sorted(module.local_imports(lazy=True))
        if target.startswith("library.") and target not in NETWORKS_MAY_USE
    ]
    assert wrong == []


def test_no_two_modules_import_each_other() -> None:
    graph = {name: module.local_imports(lazy=False) - {name} for name, module in modules().items()}

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        queue = list(graph[start])
        while queue:
            name = queue.pop()
            if name not in seen:
                seen.add(name)
                queue.extend(graph[name])
        return seen

    assert [name for name in graph if name in reachable(name)] == []


def test_asking_for_help_imports_nothing_slow() -> None:
    """Option modules and scripts, and everything they import at module level in turn."""
    wrong = []
    starts = [name for name in modules() if OPTION_MODULES.fullmatch(name)] + [module.name for module in scripts()]
    assert "library.options" in starts and "train_network" in starts
    for start in starts:
        seen: set[str] = set()
        queue = [start]
        while queue:
            name = queue.pop()
            if name in seen:
                continue
            seen.add(name)
            queue.extend(modules()[name].local_imports(lazy=False))
            slow = {target.partition(".")[0] for target in modules()[name].imports(lazy=False)} & SLOW_IMPORTS
            wrong += [f"{start} imports {target} through {name}" for target in sorted(slow)]
    assert wrong == []


def test_the_quick_start_needs_only_the_standard_library() -> None:
    roots = {target.partition(".")[0] for target in modules()["quickstart"].imports(lazy=True)}
    assert roots - sys.stdlib_module_names == set()


# --- sizes


def test_no_file_is_longer_than_600_lines() -> None:
    lengths = {module.label: len(module.path.read_text(encoding="utf-8").splitlines()) for module in modules().values()}
    assert {label: count for label, count in lengths.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    wrong = [
        f"{module.label}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert wrong == []


def code_lines(module: Module) -> int:
    """Without blank lines, comments and docstrings."""
    text = module.path.read_text(encoding="utf-8")
    told = {
        line
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and number not in told for number, line in lines)


def test_a_family_costs_what_the_page_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, flags=re.MULTILINE)
    assert rows
    for family, *told in rows:
        own = [module for name, module in modules().items() if belongs_to(name, family) or name.startswith(f"{family}_")]
        kinds = (rf"library\.{family}_models", rf"library\.{family}_names|networks\.\w+", rf"library\.strategy_{family}", ".*")
        counts = [0] * len(kinds)
        for module in own:
            counts[next(i for i, kind in enumerate(kinds) if re.fullmatch(kind, module.name))] += code_lines(module)
        for number, count in zip(map(int, told), counts, strict=True):
            assert abs(number - count) <= max(10, count // 10), f"{family} has {counts}, and the page says {told}"


# --- what library code never does


def test_the_library_logs_and_never_prints() -> None:
    """`library/cli.py` is the exception: it tells the user on the terminal how a script ended."""
    found = [module for module in of("library", "networks") if module.name != "library.cli"]
    assert misuses(found, lambda call, name: name == "print") == []


RANDOM_TENSORS = re.compile(r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial)(_like)?")
RANDOM_METHODS = re.compile(r".+\.((kaiming_|xavier_|trunc_)?(normal_|uniform_)|random_|bernoulli_|exponential_)")
FOREIGN_GENERATORS = (
    "torch.manual_seed",
    "torch.default_generator.manual_seed",
    "torch.cuda.manual_seed_all",
    "random.seed",
    "np.random.seed",
    "set_seed",
)


def test_nothing_draws_from_a_global_random_generator() -> None:
    """Dropout masks and perturbations in networks/ are the exception: gradient checkpointing replays only the default
    generator, which the loop keys for every micro-step.
    """

    def from_global(call: ast.Call, name: str) -> bool:
        if RANDOM_TENSORS.fullmatch(name) or RANDOM_METHODS.fullmatch(name):
            return keyword(call, "generator") in (None, "None")
        if name in ("np.random.default_rng", "random.Random", "Random"):
            return not call.args
        return re.match(r"(random|np\.random|numpy\.random)\.", name) is not None

    wrong = misuses(of("library"), from_global)
    wrong += misuses(of("networks"), lambda call, name: name not in ("torch.rand", "torch.randn") and from_global(call, name))
    assert wrong == []


def test_the_default_generators_are_seeded_in_one_place_of_the_library() -> None:
    places = misuses(of("library"), lambda call, name: name in FOREIGN_GENERATORS)
    assert [place.partition(":")[0] for place in places] == ["library/run_setup.py"]


def test_no_error_is_caught_without_a_name() -> None:
    """`except Exception` hides the mistakes nobody thought of, unless it cleans up and raises again."""
    wrong = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            last = node.body[-1]
            if broad and not isinstance(last, ast.Raise):
                wrong.append(f"{module.label}:{node.lineno}")
    allowed = [place for place in wrong if place.startswith("library/cli.py:")]  # the one place that turns errors into messages
    assert sorted(set(wrong) - set(allowed)) == []
    assert len(allowed) <= 1


def test_files_are_read_without_running_what_they_contain() -> None:
    def unsafe(call: ast.Call, name: str) -> bool:
        if name == "torch.load":
            return keyword(call, "weights_only") != "True"
        if name in ("np.load", "numpy.load"):
            return keyword(call, "allow_pickle") == "True"
        return name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "joblib.load")

    assert misuses(list(modules().values()), unsafe) == []


def test_no_text_is_run_as_code_or_as_a_shell_command() -> None:
    def dangerous(call: ast.Call, name: str) -> bool:
        return name in ("eval", "exec", "compile", "os.system", "os.popen") or keyword(call, "shell") == "True"

    assert misuses(list(modules().values()), dangerous) == []


ADDRESSES = re.compile(
    r"pypi\.org|pythonhosted|download\.pytorch|conda\.anaconda|--(extra-)?index-url|--find-links|file:///", re.IGNORECASE
)
TEXT_SUFFIXES = {".py", ".md", ".txt", ".toml", ".yaml", ".yml", ".json", ".cfg", ".sh", ""}
NOT_OURS = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "output", "outputs", "demo_output"}


def test_no_file_names_a_package_registry() -> None:
    """Where packages come from is the user's pip configuration."""
    wrong = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if NOT_OURS & set(parts) or path == Path(__file__) or path.suffix not in TEXT_SUFFIXES or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        wrong += [f"{path.relative_to(ROOT)}: {found.group(0)}" for found in ADDRESSES.finditer(text)]
    assert wrong == []


# --- the rules themselves can fail


@pytest.mark.parametrize("source", ["import torch", "if True:\n    import torch", "try:\n    import torch\nfinally:\n    pass"])
def test_an_import_that_runs_at_module_level_is_seen(source: str) -> None:
    assert "torch" in Module("x", ROOT / "x.py", ast.parse(source)).imports(lazy=False)


@pytest.mark.parametrize("source", ["def f():\n    import torch", "if TYPE_CHECKING:\n    import torch"])
def test_an_import_that_waits_is_not_seen_at_module_level(source: str) -> None:
    assert "torch" not in Module("x", ROOT / "x.py", ast.parse(source)).imports(lazy=False)
