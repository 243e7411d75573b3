"""A message of 64 MB from a file to two subscribers, each program a process of its own."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MB = 1_000_000


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheme", ["http", "ws"])
async def test_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import large_body

    result = await large_body.measure(64 * MB, tmp_path, scheme)
    assert result.notified == 2
    assert result.equal, "sha512 at one end differs"
    for program, peak in result.peak_rss.items():
        idle = result.idle_rss[program]
        assert peak is not None
        assert idle is not None
        assert peak < 150 * MB, program
        assert peak - idle < 32 * MB, f"{program} holds a good part of the message"
