"""What you changed in the task system, and how newer versions of it get here.

    upstream.py status [--quiet]         per file: same, edited, removed, added; offline
    upstream.py diff [PATH ...]          your edits, against what was taken
    upstream.py diff --theirs [--to REF] what changed upstream since
    upstream.py update [--to REF]        what an update would do; with --write it is done
    upstream.py add redis|postgres|celery    what the project was made without; with --write it is done

The standard library and git, nothing else. `app/taskflow/UPSTREAM.toml` has the checksums of what was taken, and from
where. Vendored files are the same bytes in every project, so they are merged as they are: what you did not touch is
replaced, what you edited is merged by `git merge-file`, what you removed stays removed, a store that you left out stays
out. What belongs to which project is known to the newer version: an update is made by its copy of this file. The exit
code is 1 where something is left for you to decide.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = "app/taskflow/UPSTREAM.toml"
THIS = "tools/upstream.py"
TREES = ("app/taskflow/", "tests/taskflow/", "tools/")
"""What is vendored: the same bytes in every project."""
INSIDE = "{{cookiecutter.project_slug}}/"
"""Where they are in the template."""
OF_A_STORE = re.compile(r"(?:app/taskflow/backends/|tests/taskflow/test_)(redis|postgres)[._].*")
OF_THE_DELIVERY = re.compile(
    r"app/taskflow/delivery(_worker)?\.py|tests/taskflow/(test_delivery|brokers|delivered|fleet_app)\.py"
)
SCHEMA = "app/taskflow/backends/tables.py"
SCRATCH = ("__pycache__", ".pyc", "UPSTREAM.toml")


class Refused(Exception):
    """Something that has to be different first; the message says what."""


# -- what was taken


@dataclass(frozen=True)
class Taken:
    """`UPSTREAM.toml`."""

    template: str
    commit: str
    stores: Sequence[str]
    files: Mapping[str, str]
    """Path -> SHA-256."""

    @classmethod
    def read(cls, root: Path) -> Taken:
        try:
            known = tomllib.loads((root / RECORD).read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise Refused(f"{RECORD} cannot be read ({error}): it says what was taken from the template") from error
        return cls(known["template"], known["commit"], known["stores"], known["files"])

    def text(self) -> str:
        lines = [
            "# What was taken from the template; `tools/upstream.py` reads and writes it.",
            f'template = "{self.template}"',
            f'commit = "{self.commit}"',
            f"stores = [{', '.join(map(quoted, self.stores))}]",
            "",
            "[files]",
            *(f'"{path}" = "{digest}"' for path, digest in sorted(self.files.items())),
        ]
        return "\n".join(lines) + "\n"

    def wants(self, path: str) -> bool:
        """Whether a file of the template belongs here: vendored, and of no store or delivery that was left out."""
        store = OF_A_STORE.fullmatch(path)
        owner = store[1] if store else "celery" if OF_THE_DELIVERY.fullmatch(path) else None
        return path.startswith(TREES) and (owner is None or owner in self.stores)


def quoted(text: str) -> str:
    return f'"{text}"'


def digest_of(content: bytes) -> str:
    """The same for CRLF and LF: an editor that changes line ends edits nothing."""
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def here(root: Path) -> Iterator[str]:
    """The files below the vendored trees, as paths with slashes."""
    for tree in TREES:
        for path in sorted((root / tree).rglob("*")):
            if path.is_file() and not any(part.endswith(SCRATCH) for part in path.parts):
                yield path.relative_to(root).as_posix()


def states(root: Path, taken: Taken) -> dict[str, str]:
    found = {}
    for path in sorted({*taken.files, *here(root)}):
        if not (root / path).exists():
            found[path] = "removed"
        elif path not in taken.files:
            found[path] = "added"
        else:
            same = digest_of((root / path).read_bytes()) == taken.files[path]
            found[path] = "same" if same else "edited"
    return found


# -- the template's repository


def git(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True)
    if check and done.returncode:
        raise Refused(f"git {' '.join(arguments[:2])}: {done.stderr.decode(errors='replace').strip()}")
    return done


@dataclass
class Template:
    """Trees of the template at two commits, fetched for this run."""

    folder: Path
    base: str
    theirs: str

    def files(self, commit: str) -> dict[str, bool]:
        """Path in a project -> whether it is executable."""
        listed = git("ls-tree", "-r", "-z", commit, "--", INSIDE, cwd=self.folder).stdout.decode()
        found = {}
        for line in listed.split("\0"):
            if line:
                facts, _, path = line.partition("\t")
                found[path.removeprefix(INSIDE)] = facts.startswith("100755")
        return found

    def content(self, commit: str, path: str) -> bytes:
        return git("show", f"{commit}:{INSIDE}{path}", cwd=self.folder).stdout

    def tool(self) -> bytes | None:
        """Their copy of this file, where there is one that updates other projects than its own."""
        found = self.content(self.theirs, THIS) if THIS in self.files(self.theirs) else b""
        return found if b'"--project"' in found else None

    def renames(self) -> dict[str, str]:
        """Old path -> new path, where git sees that a file went elsewhere."""
        told = git("diff", "-M", "--name-status", "-z", self.base, self.theirs, "--", INSIDE, cwd=self.folder)
        words = told.stdout.decode().split("\0")
        found, at = {}, 0
        while at < len(words) - 1:
            if words[at].startswith("R"):
                found[words[at + 1].removeprefix(INSIDE)] = words[at + 2].removeprefix(INSIDE)
            at += 3 if words[at][:1] in ("R", "C") else 2
        return found

    def changed(self) -> list[str]:
        told = git("diff", "--name-only", "-z", self.base, self.theirs, "--", INSIDE, cwd=self.folder).stdout.decode()
        return [path.removeprefix(INSIDE) for path in told.split("\0") if path]


@contextlib.contextmanager
def template_of(taken: Taken, to: str | None) -> Iterator[Template]:
    if not taken.template or not taken.commit:
        raise Refused(f"{RECORD} names no template: the project was not made from a git repository")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        git("init", "--quiet", "--bare", ".", cwd=path)
        git("remote", "add", "origin", taken.template, cwd=path)
        git("fetch", "--quiet", "--tags", "origin", "+refs/heads/*:refs/heads/*", "HEAD", cwd=path)
        head = git("rev-parse", "FETCH_HEAD", cwd=path).stdout.decode().strip()
        yield Template(path, commit_of(path, taken.commit), commit_of(path, to or default_of(path, head)))


def default_of(folder: Path, fallback: str) -> str:
    """The newest commit of the template's main branch."""
    told = git("ls-remote", "--symref", "origin", "HEAD", cwd=folder, check=False).stdout.decode()
    found = re.search(r"^([0-9a-f]{40})\tHEAD$", told, re.MULTILINE)
    return found[1] if found else fallback


