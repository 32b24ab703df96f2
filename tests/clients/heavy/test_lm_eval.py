"""lm-eval's `local-chat-completions`, unmodified, with a task of our own. Goal: each item is answered."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def test_a_task_is_answered_and_scored(v1: str, tmp_path: Path) -> None:
    options = f"model=general,base_url={v1}/chat/completions,num_concurrent=3,max_retries=1"
    done = subprocess.run(
        [
            "lm_eval", "--model", "local-chat-completions", "--model_args", options, "--tasks", "capitals",
            "--include_path", str(HERE), "--apply_chat_template", "--log_samples",
            "--output_path", str(tmp_path),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = tmp_path.rglob("samples_capitals_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 6
    assert all(answers)
    (results,) = tmp_path.rglob("results_*.json")
    scored = json.loads(results.read_text(encoding="utf-8"))["results"]["capitals"]
    assert scored["exact_match,named"] > 0
