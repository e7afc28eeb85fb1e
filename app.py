"""The demo: paste a text and see what surprises a model; compare; check a file of logits.

    python app.py

app_config.yaml says what it offers, and how much of the machine a visitor may use. This file reads
it. The rest is in demo/, from the server down: server (bounds, the end), page (tabs), handlers
(what a button does), service (numbers), views (sentences and pictures).
"""

import os
import sys

from demo.settings import ROOT, read_settings


def main() -> None:
    """Serve the page until SIGINT or SIGTERM. A mistake in app_config.yaml is told in one line."""
    try:
        settings = read_settings(ROOT / "app_config.yaml")
    except ValueError as error:
        sys.exit(str(error))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from demo.server import serve  # after the check, because its imports take seconds

    serve(settings)


if __name__ == "__main__":
    main()
