"""The page of many pictures."""

import html
from html.parser import HTMLParser
from urllib.parse import unquote

from gkd_d2.visualize.legend import COLUMNS, IMPORTANCES
from gkd_d2.visualize.page import write_page


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_page_names_its_pictures_whatever_they_are_called(tmp_path):
    name = 'a "b" <c>&d#1%20.png'
    (tmp_path / name).write_bytes(b"")
    write_page(tmp_path / "index.html", "<Title>", {"config": "a<b.yaml"}, {name: "x < y", "plain.png": "two"}, COLUMNS)
    page = _Links()
    page.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [unquote(link) for link in page.links] == [name, name, "plain.png", "plain.png"]
    assert all(text in page.text for text in ("<Title>", "a<b.yaml", "x < y", "box context mask"))


def test_another_legend_and_a_table(tmp_path):
    write_page(tmp_path / "index.html", "Title", {}, {}, IMPORTANCES, "<table><tr><td>0.25</table>")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<td>0.25" in text and html.escape(IMPORTANCES["score"]) in text and "box context mask" not in text