def commit_of(folder: Path, name: str) -> str:
    done = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", cwd=folder, check=False)
    if done.returncode:
        raise Refused(f"the template has no {name}")
    return done.stdout.decode().strip()


# -- an update


@dataclass
class Plan:
    """What an update does: what it writes, and why."""

    words: list[tuple[str, str]] = field(default_factory=list)
    writes: dict[str, bytes | None] = field(default_factory=dict)
    """Path -> content; None takes it away."""
    modes: dict[str, bool] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    records: dict[str, str] = field(default_factory=dict)
    """The checksums of the new version."""

    def say(self, what: str, path: str) -> None:
        self.words.append((what, path))


def plan_of(root: Path, taken: Taken, template: Template) -> Plan:
    plan = Plan()
    base = {path for path in template.files(template.base) if taken.wants(path)}
    theirs = {path: mode for path, mode in template.files(template.theirs).items() if taken.wants(path)}
    moved = {old: new for old, new in template.renames().items() if old in base and new in theirs}
    for old, new in moved.items():
        move(root, template, plan, old, new)
    for path in sorted((base | theirs.keys()) - moved.keys() - set(moved.values())):
        before = template.content(template.base, path) if path in base else None
        after = template.content(template.theirs, path) if path in theirs else None
        settle(root, plan, path, before, after)
    for path, executable in theirs.items():
        plan.records[path] = digest_of(template.content(template.theirs, path))
        if plan.writes.get(path) is not None:
            plan.modes[path] = executable
    return plan


