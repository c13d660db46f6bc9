"""Print constraints.txt: the exact version of everything installed beside this interpreter."""

from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST = Version("3.10")
NOT_OURS = {"gtl", "pip", "setuptools", "wheel"}

HEADER = """\
# The versions that the tests run with, transitive ones included. Made by `make pins` from the .venv of `make test`;
# to move to newer ones: pip install --upgrade in .venv, `make test`, `make pins`.
# A pin whose package has left Python 3.10 holds from 3.11 on; on 3.10 the ranges of pyproject.toml decide."""


def pin(name: str, version: str, requires_python: str | None) -> str:
    """One line. A local label such as +cpu names a build, not a version, and is left out."""
    line = f"{name}=={version.partition('+')[0]}"
    return line if OLDEST in SpecifierSet(requires_python or "") else f'{line} ; python_version >= "3.11"'


def main() -> None:
    """Print the file; torch comes first, since it decides what the others bring."""
    found = {canonicalize_name(d.name): (d.version, d.metadata.get("Requires-Python")) for d in distributions()}
    names = sorted(found.keys() - NOT_OURS, key=lambda name: (name != "torch", name))
    print(HEADER, *(pin(name, *found[name]) for name in names), sep="\n")


if __name__ == "__main__":
    main()
