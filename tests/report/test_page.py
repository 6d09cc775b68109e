"""The page engine: every kind of content of a section, and no text becomes markup."""

import re

import pytest

from gptperf.report.figures import lines_for, pyplot, svg
from gptperf.report.page import Section, Tile, render
from gptperf.report.tables import Table, aligned, markdown, words

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

EVIL = "<b onclick=x>&\"'\x1b\u202e"
SHOWN = "&lt;b onclick=x&gt;&amp;&#34;&#39;\ufffd\ufffd"


def chart(name: str) -> str:
    figure, axes = pyplot().subplots()
    axes.plot([0, 1])
    return svg(figure, name)


def test_every_text_is_escaped_and_cleaned() -> None:
    line = lines_for([EVIL])[0]
    table = Table((EVIL,), [(EVIL,)], keys=[line])
    tile = Tile(EVIL, EVIL, EVIL)
    section = Section(EVIL, [EVIL], [table], ["a"], code=[EVIL], tiles=[tile], below=[EVIL], legend=[line])
    page = render(EVIL, [section], {"a": chart("a")}, {"a": EVIL})
    # title twice; link and heading; three texts of the tile; one each of the other seven
    assert page.count(SHOWN) == 2 + 2 + 3 + 7
    assert "<b onclick" not in page
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "default-src 'none'" in page


def test_a_section_shows_its_parts_in_one_order() -> None:
    section = Section(
        "title", ["line"], [Table(("column",), [("cell",)])], ["a"], code=["code"], tiles=[Tile("label", "tile")]
    )
    page = render("t", [section], {"a": chart("a")}, {"a": "caption"})
    body = page[page.index("</nav>") :]
    places = [body.index(f">{text}") for text in ("title", "tile", "line", "caption", "cell", "code")]
    assert places == sorted(places)


def test_a_chart_without_a_figure_is_left_out() -> None:
    page = render("t", [Section("a", charts=["drawn", "empty"])], {"drawn": chart("drawn"), "empty": None})
    assert page.count("<figure>") == 1
    assert "<figcaption>" not in page


def test_charts_share_a_legend_side_by_side() -> None:
    lines = lines_for(["one", "two"])
    page = render("t", [Section("", charts=["a"], legend=lines)], {"a": chart("a")})
    assert '<div class="legend">' in page
    assert page.count('<svg class="key"') == 2
    assert re.search(r"\.charts {[^}]*grid-template-columns", page)  # the style rule that puts them side by side
    assert page.index('class="legend"') < page.index("<figure>")
    assert "<nav>" not in page  # no section has a title


def test_only_a_folded_section_is_closed() -> None:
    page = render("t", [Section("open", ["a"]), Section("closed", ["b"], folded=True)], {})
    assert page.count("<details>") == page.count("</details>") == 1
    assert page.index("<p>a</p>") < page.index("<details>") < page.index("<p>b</p>")


def test_columns_are_aligned_by_what_they_hold() -> None:
    table = Table(("name", "ms", "state"), [("a", "1.0", "done"), ("b", "10.0", "PASS")], frozenset({0, 2}))
    page = render("t", [Section("", tables=[table])], {})
    assert '<th class="text">name</th><th>ms</th><th class="text">state</th>' in page
    assert '<td class="text">a</td><td>1.0</td><td class="text">done</td>' in page
    assert '<td class="pass">PASS</td>' in page
    assert aligned(table) == "name    ms  state\na      1.0  done\nb     10.0  PASS"
    assert markdown(table).splitlines()[1] == "| --- | ---: | --- |"
    assert 'class="words"' not in page
    assert 'class="words"' in render("t", [Section("", tables=[words(("a", "b"), [("c", "d")])])], {})


def test_a_long_cell_is_wrapped_and_a_key_stands_before_its_row() -> None:
    line = lines_for(["x"])[0]
    table = Table(("", "run"), [("1", "x" * 41), ("2", "y")], keys=[line, None], key_column=1)
    page = render("t", [Section("", tables=[table])], {})
    assert re.search(r'<td class="long"><svg class="key".*</svg>x{41}</td>', page)
    assert page.count('<svg class="key"') == 1


def test_charts_of_one_page_share_no_name() -> None:
    ids = [set(re.findall(r'id="([^"]+)"', chart(name))) for name in ("a", "b")]
    assert all(ids)
    assert not ids[0] & ids[1]
