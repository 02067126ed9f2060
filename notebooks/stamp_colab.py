"""Write a GitHub repository into the notebooks, so that Colab can open them: ``make colab``.

Every notebook's setup cell gets the address to install from (``REPO_URL``); its first cell and its
row in the README's table get an "Open in Colab" badge. Run it again if the repository moves;
``make colab REPO=`` removes all of it. Only Python is needed.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
REPO_URL = re.compile(r'^REPO_URL = ".*?"', re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 if there is no repository to write."""
    parser = argparse.ArgumentParser("make colab", description=__doc__.splitlines()[0])
    parser.add_argument("repo", nargs="?", help="default: git's remote origin")
    parser.add_argument("--branch", help="default: the one checked out")
    parser.add_argument("--clear", action="store_true", help="remove addresses and badges")
    chosen = parser.parse_args(arguments)
    try:
        slug = "" if chosen.clear else github(chosen.repo or origin())
    except ValueError as error:
        print(f"make colab: {error}", file=sys.stderr)
        return 2
    branch = chosen.branch or git("branch", "--show-current") or "main"

    url = f"https://github.com/{slug}@{branch}" if slug else ""  # what pip calls a branch

    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for file in notebooks:
        write(file, stamped(file.read_text("utf-8"), url, badge(slug, branch, file.name)))
    readme = ROOT / "README.md"
    lines = readme.read_text("utf-8").splitlines(keepends=True)
    for file in notebooks:
        lines = [row(line, file.stem, badge(slug, branch, file.name)) for line in lines]
    write(readme, "".join(lines))
    print(f"{len(notebooks)} notebooks: {f'github.com/{slug}, {branch}' if slug else 'cleared'}")
    return 0


def origin() -> str:
    """Return the address of git's remote ``origin``.

    Raises:
        ValueError: if there is none.
    """
    url = git("remote", "get-url", "origin")
    if not url:
        raise ValueError(
            "git has no remote named origin here; name the repository, "
            "as in make colab REPO=https://github.com/..."
        )
    return url


def github(url: str) -> str:
    """Return OWNER/NAME of a GitHub address, without any user name or token in it.

    Raises:
        ValueError: for any other address.

    >>> github("git@github.com:ada/notes.git"), github("https://ada:secret@github.com/ada/notes/")
    ('ada/notes', 'ada/notes')
    """
    pattern = (
        r"(?:https://(?:[^/@]*@)?|ssh://git@|git@)github\.com[/:]"
        r"([A-Za-z0-9-]+/[A-Za-z0-9._-]+?)(?:\.git)?/?"
    )
    found = re.fullmatch(pattern, url.strip())
    if not found:
        # What stands before @ may be a password: leave it out.
        shown = re.sub(r"//[^/@]*@", "//", url)
        raise ValueError(f"{shown!r} is not a GitHub repository: use https://github.com/OWNER/NAME")
    return found[1]


def badge(slug: str, branch: str, name: str) -> str:
    """Return the badge of a notebook, empty without a repository."""
    target = f"{COLAB}/github/{slug}/blob/{branch}/notebooks/{name}"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({target})" if slug else ""


def stamped(text: str, url: str, mark: str) -> str:
    """Return a notebook's text with the address in its setup cell, the badge below its title."""
    notebook, before = json.loads(text), json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = REPO_URL.sub(f'REPO_URL = "{url}"', "".join(cell["source"]))
            cell["source"] = source.splitlines(keepends=True)
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    title, _, rest = "".join(first["source"]).partition("\n")
    if mark or BADGE.search(rest):
        parts = [title, mark, BADGE.sub("", rest).strip("\n")]
        first["source"] = "\n\n".join(filter(None, parts)).splitlines(keepends=True)
    return text if notebook == before else json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def row(line: str, stem: str, mark: str) -> str:
    """Return a line of the README, with the badge if it is the notebook's row of the table."""
    if not line.startswith(f"| [`{stem}`]"):
        return line
    name, bar, rest = BADGE.sub("", line)[1:].partition("|")
    return f"| {' '.join(filter(None, [name.strip(), mark]))} {bar}{rest}"


def git(*words: str) -> str:
    """Return git's output, empty if it fails."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def write(file: Path, text: str) -> None:
    """Write a file if its text has changed."""
    if text != file.read_text("utf-8"):
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
