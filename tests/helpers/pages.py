"""The Markdown pages of the repository: their links, anchors and blocks of commands."""

import re
import subprocess
from pathlib import Path

from helpers.command import ROOT

_FENCE = re.compile(r"^(`{3,}).*?^\1\s*$", re.M | re.S)
_CODE = re.compile(r"(`+).+?\1", re.S)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href|srcset)=\"([^\"]+)\"")


def pages() -> list[Path]:
    """Every page that git knows, or would; without git (a source package) every page there is."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    found = map(ROOT.joinpath, done.stdout.split()) if done.returncode == 0 else ROOT.rglob("*.md")
    return sorted(path for path in found if path.is_file())


def links(text: str) -> list[str]:
    """The targets of links and pictures, those inside of code left out."""
    prose = _CODE.sub("", _FENCE.sub("", text))
    return [plain or html for plain, html in _LINK.findall(prose)]


def anchors(text: str) -> set[str]:
    """What ``#…`` may name: the headings as GitHub makes anchors of them, and those that HTML gives."""
    found: dict[str, int] = {}
    names = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", _FENCE.sub("", text), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


def broken(page: Path, root: Path = ROOT) -> list[str]:
    """The links of a page whose file or anchor does not exist, or that lead out of the repository."""
    wrong = []
    for link in links(page.read_text()):
        if re.match(r"[a-z][a-z+.-]*:", link):  # another site, of which only the network knows
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(root):
            wrong.append(f"{link}: there is no such file")
            continue
        file = target / "README.md" if target.is_dir() else target
        if anchor and (not file.is_file() or anchor not in anchors(file.read_text())):
            wrong.append(f"{link}: there is no such heading")
    return wrong


def commands(text: str) -> list[str]:
    """The lines of a page's blocks of commands, without comments."""
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```$", text, re.M | re.S)
    lines = [re.sub(r"(^|\s+)# .*$", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]
