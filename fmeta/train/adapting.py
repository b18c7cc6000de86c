"""A finished run put to use from Python: models that learn new classes from a few examples.

``load_classifier`` is for runs of text, ``load_picture_classifier`` for runs of pictures; detectors have
``fmeta.train.detection.adapting``, which takes seconds to import. ``fmeta adapt`` does the same from files.
"""

from fmeta.train.pictures.adapting import load_picture_classifier
from fmeta.train.text.adapting import load_classifier

__all__ = ["load_classifier", "load_picture_classifier"]