def settle(root: Path, plan: Plan, path: str, before: bytes | None, after: bytes | None) -> None:
    """One file that has the same name in both versions, or is in one of them only."""
    ours = read(root / path)
    if before == after or same(ours, after):
        return
    if after is None:
        if same(ours, before):
            plan.writes[path] = None
            plan.say("removed", path)
        elif ours is not None:
            plan.conflicts.append(path)
            plan.say("conflict: you edited it, upstream removed it; it is kept", path)
    elif ours is None:
        if before is None:
            plan.writes[path] = after
            plan.say("new", path)
        else:
            plan.say("stays removed; upstream changed it", path)
    elif same(ours, before):
        plan.writes[path] = with_line_ends_of(ours, after)
        plan.say("updated", path)
    else:
        merge(plan, path, ours, before or b"", after)


def move(root: Path, template: Template, plan: Plan, old: str, new: str) -> None:
    """One file that has another name upstream."""
    ours, taken_there = read(root / old), read(root / new)
    before, after = template.content(template.base, old), template.content(template.theirs, new)
    if ours is None:
        if not same(taken_there, after):
            plan.say("stays removed; upstream renamed it", f"{old} -> {new}")
        return
    if taken_there is not None:
        plan.conflicts.append(new)
        plan.say("conflict: upstream renamed it to a file that you have; both are kept", f"{old} -> {new}")
        return
    plan.writes[old] = None
    if same(ours, before):
        plan.writes[new] = with_line_ends_of(ours, after)
        plan.say("renamed", f"{old} -> {new}")
    else:
        merge(plan, new, ours, before, after)


def merge(plan: Plan, path: str, ours: bytes, before: bytes, after: bytes) -> None:
    if b"\0" in ours + before + after:
        plan.conflicts.append(path)
        plan.say("conflict: you and upstream changed a file that is no text; yours is kept", path)
        return
    merged, clean = merged_text(*(text.replace(b"\r\n", b"\n") for text in (ours, before, after)))
    plan.writes[path] = with_line_ends_of(ours, merged)
    plan.say("merged" if clean else "conflict: marked in the file", path)
    if not clean:
        plan.conflicts.append(path)


