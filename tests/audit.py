"""`make audit`: the licences of what lit-rlhf installs, and the known holes of what is installed here (pip-audit)."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement

# Licences under which anybody may use, change and pass on a program, by how packages spell them; MPL asks that changes
# to the package's own files stay open.
PERMISSIVE = re.compile(
    r"\b(MIT|MIT-CMU|BSD|0BSD|[23]-Clause|Apache|Apache-2\.0|ISC|Zlib|PSF-2\.0|CNRI-Python|BSL-1\.0|CC0-1\.0|"
    r"MPL[- ]2\.0|Unlicense|LLVM-exception|OFL-1\.1|HPND)\b",
    re.IGNORECASE,
)
OF_NVIDIA = re.compile(r"(nvidia|cuda)-")  # under its own terms; they come with a build of torch for CUDA
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|GNU)", re.IGNORECASE)


def needed(package: str, extras: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of what a package needs where it is installed, directly; of those that are there."""
    for line in requires(package) or ():
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield requirement.name.lower().replace("_", "-")


def all_needed(package: str) -> set[str]:
    """The same, and what these need, and so on."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        try:
            fresh = set(needed(waiting.pop())) - found
        except PackageNotFoundError:  # for another system
            continue
        found |= fresh
        waiting += fresh
    return found


def licence(package: str) -> str | None:
    """What a package says of its licence; None if it is not installed."""
    try:
        about = metadata(package)
    except PackageNotFoundError:
        return None
    classifiers = [line for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    said = about.get("License-Expression") or " ".join(classifiers) or about.get("License") or ""
    return " ".join(said.split())[:200]


def refused(licences: dict[str, str]) -> list[str]:
    """Packages whose licence is none of those that ask for nothing but their notice."""
    return [
        f"{package}: {said or 'no licence is named'}"
        for package, said in sorted(licences.items())
        if not OF_NVIDIA.match(package) and (COPYLEFT.search(said) or not PERMISSIVE.search(said))
    ]


def holes() -> tuple[int, str]:
    """Status and word of pip-audit on this environment."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return holes_told(done.stdout, done.stderr)


def holes_told(answer: str, complaint: str) -> tuple[int, str]:
    """What pip-audit's answer comes to; an audit that could not be made is no good one."""
    if "No module named pip_audit" in complaint:
        return 2, "known holes were not looked for: pip-audit is not installed; pip install pip-audit"
    packages = json.loads(answer)["dependencies"] if answer.strip() else []
    looked = [package for package in packages if "skip_reason" not in package]
    if not looked:
        why = packages[0]["skip_reason"] if packages else (complaint.strip().splitlines() or ["no answer"])[-1]
        return 2, f"known holes were not looked for: the database of advisories cannot be reached ({why:.100})"
    found = [
        f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'none'}"
        for package in looked
        for hole in package["vulns"]
    ]
    return int(bool(found)), "\n".join([*found, f"{len(looked)} packages looked at, {len(found)} known holes"])


def main() -> int:
    """Print both; the status is 0 where nothing was found."""
    licences = {package: said for package in all_needed("lit-rlhf") if (said := licence(package)) is not None}
    wrong = refused(licences)
    print(f"{len(licences)} packages that lit-rlhf needs, {len(wrong)} with a licence that asks for more than a notice")
    if nvidia := sorted(package for package in licences if OF_NVIDIA.match(package)):
        print(f"and with torch for CUDA, under NVIDIA's own terms: {', '.join(nvidia)}")
    print("\n".join(wrong), end="\n" if wrong else "")
    status, told = holes()
    print(told)
    return status or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
