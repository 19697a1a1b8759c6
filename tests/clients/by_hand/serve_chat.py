"""``transformers chat`` with a model that ``vismem serve`` serves: two questions, the second after the first's answer.

python tests/clients/by_hand/serve_chat.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    command = [sys.executable, "-m", "vismem_cli", "serve", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    _, name, _, address = next(own for own in process.stderr if own.startswith("serving ")).split()
    try:
        chat = [str(Path(sys.executable).parent / "transformers"), "chat", name, address, "do_sample=False"]
        said = "what is a bag ?\nand what is a boot ?\n!exit\n"
        online = {
            name: own for name, own in os.environ.items() if name != "HF_HUB_OFFLINE"
        }  # its client heeds it here too
        done = subprocess.run(chat, env=online, input=said, capture_output=True, text=True, timeout=300, check=False)
    finally:
        process.terminate()
        process.wait()
    print(done.stdout[-3000:], done.stderr[-1500:])
    print(f"exit code {done.returncode}")


if __name__ == "__main__":
    main()
