"""The page of many pictures."""

from html.parser import HTMLParser
from urllib.parse import unquote

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
    write_page(tmp_path / "index.html", "<Title>", {"config": "a<b.yaml"}, {name: "x < y", "plain.png": "two"})
    page = _Links()
    page.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [unquote(link) for link in page.links] == [name, name, "plain.png", "plain.png"]
    assert all(text in page.text for text in ("<Title>", "a<b.yaml", "x < y", "box context mask"))
