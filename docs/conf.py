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

# Pages that index.md lists as soon as they are there.
PAGES_TO_COME = ('finetune', 'serving', 'reliability')


def _drop_missing(app, docname, source):
  if docname == 'index':
    missing = {x for x in PAGES_TO_COME if not (HERE / f'{x}.md').exists()}
    lines = source[0].split('\n')
    source[0] = '\n'.join(x for x in lines if x not in missing)


def setup(app):
  """Joins the hook above."""
  app.connect('source-read', _drop_missing)
