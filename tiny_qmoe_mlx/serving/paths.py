"""What the server has, by its path, and what may be done with it."""

from pathlib import Path

PAGE = Path(__file__).parent / "page"
KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
PAGES = {  # looked up once: no name from a request ever reaches the file system
    "/": ("index.html", "text/html; charset=utf-8"),
    **{f"/page/{file.name}": (file.name, KINDS[file.suffix]) for file in PAGE.glob("*.*") if file.suffix in KINDS},
}
COMPLETIONS = ("/v1/completions", "/v1/chat/completions", "/chat/completions")
OWN = ("/health", "/metrics", "/experts", "/openapi.json", "/v1/models")
OPEN = ("/health", "/openapi.json", *PAGES)  # need no key
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"


def methods(path: str) -> tuple[str, ...]:
    """What may be done with a path; nothing where there is none of this name."""
    if path in COMPLETIONS:
        return ("POST", "OPTIONS")
    known = path in OWN or path in PAGES or path.startswith("/v1/models/")
    return ("GET", "HEAD", "OPTIONS") if known else ()
