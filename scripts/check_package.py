"""Look at what was built in `dist/`, before it goes anywhere.

    python scripts/check_package.py [--tag v1.2.3]

The wheel has every file of the package that git tracks and nothing else of it, the licence and the entry points; the
source archive has every file that git tracks. With a tag: both are of its version, and the changelog has a dated
section for it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of a source archive's own.
_WRITTEN = {"PKG-INFO"}


def tracked(*under: str) -> set[str]:
    """Files that git tracks, by their paths in the repository."""
    shown = subprocess.run(["git", "ls-files", "-z", *under], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(filter(None, shown.stdout.split("\0")))


def complaints(wheel: Path, source: Path) -> list[str]:
    """What is missing in the two files, or too much."""
    named = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in named if name.startswith("loraflow/")}
    wanted = {name.removeprefix("src/") for name in tracked("src")}
    found = [f"{wheel.name} lacks {name}." for name in sorted(wanted - inside)]
    found += [f"{wheel.name} has {name}, which git does not track." for name in sorted(inside - wanted)]
    for name in ("licenses/LICENSE", "entry_points.txt", "METADATA"):
        if not any(entry.endswith(f".dist-info/{name}") for entry in named):
            found.append(f"{wheel.name} lacks {name}.")
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    found += [f"{source.name} lacks {name}." for name in sorted(tracked() - packed)]
    found += [
        f"{source.name} has {name}, which git does not track." for name in sorted(packed - tracked() - _WRITTEN - {""})
    ]
    return found


def release_complaints(tag: str, version: str, changelog: str) -> list[str]:
    """What is not ready for a release of that tag."""
    found = []
    if tag.removeprefix("v") != version:
        found.append(f"The tag is {tag}, and what was built is {version}. Build it on the tag, from a whole clone.")
    heading = rf"^## \[{re.escape(tag.removeprefix('v'))}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    if not re.search(heading, changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no section `## [{tag.removeprefix('v')}] - YYYY-MM-DD`. Date it.")
    return found


def only(pattern: str) -> Path:
    """The one file of that pattern in `dist/`."""
    files = sorted((ROOT / "dist").glob(pattern))
    if len(files) != 1:
        sys.exit(f"dist/ has {len(files)} files {pattern}, and one is wanted: make package")
    return files[0]


def main() -> None:
    """Complain, or say what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", help="the tag that is released")
    tag = parser.parse_args().tag
    wheel, source = only("*.whl"), only("*.tar.gz")
    version = wheel.name.split("-")[1]
    found = complaints(wheel, source)
    if tag:
        found += release_complaints(tag, version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if found:
        sys.exit("\n".join(found))
    print(f"loraflow {version}: {wheel.name} ({wheel.stat().st_size:,} bytes), {source.name} is whole")


if __name__ == "__main__":
    main()
