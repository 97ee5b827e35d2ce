"""llama.cpp's server from the Python package `xllamacpp`, in a process of its own. It imports nothing of ours:

python llama_launch.py FILE PORT CONTEXT PARALLEL THREADS CACHE
"""

import importlib
import signal
import sys


def main(file: str, port: str, context: str, parallel: str, threads: str, cache: str) -> None:
    """Serve a GGUF file until SIGTERM; `cache`: the number format of keys and values."""
    xllamacpp = importlib.import_module("xllamacpp")  # of the environment that runs this, none of ours

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel, params.n_ctx = int(parallel), int(context) * int(parallel)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    params.use_jinja, params.kv_unified = True, False
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(*sys.argv[1:])
