import io

from cgspn.terminal import PlainConsole


def test_tables_are_not_cut_where_there_is_no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    PlainConsole(file=out).print("word " * 40)
    assert out.getvalue().split("\n")[0].rstrip() == ("word " * 40).rstrip()
