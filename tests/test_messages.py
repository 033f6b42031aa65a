"""Every text that a user can see is listed in `messages.txt` and uses the field's words."""

import re
import sys
from difflib import unified_diff
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CATALOGUE = ROOT / "tests" / "messages.txt"
AVOIDED = {
    r"(?<!here )\bis no\b(?! longer)": "is not a valid …, has no …",
    r"\bsay (--|by|it|what)": "pass --…, use …",
    r"\b(can|could|cannot) be had\b": "is (un)available",
    r"\bknobs?\b": "option",
    r"\bpictures?\b": "image",
    r"\b(is|was|are|be) taught\b|\bteaches\b": "is trained, trains",
    r"\bjudged?\b": "evaluate",
    r"\bgoes on\b|\bgo on\b|\bgoing on\b": "resumes, continues",
    r"\bto the (same )?bits?\b": "bitwise identical",
    r"\bprolong": "extend",
    r"\bput it right\b|\bas it was said\b": "fix it, as given",
    r"\banswers \{?[\w.]*\}? ?(classes|\d)": "has … outputs",
}
"""Words to avoid, and those to use instead."""


def test_messages_txt_holds_every_message():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from list_messages import catalogue
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    now, known = catalogue().splitlines(), CATALOGUE.read_text().splitlines()
    changed = "\n".join(unified_diff(known, now, "catalogue", "code", lineterm="", n=0))
    assert not changed, f"read these messages, then: python scripts/list_messages.py > tests/messages.txt\n{changed}"


@pytest.mark.parametrize("pattern", AVOIDED)
def test_messages_avoid_private_words(pattern):
    lines = [line for line in CATALOGUE.read_text().splitlines() if not line.startswith("## ")]
    # Placeholders hold code, and keys of files keep their old names, e.g. knobs.
    found = [line for line in lines if re.search(pattern, re.sub(r"\{[^}]*\}", "", line), re.IGNORECASE)]
    assert not found, f"better: {AVOIDED[pattern]}\n" + "\n".join(found)
