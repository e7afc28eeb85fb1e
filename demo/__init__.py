"""The parts of the demo: app.py at the root puts them on a page."""