def merged_text(ours: bytes, before: bytes, after: bytes) -> tuple[bytes, bool]:
    with tempfile.TemporaryDirectory() as folder:
        names = ("yours", "taken", "upstream")
        for name, content in zip(names, (ours, before, after), strict=True):
            (Path(folder) / name).write_bytes(content)
        labels = [part for name in names for part in ("-L", name)]
        done = subprocess.run(["git", "merge-file", "-p", "--diff3", *labels, *names], cwd=folder, capture_output=True)
    if done.returncode < 0 or done.returncode > 127:
        raise Refused(f"git merge-file: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout, done.returncode == 0


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def same(one: bytes | None, other: bytes | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.replace(b"\r\n", b"\n") == other.replace(b"\r\n", b"\n")


def with_line_ends_of(ours: bytes, content: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n") if b"\r\n" in ours and b"\r\n" not in content else content


def write(root: Path, plan: Plan) -> None:
    for path, content in plan.writes.items():
        target = root / path
        if content is None:
            target.unlink()
            for parent in target.parents:
                if parent == root or any(parent.iterdir()):
                    break
                parent.rmdir()
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        if plan.modes.get(path):
            target.chmod(target.stat().st_mode | 0o111)


def refuse_unsaved(root: Path) -> None:
    told = git("status", "--porcelain", cwd=root).stdout.decode().strip()
    if told:
        raise Refused("there are changes that are not committed: commit or stash them, so that an update can be undone")


# -- commands


def status(root: Path, options: argparse.Namespace) -> int:
    found = states(root, Taken.read(root))
    changed = {path: state for path, state in found.items() if state != "same"}
    if options.quiet:
        return 1 if changed else 0
    for path, state in changed.items():
        print(f"{state:8} {path}")
    print(f"{len(found) - len(changed)} of {len(found)} files as they were taken")
    return 0


def diff(root: Path, options: argparse.Namespace) -> int:
    taken = Taken.read(root)
    with template_of(taken, options.to) as template:
        base = {path for path in template.files(template.base) if taken.wants(path)}
        theirs = {path for path in template.files(template.theirs) if taken.wants(path)}
        paths = base | theirs if options.theirs else base | set(here(root))
        for path in sorted(paths):
            if not options.paths or any(is_below(path, asked) for asked in options.paths):
                before = template.content(template.base, path) if path in base else b""
                if options.theirs:
                    after = template.content(template.theirs, path) if path in theirs else b""
                else:
                    after = read(root / path) or b""
                show(path, before, after)
    return 0


def is_below(path: str, asked: str) -> bool:
    return path == asked or path.startswith(asked.rstrip("/") + "/")


def show(path: str, before: bytes, after: bytes) -> None:
    sys.stdout.writelines(difflib.unified_diff(lines_of(before), lines_of(after), f"a/{path}", f"b/{path}"))


def lines_of(content: bytes) -> list[str]:
    return content.decode("utf-8", "replace").replace("\r\n", "\n").splitlines(keepends=True)


def update(root: Path, options: argparse.Namespace) -> int:
    root = options.project or root
    taken = Taken.read(root)
    if options.write:
        refuse_unsaved(root)
    with template_of(taken, options.to) as template:
        newer = template.tool()
        if newer is not None and not same(newer, Path(__file__).read_bytes()):
            return hand_over(newer, root, template.theirs, options)
        plan = plan_of(root, taken, template)
        edges = [path for path in template.changed() if not path.startswith(TREES) and not path.startswith("_bare/")]
        schema = [version_of(template, commit) for commit in (template.base, template.theirs)]
        commit = template.theirs
    for what, path in plan.words:
        print(f"{what:12} {path}")
    if not plan.words:
        print("nothing to do" if commit == taken.commit else "no vendored file is concerned")
    if options.write:
        write(root, plan)
        fresh = Taken(taken.template, commit, taken.stores, plan.records)
        (root / RECORD).write_text(fresh.text(), "utf-8", newline="\n")
    advise(plan, options, taken, edges, schema)
    return 1 if plan.conflicts else 0


def hand_over(tool: bytes, root: Path, commit: str, options: argparse.Namespace) -> int:
    """The update as another version of this file makes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(THIS).name
        path.write_bytes(tool)
        words = ["update", "--project", str(root), "--to", commit, *(["--write"] if options.write else [])]
        return subprocess.run([sys.executable, str(path), *words]).returncode


def version_of(template: Template, commit: str) -> str:
    if SCHEMA not in template.files(commit):
        return ""
    found = re.search(rb"^SCHEMA_VERSION = (\d+)", template.content(commit, SCHEMA), re.MULTILINE)
    return found[1].decode() if found else ""


def advise(plan: Plan, options: argparse.Namespace, taken: Taken, edges: list[str], schema: list[str]) -> None:
    print()
    if edges:
        print(f"Made from your answers, and changed upstream too: {', '.join(edges)}")
        print("  cruft takes these over: uvx cruft update")
    if schema[0] != schema[1]:
        print(f"The schema goes from {schema[0]} to {schema[1]}: python -m app migrate, or the first start, does it")
    if plan.conflicts:
        print(f"For you to decide ({len(plan.conflicts)}): {', '.join(plan.conflicts)}")
    elif not options.write and plan.words:
        print("Nothing was written: --write does it. Then: make test-all")
    elif options.write:
        print("Now: make test-all, look at `git diff`, commit")


def add(root: Path, options: argparse.Namespace) -> int:
    taken = Taken.read(root)
    if options.store in taken.stores:
        raise Refused(f"{options.store} is here already")
    if options.write:
        refuse_unsaved(root)
    wider = Taken(taken.template, taken.commit, [*taken.stores, options.store], taken.files)
    with template_of(taken, taken.commit) as template:
        files = template.files(template.base)
        fresh = [path for path in files if wider.wants(path) and not taken.wants(path)]
        contents = {path: template.content(template.base, path) for path in fresh}
        needed = requirements(template.content(template.base, "pyproject.toml").decode(), options.store)
    for path in fresh:
        if read(root / path) not in (None, contents[path]):
            raise Refused(f"{path} is here already, and another file")
        print(f"new          {path}")
    print()
    if options.write:
        write(root, Plan(writes=dict(contents)))
        known = {**taken.files, **{path: digest_of(content) for path, content in contents.items()}}
        fresh_record = Taken(wider.template, wider.commit, wider.stores, known)
        (root / RECORD).write_text(fresh_record.text(), "utf-8", newline="\n")
    else:
        print("Nothing was written: --write does it.")
    for group, names in needed.items():
        if names:
            print(f"Then: uv add {'--dev ' if group == 'dev' else ''}{shlex.join(names)}")
    if options.store == "celery":
        print("Then: make test-all, app/worker.py from the template, and TASKFLOW_DELIVERY for the broker")
    else:
        print("Then: make test-all, and TASKFLOW_URL for the new store")
    return 0


def requirements(pyproject: str, store: str) -> dict[str, list[str]]:
    """What the template's own pyproject.toml has for that store, by group."""
    found: dict[str, list[str]] = {"dependencies": [], "dev": []}
    group, owner = "", ""
    for line in pyproject.splitlines():
        if match := re.match(r"(\w+) = \[", line):
            group, owner = match[1], ""
        elif match := re.match(r'\s*#% (?:el)?if cookiecutter\.(?:backend|delivery) == "(\w+)"', line):
            owner = match[1]
        elif re.match(r"\s*#% endif", line):
            owner = ""
        elif (match := re.match(r'\s+"(.+)",$', line)) and group in found and owner == store:
            found[group].append(match[1])
    return found


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("status", help="which files you changed")
    one.add_argument("--quiet", action="store_true", help="say nothing; the exit code is 1 where anything differs")
    one.set_defaults(command=status)
    one = commands.add_parser("diff", help="your edits, or what changed upstream")
    one.add_argument("paths", nargs="*", metavar="PATH")
    one.add_argument("--theirs", action="store_true", help="what changed upstream since")
    one.add_argument("--to", metavar="REF", help="a commit, tag or branch of the template; its main branch otherwise")
    one.set_defaults(command=diff)
    one = commands.add_parser("update", help="take a newer version")
    one.add_argument("--to", metavar="REF", help="a commit, tag or branch of the template; its main branch otherwise")
    one.add_argument("--write", action="store_true", help="do it; otherwise it is only said")
    one.add_argument("--project", metavar="DIR", type=Path, help="its root; the project of this file otherwise")
    one.set_defaults(command=update)
    one = commands.add_parser("add", help="a store or a delivery that the project was made without")
    one.add_argument("store", choices=["redis", "postgres", "celery"])
    one.add_argument("--write", action="store_true", help="do it; otherwise it is only said")
    one.set_defaults(command=add)
    return top


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    options = parser().parse_args(arguments)
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # set while git runs a hook
        os.environ.pop(name, None)
    try:
        return int(options.command(root, options))
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
