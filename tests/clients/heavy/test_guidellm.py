"""guidellm, unmodified, with prompts of our own. Goal: every request is answered and timed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ASKS = 12


def test_a_short_benchmark_runs_through(http: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": f"Tell me {n} things about bread.", "output_tokens_count": 24} for n in range(2, 2 + ASKS)
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            "guidellm", "run", "--disable-console-interactive",
            "--backend", f"kind=openai_http,target={http},model=code",
            "--profile", "kind=concurrent,streams=4",
            "--constraint", f"kind=max_requests,count={ASKS}",
            "--data", f"kind=json_file,path={prompts}",
            "--output", f"kind=json,path={report}",
            "--output", "kind=console",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (ASKS, 0)
