import pkgutil
import subprocess
import sys

import pytest

import heterorl
import heterorl_operator

HEAVY = ("torch", "vllm", "transformers", "deepspeed", "datasets")


def modules(package):
    return [package.__name__, *(f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__))]


def loaded_by(statement):
    """Names of the top-level modules that a fresh interpreter holds after the statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    ("package", "refused"), [(heterorl, (*HEAVY, "kopf", "kubernetes")), (heterorl_operator, HEAVY)]
)
def test_importing_the_light_packages_loads_no_heavy_module(package, refused):
    assert not loaded_by(f"import {', '.join(modules(package))}") & set(refused)


def test_the_command_line_starts_without_what_only_some_commands_need():
    assert not loaded_by("import heterorl.cli") & {*HEAVY, "matplotlib", "numpy", "pydantic", "rich", "yaml"}
