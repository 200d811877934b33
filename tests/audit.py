"""`python tests/audit.py`: whether what is installed has known vulnerabilities, by pip-audit; part of `make lint`.

Exit code 1 where one is known. Where pip-audit cannot reach its data, or that says nothing of what is installed, this
is said and the exit code is 0: a machine without a network must be able to lint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

COMMAND = (
    *(sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json"),
    *("--progress-spinner", "off", "--timeout", "15"),
)
LONGEST_S = 180


def audit(command: Sequence[str] = COMMAND) -> tuple[str, int]:
    """(what is to be said, exit code)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return f"audit skipped: no answer from the data of vulnerabilities within {LONGEST_S} s", 0
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        missing = "No module named pip_audit" in done.stderr
        why = "pip-audit is not installed" if missing else "cannot reach the data of vulnerabilities"
        return f"audit skipped: {why}", 0
    known = [package for package in found if "vulns" in package]
    lines = [_line(package, fault) for package in known for fault in package["vulns"]]
    if lines:
        return "\n".join(lines), 1
    if not known:
        return f"audit skipped: nothing is known there about any of {len(found)} installed packages", 0
    left = f", {len(found) - len(known)} could not be looked up" if len(known) < len(found) else ""
    return f"audit: no known vulnerability in {len(known)} packages{left}", 0


def _line(package: dict[str, Any], fault: dict[str, Any]) -> str:
    mended = ", ".join(fault.get("fix_versions") or []) or "no version yet"
    return f"audit: {package['name']} {package.get('version')}: {fault['id']}, mended in {mended}"


if __name__ == "__main__":
    said, code = audit()
    print(said)
    sys.exit(code)
