"""Every text that a person can meet stands in `messages.txt`, and speaks plain English."""

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
"""Words of a private language, and the field's."""


def test_the_catalogue_holds_every_message():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from list_messages import catalogue
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    now, known = catalogue().splitlines(), CATALOGUE.read_text().splitlines()
    changed = "\n".join(unified_diff(known, now, "catalogue", "code", lineterm="", n=0))
    assert not changed, f"read these messages, then: python scripts/list_messages.py > tests/messages.txt\n{changed}"


@pytest.mark.parametrize("pattern", AVOIDED)
def test_messages_use_the_words_of_the_field(pattern):
    lines = [line for line in CATALOGUE.read_text().splitlines() if not line.startswith("## ")]
    # What is put into a message is code, and keys of files keep their names.
    said = [line for line in lines if re.search(pattern, re.sub(r"\{[^}]*\}", "", line), re.IGNORECASE)]
    assert not said, f"better: {AVOIDED[pattern]}\n" + "\n".join(said)
