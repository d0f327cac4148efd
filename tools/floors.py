"""Fails when a module imports from a higher floor, when a file or function is too long, or a registry is named.

The floors are DESIGN.md's: 4 app, cli · 3 web, and the client side, which knows floor 0 only · 2 the engine ·
1 the rules · 0 what everything stands on. The stores import floor 0 and are imported by nobody.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FLOORS = {
    0: (
        *(
            "storage",
            "clock",
            "config",
            "log",
            "canonical",
            "audit_lines",
            "audit_read",
            "audit_verify",
            "storage_tools",
        ),
        *("redact", "bundle", "tails", "tracing", "notify"),
    ),
    1: ("rules",),
    2: (
        "hub",
        "commit",
        "deciding",
        "items",
        "memo",
        "upkeep",
        "reaping",
        "beats",
        "waiting",
        "loops",
        "metrics",
        "audit",
        "audit_check",
        "audit_file",
        "keeping",
        "reading",
        "ledger",
        "ledger_files",
        "standing",
        "keyring",
        "policy_files",
        "explaining",
        "pulse",
        "token_uses",
        "diagnosis",
        "diagnosis_files",
        "diagnosis_live",
        "diagnosis_of",
        "store_check",
        "store_copy",
        "store_backup",
        "store_repair",
        "unsaved",
        "job_spans",
    ),
    3: ("web",),
    4: (
        "app",
        "cli",
        "cli_access",
        "cli_audit",
        "cli_explain",
        "cli_jobs",
        "cli_nodes",
        "cli_output",
        "cli_policies",
        "cli_target",
        "cli_tokens",
        "watching",
        "cli_diagnose",
        "diagnosis_offline",
        "asking",
        "cli_dlq",
        "cli_jobs",
        "cli_missions",
        "cli_output",
        "cli_queue",
        "cli_submit",
        "cli_store",
        "cli_target",
        "__main__",
        "announce",
        "cli_ready",
        "cli_top",
        "reload",
        "serving",
    ),
}
CLIENT = (
    "alerts",
    "alerts_file",
    "answers",
    "answers_admin",
    "client",
    "contact",
    "handlers",
    "merging",
    "operating",
    "outbox",
    "paging",
    "pulling",
    "runner",
    "running",
    "smoke",
    "transport",
    "watcher",
    "webhook",
    "work_spans",
    "worker",
    "top",
)
"""The side of a worker: its modules import each other and floor 0."""

FILE_MAX, FUNCTION_MAX = 300, 60
REASON = re.compile(r"longer than 300 lines", re.IGNORECASE)
REGISTRY = re.compile(r"https?://[\w.-]*(pypi|pythonhosted|npmjs|debian)\.org", re.IGNORECASE)
ADDRESS = re.compile(r"://|^ *-+(index|extra-index|find-links|i\b|f\b)", re.MULTILINE)


def floor_of(module: str) -> int | str | None:
    """The floor of `sheratan_hub.x.y`: a number, "client", "store", or None if nobody has given it one."""
    parts = module.split(".")
    if parts[0] == "sheratan_stores":
        return "store"
    if len(parts) == 1:
        return 0
    if parts[1] in CLIENT:
        return "client"
    return next((floor for floor, names in FLOORS.items() if parts[1] in names), None)


def may_import(importer: int | str, imported: int | str) -> bool:
    """Whether the one floor may know the other."""
    if imported == "store":
        return importer == "store"
    if importer in ("client", "store"):
        return imported in (0, importer)
    if imported == "client":
        return importer == 4
    return int(imported) <= int(importer)


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions too; `.` is one that does not say from where."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "."
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module in ("sheratan_hub", "sheratan_hub.web", "sheratan_hub.rules", "sheratan_stores"):
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def complaints(root: Path) -> Iterator[str]:
    """One line for each thing that is wrong under `root`."""
    for package, folder in (
        ("sheratan_hub", root / "sheratan_hub"),
        ("sheratan_stores", root / "stores/sheratan_stores"),
    ):
        for path in sorted(folder.rglob("*.py")):
            module = ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            yield from (f"{path.relative_to(root)}:{text}" for text in of_file(path, module))


def of_file(path: Path, module: str) -> Iterator[str]:
    """What is wrong with one file, each with its line."""
    text = path.read_text()
    tree = ast.parse(text)
    mine = floor_of(module)
    if mine is None:
        yield f"1: {module} stands on no floor; give it one in tools/floors.py"
        return
    for line, name in imports(tree):
        if name == ".":
            yield f"{line}: {module} has a relative import; name the whole module"
        if name.split(".")[0] in ("sheratan_hub", "sheratan_stores") and not name.endswith("__version__"):
            theirs = floor_of(name)
            if theirs is None or not may_import(mine, theirs):
                yield f"{line}: {module} (floor {mine}) imports {name} (floor {theirs})"
    yield from too_long(text, tree)


def too_long(text: str, tree: ast.Module) -> Iterator[str]:
    """Files over 300 lines without a reason, functions over 60."""
    lines = text.count("\n")
    if lines > FILE_MAX and not REASON.search(ast.get_docstring(tree) or ""):
        yield f"1: {lines} lines, and its docstring gives no reason"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > FUNCTION_MAX:
                yield f"{node.lineno}: {node.name} has {size} lines"


def registries(root: Path) -> Iterator[str]:
    """Tracked files that name a package registry's address, and locks that name any address."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False).stdout
    for name in listed.splitlines():
        path = root / name
        address = ADDRESS if name.startswith("tools/lock/") and name.endswith(".txt") else REGISTRY
        if path.is_file() and address.search(path.read_text(errors="replace")):
            yield f"{name}: names a registry's address"


def main(root: Path) -> int:
    found = [*complaints(root), *registries(root)]
    print("\n".join(found) if found else "floors: every import goes downwards")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
