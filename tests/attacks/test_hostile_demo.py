"""Requests to the demo that do not come from its page, and what it leaves behind."""

import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from builders import encoded, save_model, tiny_model

pytestmark = pytest.mark.attacks


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Running demo: the process, its address and the folder of its temporary files."""
    pytest.importorskip("gradio")
    model, temporary = save_model(tiny_model(), tmp_path / "model"), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "-m", "hf_regvit", "demo", "--model", str(model), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running at (http://[\w.:]+)", line):
                yield process, found[1], temporary
                break
        else:
            pytest.fail("".join(lines))
        process.kill()


def test_a_hostile_visitor(demo):
    process, address, temporary = demo
    json = {"Content-Type": "application/json"}
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/").status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1]", "10.0.0.1"):
            answer = client.get("/", headers={"Host": host, "Origin": "http://evil.example"})
            assert answer.status_code == 400, host
            assert "<html" not in answer.text
        answer = client.get("/", headers={"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
        for path in ("../../etc/passwd", "/etc/passwd", str(temporary), "pyproject.toml"):
            assert client.get(f"/gradio_api/file={path}").status_code in (400, 403, 404), path
        sent = client.post("/gradio_api/upload", files={"files": ("a.png", encoded(0))})
        assert sent.status_code == 200
        assert sent.json()[0].startswith(str(temporary))
        for body in (b'{"data": "' + b"x" * (150 << 20) + b'"}', b"[" * (30 << 20)):
            answer = client.post("/gradio_api/queue/join", content=body, headers=json)
            assert answer.status_code == 413
        pieces = (b"x" * (1 << 20) for _ in range(150))  # a body of unknown length
        answer = client.post("/gradio_api/queue/join", content=pieces, headers=json)
        assert answer.status_code == 400
        deep = client.post("/gradio_api/queue/join", content=b"[" * 100_000, headers=json)
        assert deep.status_code >= 400
        assert client.get("/").status_code == 200
    started = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert time.perf_counter() - started < 30
    assert list(temporary.iterdir()) == []  # no image of the visitor is left
