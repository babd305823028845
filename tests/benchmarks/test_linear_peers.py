"""Linear peers: a row says why there is none."""

import json

from benchmarks.linear_peers import main


def test_without_a_gpu_or_the_package_a_row_says_so(tmp_path):
    main(tmp_path, sizes=(28,), batch=1, rounds=1, commit="abc")
    (row, *_) = json.loads((tmp_path / "peers.json").read_text())["linear peers"]
    assert "note" in row or row["sub-layer ms"] > 0
