import pkgutil
import subprocess
import sys

import pytest

import heterorl
import heterorl_operator

HEAVY = ("torch", "vllm", "transformers", "deepspeed", "datasets", "pyarrow", "sympy", "math_verify")
ONLY_IN_WORKERS = "heterorl.data.equality."
"""Built on sympy; what others import of it (through `heterorl.data.answers`) is light."""


def modules(package):
    """The package and everything below it, room by room, but for what only workers import."""
    names = (module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    return [package.__name__, *(name for name in names if not name.startswith(ONLY_IN_WORKERS))]


def loaded_by(statement):
    """Names of the top-level modules that a fresh interpreter holds after the statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    ("package", "refused"), [(heterorl, (*HEAVY, "kopf", "kubernetes")), (heterorl_operator, HEAVY)]
)
def test_importing_the_light_packages_loads_no_heavy_module(package, refused):
    assert package is heterorl_operator or "heterorl.exchange.exchange" in modules(package)  # rooms are entered
    assert not loaded_by(f"import {', '.join(modules(package))}") & set(refused)


def test_the_command_line_starts_without_what_only_some_commands_need():
    assert not loaded_by("import heterorl.cli") & {*HEAVY, "matplotlib", "numpy", "pydantic", "rich", "yaml"}


def test_the_operator_starts_without_what_only_learner_and_sampler_need():
    assert not loaded_by("import heterorl_operator.app") & {*HEAVY, "numpy", "safetensors", "zstandard"}
