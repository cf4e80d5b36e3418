"""Links in the Markdown files lead somewhere, and the README's tree is the tree."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
LISTED = ("dist_train/", "launch/", "slurm/", "benchmarks/")  # file by file in the tree
FOLDERS = ("configs", "tests", "benchmarks/results")  # one line each


def project_files() -> list[str]:
    """Return the paths of the files in the project's folders, and of the pages beside them."""
    found = [path for name in (*LISTED, *FOLDERS) for path in (ROOT / name).rglob("*")]
    pages = ROOT.glob("*.md")
    made = ("__pycache__", ".egg-info")  # by running it
    return [
        str(path.relative_to(ROOT))
        for path in (*found, *pages)
        if path.is_file() and not any(part.endswith(made) for part in path.parts)
    ]


def anchors(markdown: str) -> set[str]:
    """Return the anchors of a file's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(FENCE.sub("", markdown)):
        text = LINK.sub(lambda match: match.group(0).split("]")[0][1:], heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def tree_of(readme: str) -> list[str]:
    """Return the paths of the README's tree; folders end with a slash."""
    block = readme.split("## The tree")[1].split("```")[1]
    paths, folders = [], []
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, text = line.strip().partition(" ")
        assert text.strip(), f"{name} has no description"
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


def test_every_relative_link_and_anchor_leads_somewhere() -> None:
    for name in project_files():
        if not name.endswith(".md"):
            continue
        page = ROOT / name
        for link in LINK.findall(FENCE.sub("", page.read_text())):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), f"{name} links to {link}: there is no {path}"
            if anchor:
                assert anchor in anchors(target.read_text()), f"{name} links to {link}: no heading"


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = tree_of((ROOT / "README.md").read_text())
    assert len(tree) == len(set(tree))
    for path in tree:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    wanted = {f"{folder}/" for folder in FOLDERS}
    for name in project_files():
        if name.startswith(LISTED) and not name.startswith(FOLDERS):
            wanted |= {f"{parent}/" for parent in Path(name).parents if parent != Path()}
            # An __init__.py is what its folder's line says.
            wanted |= {name} if Path(name).name != "__init__.py" else set()
    missing = sorted(wanted - set(tree))
    assert not missing, f"the README's tree lacks {', '.join(missing)}: give each a line"


def test_documents_are_ascii() -> None:
    for name in project_files():
        if name.endswith(".md"):
            assert (ROOT / name).read_text().isascii(), name
