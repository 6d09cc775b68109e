"""The pictures of the README are drawn from a run's log and stand alone."""

import xml.etree.ElementTree
from pathlib import Path

from report_helpers import events, write_journal

from bench.pictures import loss_curve


def test_the_loss_curve_stands_alone(tmp_path: Path) -> None:
    write_journal(tmp_path, events())
    text = loss_curve.draw(tmp_path)
    assert xml.etree.ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "validation: " in text
    assert "href" not in text.replace('href="#', "")
    assert "currentColor" not in text  # an image has no text colour of its own
    assert len(text) < 150_000
