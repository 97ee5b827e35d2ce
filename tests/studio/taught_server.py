"""The real server and page with a model that has learned its answers by heart, and that takes its time."""

from __future__ import annotations

import sys
import time

import torch
import uvicorn

from fledge.inference.native import NativeEngine
from fledge.records.chat import ChatRenderer
from fledge.serving.app import create_app
from fledge.studio.chat import mount
from tests.inference import tiny


def main(port: int) -> None:
    torch.set_num_threads(1)
    tokenizer = tiny.tokenizer()
    model = tiny.taught()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.012))
    app = create_app(
        {
            "taught": NativeEngine(model, tokenizer, ChatRenderer(tokenizer)),
            "base": NativeEngine(tiny.llama(), tokenizer),
        }
    )
    mount(app)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]))
