"""Packaging: everything comes from settings.ini, and the data sets travel inside the wheel."""

from collections import defaultdict
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
LICENSES = {"apache2": "Apache-2.0"}
STATUSES = ("", "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable")


def read_settings() -> dict[str, str]:
    """The [DEFAULT] section of settings.ini, `%(name)s` resolved."""
    parser = ConfigParser(delimiters=["="])
    if not parser.read(ROOT / "settings.ini", encoding="utf-8"):
        raise FileNotFoundError(f"settings.ini is missing beside {__file__}")
    return dict(parser["DEFAULT"])


def extras(settings: dict[str, str]) -> dict[str, list[str]]:
    """One extra for each key `NAME_requirements`."""
    suffix = "_requirements"
    return {
        key.removesuffix(suffix): value.split()
        for key, value in settings.items()
        if key.endswith(suffix)
    }


def data_files() -> list[tuple[str, list[str]]]:
    """Every file under data/ but scripts, by the folder that it is installed in."""
    folders = defaultdict(list)
    for path in sorted((ROOT / "data").rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            relative = path.relative_to(ROOT)
            folders[f"share/vlm_course/{relative.parent.as_posix()}"].append(relative.as_posix())
    return list(folders.items())


def readme() -> str:
    """The text of README.md, or nothing in a tree that has none yet."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def package_arguments(settings: dict[str, str]) -> dict:
    """The keyword arguments of `setuptools.setup`."""
    library = settings["lib_name"]
    return dict(
        name=library,
        version=settings["version"],
        description=settings["description"],
        long_description=readme(),
        long_description_content_type="text/markdown",
        author=settings["author"],
        author_email=settings["author_email"],
        url=settings["git_url"],
        license=LICENSES[settings["license"]],
        keywords=settings["keywords"].split(),
        classifiers=[
            f"Development Status :: {STATUSES[int(settings['status'])]}",
            f"Intended Audience :: {settings['audience']}",
            f"Natural Language :: {settings['language']}",
            "Programming Language :: Python :: 3",
        ],
        python_requires=f">={settings['min_python']}",
        packages=find_packages(include=[library, f"{library}.*"]),
        install_requires=settings["requirements"].split(),
        extras_require=extras(settings),
        data_files=data_files(),
        entry_points={"nbdev": [f"{library}={library}._modidx:d"]},
        zip_safe=False,
    )


setup(**package_arguments(read_settings()))
