"""Makes a release of the template: `make release VERSION=0.2.0`. Standard library and git.

What is under *Unreleased* in the changelog becomes the version's, the version is written down, committed and tagged,
and `dist/` gets the archive that cookiecutter takes as it is, with its checksum. Nothing leaves this machine: the last
line says what to push. Whatever is refused is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent
CHANGELOG, PROJECT = ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"
NEXT = "## Unreleased\n"
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")


class Refused(Exception):
    """Why there is no release; nothing was changed."""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def numbers(version: str) -> tuple[int, ...]:
    """Raises Refused."""
    if not VERSION.fullmatch(version):
        raise Refused(f"{version!r} is no version: three numbers, such as 0.2.0")
    return tuple(map(int, version.split(".")))


def check(version: str, present: str) -> None:
    """Raises Refused."""
    if numbers(version) <= numbers(present):
        raise Refused(f"{version} does not come after {present}")
    if git("status", "--porcelain"):
        raise Refused("there are changes that are not committed")
    if git("tag", "--list", f"v{version}"):
        raise Refused(f"there is a tag v{version}")
    if not news(CHANGELOG.read_text("utf-8")):
        raise Refused("CHANGELOG.md says nothing under Unreleased")


def news(changelog: str) -> str:
    """What has changed since the last version."""
    _, _, rest = changelog.partition(NEXT)
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()


def dated(changelog: str, version: str, day: str) -> str:
    """The changelog with what was unreleased under its version."""
    return changelog.replace(NEXT, f"{NEXT}\n## {version} ({day})\n", 1)


def release(version: str) -> Path:
    """Returns the archive. Raises Refused."""
    text = PROJECT.read_text("utf-8")
    present = str(tomllib.loads(text)["project"]["version"])
    check(version, present)
    CHANGELOG.write_text(dated(CHANGELOG.read_text("utf-8"), version, f"{datetime.now(UTC):%Y-%m-%d}"), "utf-8")
    PROJECT.write_text(text.replace(f'version = "{present}"', f'version = "{version}"', 1), "utf-8")
    git("commit", "--quiet", "--all", "--message", f"Version {version}")
    git("tag", "--annotate", f"v{version}", "--message", f"Version {version}")
    name = f"taskflow-template-{version}"
    archive = ROOT / "dist" / f"{name}.zip"
    archive.parent.mkdir(exist_ok=True)
    git("archive", "--format=zip", f"--prefix={name}/", f"--output={archive}", f"v{version}")
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    archive.with_suffix(".zip.sha256").write_text(f"{checksum}  {archive.name}\n", "utf-8")
    return archive


def main() -> None:
    try:
        archive = release(sys.argv[1] if len(sys.argv) > 1 else "")
    except Refused as reason:
        sys.exit(f"No release was made: {reason}.")
    print(f"{archive.relative_to(ROOT)} and its checksum are there. To publish it: git push --follow-tags")


if __name__ == "__main__":
    main()
