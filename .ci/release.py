"""What has to agree in each commit: perplexity.py with ppleval/, the version with the changelog.

python .ci/release.py                 # exit status 1, and a sentence, where something does not
python .ci/release.py --write-digest  # write into perplexity.py which ppleval/ it belongs to
"""

import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "perplexity.py"
sys.path.insert(0, str(ROOT))

import ppleval  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the two do not agree
    import perplexity


def problems() -> list[str]:
    """What does not agree."""
    found = []
    if perplexity.digest_of(ROOT / "ppleval") != perplexity.DIGEST:
        found.append("ppleval/ was changed since perplexity.py was made: run `make digest`.")
    heading = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    if heading is None or heading[1] != ppleval.__version__:
        found.append(f"CHANGELOG.md does not begin with version {ppleval.__version__}.")
    return found


def write_digest() -> None:
    """Put the digest of ppleval/ into perplexity.py."""
    line = f'DIGEST = "{perplexity.digest_of(ROOT / "ppleval")}"'
    text = re.sub(r'(?m)^DIGEST = ".*"$', line, SCRIPT.read_text("utf-8"))
    SCRIPT.write_text(text, "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-digest"]:
        write_digest()
    else:
        sys.exit("\n".join(problems()) or None)
