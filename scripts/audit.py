"""Compares the locked packages with the known vulnerabilities: `python scripts/audit.py [LOCK ...]`, `make audit`.

Exits with 1 if a package has one.  Where the advisory service cannot be reached it prints "not audited", with the
reason, and exits with 0: a machine without that service must not look like one without vulnerabilities.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

LOCKS = ("requirements.lock", "requirements-dev.lock")


def verdict(report: str, error: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print for what pip-audit wrote to stdout and stderr."""
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = error.strip().splitlines()[-1:] or ["pip-audit wrote no report"]
        return 0, [f"not audited: {reason[0]}"]
    unknown = [package for package in packages if "skip_reason" in package]
    found = [(package, fault) for package in packages for fault in package.get("vulns", ())]
    lines = []
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version"
        lines.append(f"{package['name']} {package['version']}: {fault['id']}; fixed in {fixed}")
    if len(unknown) == len(packages):
        return 0, [f"not audited: the advisory service gave no answer for any of {len(packages)} packages"]
    lines.append(f"{len(packages) - len(unknown)} of {len(packages)} packages audited, {len(found)} vulnerabilities")
    lines += [f"not audited: {package['skip_reason']}" for package in unknown]
    return int(bool(found)), lines


def main(locks: Sequence[str]) -> int:
    """Audit the packages of some lock files."""
    code = 0
    for lock in locks:
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--require-hashes",
            "--disable-pip",
            "--format",
            "json",
            "-r",
            lock,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        found, lines = verdict(done.stdout, done.stderr)
        code = max(code, found)
        print("\n".join(f"{lock}: {line}" for line in lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or LOCKS))
