"""Every block of README.md runs, in order, in a fresh folder that holds only a small model of the user's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.readme import ROOT, blocks
from tests.free_port import free_port
from tests.models import make_hf, tiny_config
from tests.tokenizers import tiny_tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "run by: the demo lane": "ci/demo.sh",
    "run by: the test lane": "ci/test.sh",
    "run by: the containers lane": "docker compose",
    "run by: the nodes lane": "pipedock ",  # two nodes, by these commands with other addresses
}


def test_blocks_left_to_other_lanes_are_few_and_real():
    """Each is run by a lane of .ci/run; this file runs all the others."""
    left = [b for b in blocks(README) if b.tag.startswith("run by: ")]
    assert [ELSEWHERE[b.tag] in b.body for b in left] == [True] * 6
    assert README.count("```") == 2 * len(blocks(README)), "a fence that the reader of blocks does not see"
    lanes = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(script in lanes for script in ("ci/demo.sh", "ci/test.sh", "ci/containers.sh", "ci/nodes.sh"))


def test_every_other_block_runs_in_order(tmp_path):
    port = str(free_port())
    model = tmp_path / "models" / "my-llama"
    tiny_tokenizer(model)
    make_hf(model, tiny_config("llama", vocab_size=512, max_position_embeddings=512))
    env = dict(
        os.environ,
        PATH="%s:%s" % (Path(sys.executable).parent, os.environ["PATH"]),
        XDG_RUNTIME_DIR=str(tmp_path),
        OMP_NUM_THREADS="1",
    )
    seen = []
    try:
        for block in blocks(README):
            body = block.body.replace("8082", port)
            if block.tag.startswith("run by: "):
                continue
            if block.file:
                path = tmp_path / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(body, encoding="utf-8")
                continue
            if block.lang == "bash":
                # Only the port may differ from what the user types.
                body = re.sub(r"(pipedock serve +--model \S+)", r"\1 --port " + port, body)
                body = body.replace("serve --stop", "serve --stop --port " + port)
            command = ["bash", "-euo", "pipefail", "-c", body] if block.lang == "bash" else [sys.executable, "-c", body]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, "%s\n%s\n%s" % (body, done.stdout, done.stderr)
            seen.append(done.stdout)
    finally:
        subprocess.run(["pipedock", "serve", "--stop", "--port", port], cwd=tmp_path, env=env, capture_output=True)
    assert len(seen) == 9, "a block was added or lost: say here how many run"
    assert "bubble" in seen[1]
    assert '"generated_text"' in seen[4] and "data: {" in seen[4] and "chat.completion" in seen[4]
    assert (tmp_path / "exports" / "mine" / "proof.json").exists() and (tmp_path / "bloom-7b.yaml").exists()
