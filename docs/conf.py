"""The site of docs/, built by `make docs`; nothing heavy is imported."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from t5x_lite import __version__  # noqa: E402

project = 't5x_lite'
author = 'the authors of t5x_lite'
version = release = __version__

extensions = ['from_source', 'myst_parser']
myst_enable_extensions = ['deflist']
# Anchors as GitHub makes them, so that links work in both places.
myst_heading_anchors = 3
# Quotes are code here: what is copied must run.
smartquotes = False

html_theme = 'furo'
html_title = f't5x_lite {__version__}'
html_copy_source = False
html_show_sphinx = False
