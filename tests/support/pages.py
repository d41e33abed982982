"""A parser of reports, for their text, tags and attributes."""

from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags, attributes and text of an HTML page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></svg><script>", "&lt;b&gt; & '", "\ud800",
    "]]> --> \x00 {curly} %s",
]  # fmt: skip


def assert_only_text(page, calm, at_least):
    """Assert that HOSTILE changes only the page's text, where each occurs `at_least` times; `calm` has none of it."""
    assert page.tags == calm.tags
    names = Counter((tag, name) for tag, name, _ in page.attributes)
    assert names == Counter((tag, name) for tag, name, _ in calm.attributes)
    assert not page.tags["script"]
    for text in HOSTILE[:4]:
        assert page.text.count(" ".join(text.split())) >= at_least, text
